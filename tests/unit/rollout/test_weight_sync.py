"""Weights arrive whole or not at all, through files and through a process group."""

import json
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_mapo.rollout.weight_sync import (
    Channel,
    SendingEnd,
    Weights,
    WeightSyncError,
    abort_message,
    bucket_message,
    buckets,
    digest_of,
    end_message,
    read_update,
    receive_update,
    write_update,
)

BUCKET_BYTES = 100
TIMEOUT_SECONDS = 5.0


@pytest.fixture
def tensors() -> list[tuple[str, Tensor]]:
    """All that a model's state can hold: a scalar, an empty tensor, views, two names for one memory, bfloat16."""
    matrix = torch.randn(6, 5)
    return [
        ("scalar", torch.tensor(3.5)),
        ("transposed", matrix.T),
        ("matrix", matrix),
        ("again", matrix),
        ("half", torch.randn(7).to(torch.bfloat16)),
        ("empty", torch.zeros(0, 3)),
        ("counts", torch.arange(4)),
    ]


def test_buckets_keep_the_order_and_the_limit(tensors: list[tuple[str, Tensor]]) -> None:
    parts = list(buckets(tensors, max_bytes=BUCKET_BYTES))
    assert [list(part) for part in parts] == [
        ["scalar"],
        ["transposed"],
        ["matrix"],
        ["again"],
        ["half", "empty", "counts"],
    ]
    assert list(buckets([], max_bytes=BUCKET_BYTES)) == []


def test_a_bucket_is_a_copy(tensors: list[tuple[str, Tensor]]) -> None:
    (bucket,) = buckets(tensors, max_bytes=2**20)
    before = bucket["matrix"].clone()
    dict(tensors)["matrix"].zero_()
    assert torch.equal(bucket["matrix"], before)


def test_a_tensor_is_let_go_before_the_next_one_is_asked_for() -> None:
    given: list[weakref.ref[Tensor]] = []

    def made() -> Tensor:
        assert all(tensor() is None for tensor in given)
        tensor = torch.zeros(10)
        given.append(weakref.ref(tensor))
        return tensor

    parts = buckets(((name, made()) for name in ("w", "v", "u")), max_bytes=BUCKET_BYTES)
    assert [list(part) for part in parts] == [["w", "v"], ["u"]]


def test_an_update_is_read_as_it_was_written(tmp_path: Path, tensors: list[tuple[str, Tensor]]) -> None:
    name, digest = write_update(tmp_path, 12, iter(tensors), bucket_bytes=BUCKET_BYTES)
    weights = read_update(tmp_path, name, 12)
    assert (weights.version, weights.digest) == (12, digest)
    assert {key: value.tolist() for key, value in weights.tensors.items()} == {k: v.tolist() for k, v in tensors}


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    digests = {write_update(tmp_path, 1, [("w", torch.full((2,), value))], bucket_bytes=9)[1] for value in (0.0, 1.0)}
    assert len(digests) == 2


def test_an_update_that_breaks_off_has_no_name_yet_and_is_removed_by_the_next(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "w", torch.zeros(100)
        yield "v", torch.zeros(100)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_update(tmp_path, 1, broken(), bucket_bytes=BUCKET_BYTES)
    (half,) = tmp_path.iterdir()
    assert half.name.endswith(".unfinished")
    with pytest.raises(WeightSyncError, match="is not the name of an update"):
        read_update(tmp_path, half.name, 1)
    name, _ = write_update(tmp_path, 2, [("w", torch.zeros(1))], bucket_bytes=BUCKET_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_newest_updates_are_kept(tmp_path: Path) -> None:
    names = [write_update(tmp_path, version, [("w", torch.zeros(1))], bucket_bytes=9)[0] for version in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names[2:]


def test_another_version_than_announced_is_refused(tmp_path: Path) -> None:
    name, _ = write_update(tmp_path, 3, [("w", torch.zeros(1))], bucket_bytes=9)
    with pytest.raises(WeightSyncError, match=r"manifest.json: is version 3, version 4 was announced"):
        read_update(tmp_path, name, 4)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/b", ".", "..", ".hidden", "version_1.unfinished"])
def test_only_names_of_updates_are_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightSyncError, match="is not the name of an update"):
        read_update(tmp_path, name, 1)


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"version": 1}', '{"version": 1, "files": {"x": "y"}}'])
def test_a_broken_manifest_is_named(tmp_path: Path, manifest: str) -> None:
    name, _ = write_update(tmp_path, 1, [("w", torch.zeros(1))], bucket_bytes=9)
    (tmp_path / name / "manifest.json").write_text(manifest)
    with pytest.raises(WeightSyncError, match=name):
        read_update(tmp_path, name, 1)


def test_a_manifest_cannot_point_out_of_its_directory(tmp_path: Path) -> None:
    name, _ = write_update(tmp_path, 1, [("w", torch.zeros(1))], bucket_bytes=9)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / name / "manifest.json").write_text(json.dumps({"version": 1, "files": {"../secret": "0"}}))
    with pytest.raises(WeightSyncError, match="No such file"):
        read_update(tmp_path, name, 1)


@contextmanager
def receiving(version: int = 5) -> Iterator[tuple[Channel, "Future[Weights]"]]:
    """A sender's channel, and what the receiver at its other end makes of it."""
    end = SendingEnd("127.0.0.1", backend="gloo", timeout_seconds=TIMEOUT_SECONDS)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receive_update, end.address(0), version)
        while not end.has_joined(0):
            assert not received.done()
        yield end.channel(0), received


def test_an_update_travels_through_a_process_group(tensors: list[tuple[str, Tensor]]) -> None:
    with receiving() as (channel, received):
        checksums = []
        for bucket in buckets(tensors, max_bytes=BUCKET_BYTES):
            checksum, parts = bucket_message(bucket)
            checksums.append(checksum)
            for part in parts:
                channel.send(part)
        channel.send(end_message(digest_of(checksums)))
        weights = received.result()
    assert (weights.version, weights.digest) == (5, digest_of(checksums))
    assert {key: value.tolist() for key, value in weights.tensors.items()} == {k: v.tolist() for k, v in tensors}


def wrong_checksum(channel: Channel) -> None:
    _, (header, content) = bucket_message({"w": torch.zeros(3)})
    content[-1] ^= 1
    channel.send(header)
    channel.send(content)


def missing_bucket(channel: Channel) -> None:
    checksum, _ = bucket_message({"w": torch.zeros(3)})
    channel.send(end_message(digest_of([checksum])))


def given_up(channel: Channel) -> None:
    channel.send(abort_message("NaN"))


def no_header(channel: Channel) -> None:
    channel.send(torch.tensor([1, 2, 3], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (wrong_checksum, "bucket 0: checksum"),
        (missing_bucket, "the 0 buckets that arrived are not those that were sent"),
        (given_up, "the trainer gave up after 0 buckets: NaN"),
        (no_header, "bucket 0: "),
    ],
)
def test_what_does_not_arrive_whole_is_no_update(fault: Callable[[Channel], None], reason: str) -> None:
    with receiving() as (channel, received):
        fault(channel)
        with pytest.raises(WeightSyncError, match=reason):
            received.result()


def test_a_trainer_that_falls_silent_is_given_up() -> None:
    end = SendingEnd("127.0.0.1", backend="gloo", timeout_seconds=1.0)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receive_update, end.address(0), 5)
        while not end.has_joined(0):
            assert not received.done()
        channel = end.channel(0)
        with pytest.raises(WeightSyncError, match="was lost after 0 buckets"):
            received.result()
        del channel
