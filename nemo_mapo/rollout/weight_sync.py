"""Weights on their way from the trainer to a server: in files behind a rename, or through a process group.

Both ways send buckets of whole named tensors with a SHA-256 each. The digest of an update is the SHA-256 of its
buckets' digests in order; it names the weights beyond their version number. A receiver gives out nothing before
everything has arrived and been checked.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

NamedTensors = Iterable[tuple[str, Tensor]]
SyncBackend = Literal["gloo", "nccl"]

MANIFEST: Final = "manifest.json"
KEPT_UPDATES: Final = 2
"""Directories left in place: a server may still be reading the one before the newest."""
_UNFINISHED = ".unfinished"
_TRAINER_RANK, _SERVER_RANK = 0, 1


class WeightSyncError(RuntimeError):
    """An update did not arrive whole; the message says what was wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A whole update, checked, on the CPU."""

    version: int
    digest: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ProcessGroupAddress:
    """Where a server finds the trainer for one update."""

    host: str
    port: int
    group: str
    """Each server and update has a group of its own in the store."""
    backend: SyncBackend
    timeout_seconds: float


def buckets(tensors: NamedTensors, *, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Gather tensors, in order, to about `max_bytes` (a larger tensor stands alone); they are copies on the CPU."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        # One that was gathered from several ranks goes before the next one is made.
        del tensor
    if bucket:
        yield bucket


def digest_of(parts: Iterable[str]) -> str:
    """Digest of an update from those of its buckets."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def write_update(directory: Path, version: int, tensors: NamedTensors, *, bucket_bytes: int) -> tuple[str, str]:
    """Write an update; its directory gets its name when all of it is on the disk.

    Returns:
        The name of the directory inside `directory`, and the update's digest.
    """
    final = directory / f"version_{version:08d}_{uuid.uuid4().hex[:12]}"
    unfinished = final.with_name(final.name + _UNFINISHED)
    unfinished.mkdir(parents=True)
    files: dict[str, str] = {}
    for number, bucket in enumerate(buckets(tensors, max_bytes=bucket_bytes)):
        content = save(bucket)
        name = f"bucket_{number:05d}.safetensors"
        files[name] = hashlib.sha256(content).hexdigest()
        _write(unfinished / name, content)
    _write(unfinished / MANIFEST, json.dumps({"version": version, "files": files}, indent=2).encode())
    unfinished.rename(final)
    _flush(directory)
    _remove_old(directory, newest=final)
    return final.name, digest_of(files.values())


