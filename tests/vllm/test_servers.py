"""A trainer's client and real vLLM servers over loopback: seeds, failover, and faults that end clearly."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.protocol import RolloutUnavailable
from nemo_mapo.rollout.vllm import process as process_module
from nemo_mapo.rollout.vllm import server as server_module
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.rollout.vllm.build import build_vllm
from nemo_mapo.rollout.vllm.process import free_port
from nemo_mapo.rollout.vllm.server import VllmServer
from nemo_mapo.rollout.vllm.weights import WeightsError, check_update
from nemo_mapo.rows import Completion, Prompt
from tests.vllm.serving import (
    EMBEDDED,
    SAMPLE_RATE,
    TOKENIZER,
    embedded_policy,
    heard_prompt,
    launched,
    named_tensors,
    noise_prompts,
    rollout_config,
)

pytestmark = pytest.mark.vllm

SAMPLING = SamplingConfig(temperature=1.2, top_k=30, top_p=0.95, min_new_tokens=2, max_new_tokens=12)
GROUP = 3


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def start(policy: AudioLLM) -> AudioLLM:
    policy.load_state_dict(embedded_policy(0).state_dict())
    return policy


@pytest.fixture
def prompts(start: AudioLLM) -> list[Prompt]:
    return noise_prompts(start, 4)


def url_of(backend: VllmRollout) -> str:
    return backend.fleet.servers[0].url


def client(
    backend: VllmRollout, policy: AudioLLM, sync_dir: Path, monkeypatch: pytest.MonkeyPatch, *urls: str, **changes: Any
) -> VllmRollout:
    """Another trainer of that backend's server, or of the servers at `urls`."""
    process = backend.fleet._process
    assert process is not None
    monkeypatch.setenv("VLLM_API_KEY", process.key)
    config = rollout_config(sync_dir, urls=urls or (url_of(backend),), **changes)
    return build_vllm(config, EMBEDDED, policy, TOKENIZER, sample_rate=SAMPLE_RATE, directory=sync_dir)


def sampled(backend: VllmRollout, prompts: list[Prompt], seeds: torch.Tensor | None = None) -> list[Completion]:
    if seeds is None:
        seeds = torch.arange(len(prompts) * GROUP) + 2**40
    return [one for group in backend.generate(prompts, SAMPLING, group_size=GROUP, seeds=seeds) for one in group]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [one.token_ids.tolist() for one in completions]


@contextmanager
def delaying_proxy(url: str, seconds: float) -> Iterator[str]:
    """A way to the server on which every answer arrives `seconds` later."""
    host, port = url.removeprefix("http://").split(":")
    listening = socket.create_server(("127.0.0.1", 0))

    def forward(source: socket.socket, target: socket.socket, wait: float) -> None:
        try:
            while data := source.recv(65536):
                time.sleep(wait)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return
            far = socket.create_connection((host, int(port)))
            threading.Thread(target=forward, args=(near, far, 0.0), daemon=True).start()
            threading.Thread(target=forward, args=(far, near, seconds), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def test_a_completion_comes_from_its_own_seed(shared: VllmRollout, start: AudioLLM, prompts: list[Prompt]) -> None:
    shared.update_weights(1, named_tensors(start))
    first = sampled(shared, prompts)
    assert tokens(first) == tokens(sampled(shared, prompts))
    # Seeds that do not follow each other are asked for one by one.
    order = torch.tensor([2, 0, 1])
    seeds = (torch.arange(len(prompts) * GROUP) + 2**40).view(-1, GROUP)[:, order].flatten()
    shuffled = sampled(shared, prompts, seeds)
    rows = (torch.arange(len(prompts))[:, None] * GROUP + order).flatten()
    assert [one.text for one in shuffled] == [first[row].text for row in rows.tolist()]
    assert len({one.text for one in first}) > len(prompts)


def test_a_prompt_is_sent_once_for_its_group(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.update_weights(1, named_tensors(start))
    http, sent = shared.fleet.servers[0].http, []
    post = http.post

    def counted(path: str, *args: Any, **query: str) -> Any:
        sent.append(path)
        return post(path, *args, **query)

    monkeypatch.setattr(http, "post", counted)
    assert len(sampled(shared, prompts)) == len(prompts) * GROUP
    assert sent == ["/v1/completions"] * len(prompts)


def test_every_clip_is_heard_by_its_own_prompt(shared: VllmRollout, start: AudioLLM, prompts: list[Prompt]) -> None:
    shared.update_weights(1, named_tensors(start))
    before = sampled(shared, prompts)
    other = replace(prompts[1], clips=(prompts[1].clips[0] * -0.1,))
    after = sampled(shared, [prompts[0], other, *prompts[2:]])
    heard = [one.text != other.text for one, other in zip(before, after, strict=True)]
    assert any(heard[GROUP : 2 * GROUP]) and not any(heard[:GROUP] + heard[2 * GROUP :])


def test_a_server_that_someone_else_updated_is_brought_up_to_date(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = client(shared, start, tmp_path, monkeypatch)
    mine.update_weights(7, named_tensors(start))
    expected = sampled(mine, prompts)
    other = embedded_policy(1)
    client(shared, other, tmp_path / "other", monkeypatch).update_weights(7, named_tensors(other))
    again = sampled(mine, prompts)
    assert again[0].weight_version == 7 and tokens(again) == tokens(expected)
    # As after a restart.
    mine.fleet.servers[0].name("default")
    assert tokens(sampled(mine, prompts)) == tokens(expected)


def test_an_update_in_the_middle_of_a_request_does_not_pass(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = client(shared, start, tmp_path, monkeypatch, max_attempts=1)
    mine.update_weights(3, named_tensors(start))
    server = mine.fleet.servers[0]
    post = server.http.post

    def updated_meanwhile(path: str, *args: Any, **query: str) -> Any:
        answer = post(path, *args, **query)
        if path == "/v1/completions":
            server.name("another")
        return answer

    monkeypatch.setattr(server.http, "post", updated_meanwhile)
    with pytest.raises(RolloutUnavailable, match="it has weights 'another', asked for were"):
        sampled(mine, prompts)


def test_a_directory_that_lacks_a_tensor_is_refused_and_nothing_is_changed(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = client(shared, start, tmp_path, monkeypatch, bucket_megabytes=1.0)
    mine.update_weights(1, named_tensors(start))
    before = mine.fleet.servers[0].weight_version()
    write = server_module.check_update

    def damaged(update: Path) -> None:
        (update / "model-00001.safetensors").unlink()
        write(update)

    with monkeypatch.context() as patched:
        patched.setattr(server_module, "check_update", damaged)
        with pytest.raises(RolloutUnavailable, match=r"took version 2 .*model-00001.safetensors"):
            mine.update_weights(2, named_tensors(start))
    assert mine.fleet.servers[0].weight_version() == before
    with pytest.raises(ValueError, match="no weights from here yet"):
        sampled(mine, prompts)


def test_a_reload_that_half_fails_is_noticed_by_the_probe(
    shared: VllmRollout, start: AudioLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = client(shared, start, tmp_path, monkeypatch, bucket_megabytes=1.0)
    mine.update_weights(1, named_tensors(start))

    def lost_on_the_way(update: Path) -> None:
        check_update(update)
        (update / "model-00001.safetensors").unlink()

    with monkeypatch.context() as patched:
        patched.setattr(server_module, "check_update", lost_on_the_way)
        start.load_state_dict(embedded_policy(2).state_dict())
        with pytest.raises(RolloutUnavailable, match=r"log-probs of the probe differ|not finite|did not take"):
            mine.update_weights(2, named_tensors(start))
    assert "unfinished" in mine.fleet.servers[0].weight_version()
    mine.update_weights(3, named_tensors(start))


def test_a_trainer_killed_in_the_middle_of_an_update_leaves_a_server_that_the_next_one_updates(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.update_weights(1, named_tensors(start))
    expected = sampled(shared, prompts)

    class Killed(BaseException):
        """Not an error that anything answers."""

    def killed(server: VllmServer) -> None:
        raise Killed

    mine = client(shared, start, tmp_path / "killed", monkeypatch)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(VllmServer, "end_update", killed)
        mine.update_weights(2, named_tensors(start))
    assert "unfinished" in mine.fleet.servers[0].weight_version()
    # Paused, and with weights that are nobody's.
    restarted = client(shared, start, tmp_path / "restarted", monkeypatch)
    restarted.update_weights(2, named_tensors(start))
    assert tokens(sampled(restarted, prompts)) == tokens(expected)


def test_weights_other_than_the_policys_are_noticed_by_the_probe(shared: VllmRollout, start: AudioLLM) -> None:
    with pytest.raises(RolloutUnavailable, match="log-probs of the probe differ from the policy's by"):
        shared.update_weights(5, named_tensors(embedded_policy(3)))
    shared.update_weights(6, named_tensors(start))


def test_an_update_that_cannot_be_written_leaves_the_next_one_whole(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = client(shared, start, tmp_path, monkeypatch)
    (tmp_path / "weights").write_text("in the way")
    with pytest.raises(RolloutUnavailable, match="version 1 cannot be written"):
        mine.update_weights(1, named_tensors(start))
    (tmp_path / "weights").unlink()
    mine.update_weights(2, named_tensors(start))
    assert sampled(mine, prompts)[0].weight_version == 2


def test_a_delay_of_two_seconds_changes_nothing(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.update_weights(1, named_tensors(start))
    expected = sampled(shared, prompts)
    with delaying_proxy(url_of(shared), 2.0) as url:
        slow = client(shared, start, tmp_path, monkeypatch, url)
        slow.update_weights(1, named_tensors(start))
        assert tokens(sampled(slow, prompts)) == tokens(expected)
        with pytest.raises(RolloutUnavailable, match=r"no complete answer within 0\.5 s"):
            client(shared, start, tmp_path, monkeypatch, url, timeout_seconds=0.5, max_attempts=2)


def test_a_wrong_key_is_refused_at_once(
    shared: VllmRollout, start: AudioLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rollout_config(tmp_path, urls=(url_of(shared),))
    for key in ("wrong", ""):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(ValueError, match=r"status 401.*VLLM_API_KEY \(rollout.vllm.api_key_variable\)"):
            build_vllm(config, EMBEDDED, start, TOKENIZER, sample_rate=SAMPLE_RATE, directory=tmp_path)


def test_a_vllm_of_an_unsupported_version_is_refused_at_once(
    shared: VllmRollout, start: AudioLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "OLDEST", (0, 99))
    monkeypatch.setattr(server_module, "TOO_NEW", (1, 0))
    with pytest.raises(ValueError, match=r"is vLLM 0\.32.*; supported are 0\.99 and later releases before 1\.0"):
        client(shared, start, tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_only_server_killed_while_it_generates_ends_clearly_and_another_goes_on(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.update_weights(1, named_tensors(start))
    expected = sampled(shared, prompts)
    dead = f"http://127.0.0.1:{free_port()}"
    both = client(shared, start, tmp_path, monkeypatch, dead, url_of(shared))
    both.update_weights(2, named_tensors(start))
    assert tokens(sampled(both, prompts)) == tokens(expected)
    with launched(start, tmp_path / "dying") as dying:
        dying.update_weights(1, named_tensors(start))
        process = dying.fleet._process
        assert process is not None
        pending = dying.begin(
            prompts,
            replace(SAMPLING, min_new_tokens=300, max_new_tokens=300),
            group_size=16,
            seeds=torch.arange(len(prompts) * 16),
        )
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGKILL)
        with pytest.raises(RolloutUnavailable, match=r"vLLM ended with status -9|Connection refused"):
            pending.result()
        with pytest.raises(RolloutUnavailable, match="vLLM ended with status -9"):
            dying.update_weights(2, named_tensors(start))


def test_an_interpreter_without_vllm_is_named(start: AudioLLM, tmp_path: Path) -> None:
    config = rollout_config(tmp_path, python=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"rollout.vllm.python=.*nowhere: No such file.*make vllm"):
        build_vllm(config, EMBEDDED, start, TOKENIZER, sample_rate=SAMPLE_RATE, directory=tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path, start: AudioLLM) -> None:
    with pytest.raises(WeightsError, match=r"names.json"):
        check_update(tmp_path)


def test_many_long_prompts_with_seeds_are_read_whole(shared: VllmRollout, start: AudioLLM) -> None:
    shared.update_weights(1, named_tensors(start))
    clips = torch.randn(48, 4 * SAMPLE_RATE) * 0.3
    long = [heard_prompt(start, number, clip, list(range(20, 60))) for number, clip in enumerate(clips)]
    assert sum(map(len, long)) * GROUP > 4096, "more than one pass reads"
    assert len(sampled(shared, long)) == len(long) * GROUP


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_an_update_is_left_out_and_another_goes_on(
    shared: VllmRollout, start: AudioLLM, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.update_weights(1, named_tensors(start))
    expected = sampled(shared, prompts)
    assert shared.fleet._process is not None
    key = shared.fleet._process.key
    monkeypatch.setattr(process_module.secrets, "token_hex", lambda _: key)
    with launched(start, tmp_path / "dying") as dying:
        process = dying.fleet._process
        assert process is not None
        both = client(shared, start, tmp_path, monkeypatch, url_of(dying), url_of(shared))
        begin = VllmServer.begin_update

        def begin_and_kill(server: VllmServer, version: str) -> None:
            begin(server, version)
            if server.url == url_of(dying):
                os.killpg(process.pid, signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(VllmServer, "begin_update", begin_and_kill)
            both.update_weights(2, named_tensors(start))
        assert both.fleet.usable == {1}
        assert tokens(sampled(both, prompts)) == tokens(expected)
        with pytest.raises(RolloutUnavailable, match="vLLM ended with status -9"):
            dying.update_weights(2, named_tensors(start))