def read_update(directory: Path, name: str, version: int) -> Weights:
    """Read an update that `write_update` wrote.

    Raises:
        WeightSyncError: it is not there, not whole, of another version, or a checksum is wrong; names the file.
    """
    path = directory / name
    if path.parent != directory or name.startswith(".") or name.endswith(_UNFINISHED):
        raise WeightSyncError(f"{name!r} is not the name of an update")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        told, files = manifest["version"], dict(manifest["files"])
        if told != version:
            raise WeightSyncError(f"{path / MANIFEST}: is version {told}, version {version} was announced")
        tensors: dict[str, Tensor] = {}
        for file, checksum in files.items():
            content = (path / Path(file).name).read_bytes()
            _check(content, checksum, str(path / file))
            tensors |= load(content)
    except OSError as error:
        raise WeightSyncError(f"{error.filename or path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightSyncError(f"{path}: {error}") from error
    return Weights(version=version, digest=digest_of(files.values()), tensors=tensors)


class Channel:
    """Sends bytes from the trainer to one server, over a process group of these two."""

    def __init__(self, store: Store, address: ProcessGroupAddress, *, rank: int) -> None:
        """Wait for the other end; RuntimeError after the time limit."""
        prefixed = PrefixStore(address.group, store)
        timeout = timedelta(seconds=address.timeout_seconds)
        self._peer = _SERVER_RANK if rank == _TRAINER_RANK else _TRAINER_RANK
        if address.backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = dist.ProcessGroupNCCL(prefixed, rank, 2, options)
        else:
            self._device = torch.device("cpu")
            self._group = dist.ProcessGroupGloo(prefixed, rank, 2, timeout)

    def send(self, content: Tensor) -> None:
        """Send uint8 content; RuntimeError when the other end is gone."""
        length = torch.tensor([len(content)], device=self._device)
        self._group.send([length], self._peer, 0).wait()
        self._group.send([content.to(self._device)], self._peer, 0).wait()

    def receive(self) -> Tensor:
        """Receive what the other end sends next, on the CPU; RuntimeError when it is gone."""
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._group.recv([length], self._peer, 0).wait()
        content = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        self._group.recv([content], self._peer, 0).wait()
        return content.cpu()


class SendingEnd:
    """The trainer's end of one update through process groups: a store that servers find, and a channel to each."""

    def __init__(self, host: str, *, backend: SyncBackend, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._host = host
        self._backend: SyncBackend = backend
        self._update = uuid.uuid4().hex
        timeout = timedelta(seconds=timeout_seconds)
        self.store = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)

    def address(self, server: int) -> ProcessGroupAddress:
        """What the server with this number is told."""
        return ProcessGroupAddress(
            host=self._host,
            port=self.store.port,
            group=f"{self._update}/{server}",
            backend=self._backend,
            timeout_seconds=self._timeout_seconds,
        )

    def has_joined(self, server: int) -> bool:
        """Whether the server has found the store, so that a channel to it will open."""
        return bool(self.store.check([_joined_key(self.address(server))]))

    def channel(self, server: int) -> Channel:
        """The channel to a server that has joined."""
        return Channel(self.store, self.address(server), rank=_TRAINER_RANK)


def bucket_message(bucket: dict[str, Tensor]) -> tuple[str, list[Tensor]]:
    """A bucket as what `Channel.send` takes, one after the other, and its digest."""
    content = save(bucket)
    checksum = hashlib.sha256(content).hexdigest()
    return checksum, [_as_tensor(json.dumps({"checksum": checksum}).encode()), _as_tensor(content)]


def abort_message(reason: str) -> Tensor:
    """What is sent instead of a further bucket when there will be none."""
    return _as_tensor(json.dumps({"aborted": reason}).encode())


def end_message(digest: str) -> Tensor:
    """What is sent after the last bucket."""
    return _as_tensor(json.dumps({"digest": digest}).encode())


def receive_update(address: ProcessGroupAddress, version: int) -> Weights:
    """Join the trainer's group and take an update.

    Raises:
        WeightSyncError: the trainer is gone or falls silent, a checksum is wrong, or something is missing.
    """
    timeout = timedelta(seconds=address.timeout_seconds)
    tensors: dict[str, Tensor] = {}
    checksums: list[str] = []
    try:
        store = TCPStore(address.host, address.port, is_master=False, timeout=timeout, wait_for_workers=False)
        store.set(_joined_key(address), "")
        channel = Channel(store, address, rank=_SERVER_RANK)
        while True:
            header = json.loads(_as_bytes(channel.receive()))
            if "digest" in header:
                break
            if "aborted" in header:
                raise WeightSyncError(f"the trainer gave up after {len(checksums)} buckets: {header['aborted']}")
            content = _as_bytes(channel.receive())
            _check(content, header["checksum"], f"bucket {len(checksums)}")
            checksums.append(header["checksum"])
            tensors |= load(content)
    except WeightSyncError:
        raise
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightSyncError(f"bucket {len(checksums)}: {error}") from error
    except RuntimeError as error:
        raise WeightSyncError(
            f"the trainer at {address.host}:{address.port} was lost after {len(checksums)} buckets: {error}"
        ) from error
    if digest_of(checksums) != header["digest"]:
        raise WeightSyncError(f"the {len(checksums)} buckets that arrived are not those that were sent")
    return Weights(version=version, digest=header["digest"], tensors=tensors)


def _joined_key(address: ProcessGroupAddress) -> str:
    return f"joined/{address.group}"


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _as_bytes(content: Tensor) -> bytes:
    return content.numpy().tobytes()


def _check(content: bytes, checksum: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != checksum:
        raise WeightSyncError(f"{what}: checksum {found[:12]} is not {checksum[:12]}, with which it was sent")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(directory: Path, *, newest: Path) -> None:
    """Remove updates before the last ones, and what a trainer that died left half written."""
    found = [path for path in directory.glob("version_*") if path.is_dir() and path != newest]
    whole = sorted(
        (path for path in found if not path.name.endswith(_UNFINISHED)), key=lambda path: path.stat().st_mtime
    )
    half = [path for path in found if path.name.endswith(_UNFINISHED)]
    for path in [*half, *whole[: len(whole) - (KEPT_UPDATES - 1)]]:
        shutil.rmtree(path)
