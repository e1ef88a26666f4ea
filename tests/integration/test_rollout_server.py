"""A trainer's client and real servers over loopback: the same samples as in process, and faults that cost nothing."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import soundfile
import torch
from torch import Tensor

from nemo_mapo.config.rollout import RolloutServerConfig, ServingConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.tensors import policy_tensors
from nemo_mapo.rollout.client import ServerRollout
from nemo_mapo.rollout.client_http import RolloutUnavailable
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.testing.rollout_server import RunningServer, tiny_server
from nemo_mapo.testing.tiny import TinyAudioLLM, tiny_audio_llm, tiny_prompt_batch
from nemo_mapo.types import PromptBatch, Rollouts
from tests.integration.serving import MODEL, fit, free_port, served, serving_command, trainer_of
from tests.integration.tiny_run import write_tiny_corpus

pytestmark = pytest.mark.integration

TOKEN = "open sesame"
GROUP = 3
SAMPLING = SamplingConfig(
    temperature=1.2, top_k=30, top_p=0.95, repetition_penalty=1.1, min_new_tokens=2, max_new_tokens=12
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""Requests arrive in any order, so a batch is padded otherwise than in process."""
MAX_REQUEST_MEGABYTES = 1


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def tiny() -> TinyAudioLLM:
    return tiny_audio_llm()


@pytest.fixture(scope="module")
def sync_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def server(sync_dir: Path) -> Iterator[RunningServer]:
    with tiny_server(serving(sync_dir), token=TOKEN) as running:
        yield running


def serving(sync_dir: Path | None = None, **changes: Any) -> ServingConfig:
    return ServingConfig(
        **{
            "port": 0,
            "sync_dir": None if sync_dir is None else str(sync_dir),
            "max_request_megabytes": MAX_REQUEST_MEGABYTES,
            **changes,
        }
    )


def client(
    tiny: TinyAudioLLM, *servers: RunningServer | str, token: str | None = TOKEN, **changes: Any
) -> ServerRollout:
    urls = tuple(one if isinstance(one, str) else one.url for one in servers)
    config = RolloutServerConfig(
        **{
            "urls": urls,
            "weight_sync": "process_group",
            "bucket_megabytes": 0.02,
            "pause_seconds": 0.05,
            "timeout_seconds": 20.0,
            "max_attempts": 4,
            **changes,
        }
    )
    return ServerRollout(config, tiny.tokenizer, sample_rate=16000, token=token)


def named_tensors(tiny: TinyAudioLLM) -> list[tuple[str, Tensor]]:
    return list(policy_tensors(tiny.model))


def other_model() -> TinyAudioLLM:
    return tiny_audio_llm(seed=1)


def seeds(prompts: PromptBatch) -> Tensor:
    return torch.arange(len(prompts) * GROUP) + 2**40


def sampled(backend: Any, prompts: PromptBatch, sampling: SamplingConfig = SAMPLING) -> Rollouts:
    return backend.generate(prompts, sampling, group_size=GROUP, seeds=seeds(prompts))


def in_process(tiny: TinyAudioLLM, prompts: PromptBatch) -> Rollouts:
    return sampled(MegatronRollout(tiny.model, tiny.tokenizer, batch_size=64), prompts)


def assert_same_samples(rollouts: Rollouts, expected: Rollouts) -> None:
    assert torch.equal(rollouts.completions, expected.completions)
    assert torch.equal(rollouts.completion_lengths, expected.completion_lengths)
    assert rollouts.finish_reasons == expected.finish_reasons
    assert rollouts.texts == expected.texts
    torch.testing.assert_close(rollouts.log_probs, expected.log_probs, **TOLERANCE)
    torch.testing.assert_close(rollouts.sampling_log_probs, expected.sampling_log_probs, **TOLERANCE)


def post(server: RunningServer, path: str, body: Any, token: str = TOKEN) -> requests.Response:
    return requests.post(f"{server.url}{path}", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=20)


def get(server: RunningServer, path: str, token: str = TOKEN) -> requests.Response:
    return requests.get(f"{server.url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=20)


def chat(**changes: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "what is the tone ?"}
    return {"model": "policy", "messages": [message], "max_tokens": 6, "seed": 1, **changes}


@contextmanager
def delaying_proxy(server: RunningServer, seconds: float) -> Iterator[str]:
    """A way to the server on which everything arrives `seconds` later."""
    host, port = server.url.removeprefix("http://").split(":")
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


def test_a_server_gives_the_samples_that_the_policy_gives_in_process(tiny: TinyAudioLLM, server: RunningServer) -> None:
    prompts = tiny_prompt_batch(tiny, num_prompts=4, without_audio=(1,))
    remote = client(tiny, server)
    remote.update_weights(3, named_tensors(tiny))
    rollouts = sampled(remote, prompts)
    assert rollouts.weight_version == 3
    assert_same_samples(rollouts, in_process(tiny, prompts))


@pytest.mark.parametrize("weight_sync", ["directory", "process_group"])
def test_after_an_update_the_server_samples_from_the_new_weights(
    tiny: TinyAudioLLM, server: RunningServer, sync_dir: Path, weight_sync: str
) -> None:
    prompts = tiny_prompt_batch(tiny)
    remote = client(tiny, server, weight_sync=weight_sync, sync_dir=str(sync_dir))
    remote.update_weights(1, named_tensors(tiny))
    before = sampled(remote, prompts)
    other = other_model()
    remote.update_weights(2, named_tensors(other))
    after = sampled(remote, prompts)
    assert (before.weight_version, after.weight_version) == (1, 2)
    assert_same_samples(after, in_process(other, prompts))
    assert not torch.equal(before.completions, after.completions)


def test_completions_of_other_weights_than_those_asked_for_are_refused(
    tiny: TinyAudioLLM, server: RunningServer
) -> None:
    mine = client(tiny, server)
    mine.update_weights(7, named_tensors(tiny))
    # Another run takes the server over, with the same version number.
    client(tiny, server).update_weights(7, named_tensors(other_model()))
    with pytest.raises(RolloutUnavailable, match="status 409"):
        sampled(mine, tiny_prompt_batch(tiny))


def test_a_server_that_lost_the_weights_gets_them_again_from_the_directory(
    tiny: TinyAudioLLM, server: RunningServer, sync_dir: Path, tmp_path: Path
) -> None:
    prompts = tiny_prompt_batch(tiny)
    mine = client(tiny, server, weight_sync="directory", sync_dir=str(sync_dir))
    mine.update_weights(7, named_tensors(tiny))
    client(tiny, server).update_weights(8, named_tensors(other_model()))
    assert_same_samples(sampled(mine, prompts), in_process(tiny, prompts))


def corrupt(update: Path) -> None:
    path = update / "bucket_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_short(update: Path) -> None:
    path = update / "bucket_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def without_a_file(update: Path) -> None:
    (update / "bucket_00001.safetensors").unlink()


def without_a_tensor(update: Path) -> None:
    manifest = json.loads((update / "manifest.json").read_text())
    del manifest["files"]["bucket_00001.safetensors"]
    (update / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (corrupt, "bucket_00001.safetensors: checksum"),
        (cut_short, "bucket_00001.safetensors: checksum"),
        (without_a_file, "bucket_00001.safetensors: No such file"),
        (without_a_tensor, "the update lacks"),
    ],
)
def test_a_damaged_update_is_refused_and_the_old_weights_serve_on(
    tiny: TinyAudioLLM, server: RunningServer, sync_dir: Path, damage: Callable[[Path], None], reason: str
) -> None:
    prompts = tiny_prompt_batch(tiny)
    remote = client(tiny, server, weight_sync="directory", sync_dir=str(sync_dir))
    remote.update_weights(4, named_tensors(tiny))
    remote.sender.send(5, named_tensors(other_model()))
    update = max(sync_dir.glob("version_00000005_*"), key=lambda path: path.stat().st_mtime)
    remote.update_weights(4, named_tensors(tiny))
    damage(update)
    answer = post(server, "/v1/weights", {"version": 5, "directory": update.name})
    assert answer.status_code == 422
    assert "version 5" in answer.text and reason in answer.text
    assert get(server, "/v1/weights").json()["version"] == 4
    assert_same_samples(sampled(remote, prompts), in_process(tiny, prompts))


def test_an_update_that_the_trainer_breaks_off_leaves_the_old_weights(
    tiny: TinyAudioLLM, server: RunningServer
) -> None:
    prompts = tiny_prompt_batch(tiny)
    remote = client(tiny, server)
    remote.update_weights(4, named_tensors(tiny))

    def half() -> Iterator[tuple[str, Tensor]]:
        tensors = named_tensors(other_model())
        yield from tensors[: len(tensors) // 2]
        raise FloatingPointError("the trainer found a NaN")

    with pytest.raises(FloatingPointError):
        remote.update_weights(5, half())
    assert get(server, "/v1/weights").json()["version"] == 4
    assert_same_samples(sampled(remote, prompts), in_process(tiny, prompts))


def test_weights_of_another_model_are_refused_by_name(tiny: TinyAudioLLM, server: RunningServer) -> None:
    tensors = named_tensors(tiny)
    name = tensors[3][0]
    tensors[3] = (name, tensors[3][1][..., :-1])
    with pytest.raises(RolloutUnavailable, match=f"(?s){server.url} did not take version 9: .*{name} is torch.float32"):
        client(tiny, server).update_weights(9, tensors)


def test_a_server_killed_while_it_generates_loses_nothing(tiny: TinyAudioLLM, server: RunningServer) -> None:
    prompts = tiny_prompt_batch(tiny, num_prompts=4)
    with tiny_server(serving(), token=TOKEN, slow_seconds=60.0) as dying:
        remote = client(tiny, dying, server)
        remote.update_weights(1, named_tensors(tiny))
        killer = threading.Timer(1.0, dying.process.kill)
        killer.start()
        rollouts = sampled(remote, prompts)
        killer.join()
        assert not dying.process.is_alive()
    assert_same_samples(rollouts, in_process(tiny, prompts))


def test_without_a_server_left_there_are_no_completions_but_an_error_that_names_it(tiny: TinyAudioLLM) -> None:
    with tiny_server(serving(), token=TOKEN, slow_seconds=60.0) as dying:
        remote = client(tiny, dying)
        remote.update_weights(1, named_tensors(tiny))
        threading.Timer(0.5, dying.process.kill).start()
        with pytest.raises(RolloutUnavailable, match=f"no completions of version 1 within 4 attempts: {dying.url}: "):
            sampled(remote, tiny_prompt_batch(tiny))
        with pytest.raises(RolloutUnavailable, match=dying.url):
            remote.update_weights(2, named_tensors(tiny))


def test_a_server_killed_in_the_middle_of_an_update_is_done_without(tiny: TinyAudioLLM, server: RunningServer) -> None:
    prompts = tiny_prompt_batch(tiny)
    other = other_model()
    with tiny_server(serving(), token=TOKEN) as dying:
        remote = client(tiny, dying, server)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            everything = named_tensors(other)
            yield from everything[: len(everything) // 2]
            dying.process.kill()
            dying.process.join()
            yield from everything[len(everything) // 2 :]

        remote.update_weights(2, tensors())
        assert_same_samples(sampled(remote, prompts), in_process(other, prompts))
        alone = client(tiny, server)
        alone.servers[0].url = dying.url
        with pytest.raises(RolloutUnavailable, match=dying.url):
            alone.update_weights(3, named_tensors(tiny))


def test_a_delay_of_two_seconds_changes_nothing(tiny: TinyAudioLLM, server: RunningServer) -> None:
    prompts = tiny_prompt_batch(tiny)
    client(tiny, server).update_weights(1, named_tensors(tiny))
    with delaying_proxy(server, 2.0) as url:
        remote = client(tiny, url)
        remote.update_weights(1, named_tensors(tiny))
        started = time.monotonic()
        rollouts = sampled(remote, prompts)
        assert time.monotonic() - started > 2
        assert_same_samples(rollouts, in_process(tiny, prompts))
        impatient = RolloutServerConfig(
            urls=(url,), timeout_seconds=0.5, max_attempts=2, pause_seconds=0.01, sync_dir="x"
        )
        with pytest.raises(RolloutUnavailable, match="timed out"):
            ServerRollout(impatient, tiny.tokenizer, sample_rate=16000, token=TOKEN)


def test_a_server_that_drains_ends_what_is_under_way_and_takes_nothing_more(tiny: TinyAudioLLM) -> None:
    with tiny_server(serving(), slow_seconds=1.0) as draining, ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(post, draining, "/v1/chat/completions", chat())
        time.sleep(0.4)
        draining.process.terminate()
        assert under_way.result().status_code == 200
        draining.process.join(timeout=10)
        assert draining.process.exitcode == 0
        with pytest.raises(requests.ConnectionError):
            get(draining, "/health")


def test_a_server_without_weights_serves_nothing_before_the_first_update(tiny: TinyAudioLLM) -> None:
    prompts = tiny_prompt_batch(tiny)
    with tiny_server(serving(), with_weights=False, model_seed=5) as fresh:
        answer = post(fresh, "/v1/chat/completions", chat())
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert get(fresh, "/health").status_code == 503
        remote = client(tiny, fresh, token=None)
        remote.update_weights(0, named_tensors(tiny))
        assert get(fresh, "/health").status_code == 200
        assert_same_samples(sampled(remote, prompts), in_process(tiny, prompts))


def test_a_wrong_token_opens_nothing_but_health(tiny: TinyAudioLLM, server: RunningServer) -> None:
    for answer in (
        get(server, "/v1/models", "wrong"),
        get(server, "/v1/weights", "wrong"),
        get(server, "/metrics", "wrong"),
        post(server, "/v1/weights", {"version": 1, "directory": "x"}, "wrong"),
        post(server, "/v1/chat/completions", chat(), "wrong"),
        requests.post(f"{server.url}/v1/chat/completions", json=chat(), timeout=20),
    ):
        assert answer.status_code == 401
    assert requests.get(f"{server.url}/health", timeout=20).status_code == 200
    with pytest.raises(ValueError, match=r"status 401.*NEMO_MAPO_ROLLOUT_TOKEN \(rollout.server.token_variable\)"):
        client(tiny, server, token="wrong")


def test_an_oversized_request_is_refused_without_reading_it_all(server: RunningServer) -> None:
    answer = post(server, "/v1/chat/completions", chat(user="x" * (MAX_REQUEST_MEGABYTES * 2**20)))
    assert answer.status_code == 413


def test_models_and_metrics_are_served(tiny: TinyAudioLLM, server: RunningServer) -> None:
    client(tiny, server).update_weights(11, named_tensors(tiny))
    before = post(server, "/v1/chat/completions", chat()).json()["usage"]["completion_tokens"]
    assert before > 0
    (model,) = get(server, "/v1/models").json()["data"]
    assert model["id"] == "policy"
    assert model["nemo_mapo"] == {"audio": True, "log_probs": True, "max_length": tiny.model.max_positions}
    metrics = get(server, "/metrics").text
    assert "nemo_mapo_weight_version 11\n" in metrics
    assert 'nemo_mapo_requests_total{path="/v1/chat/completions",status="200"}' in metrics


@pytest.mark.parametrize(("container", "subtype"), [("wav", "PCM_16"), ("flac", "PCM_16")])
def test_an_openai_client_can_send_audio_and_gets_n_completions_with_log_probs(
    tiny: TinyAudioLLM, server: RunningServer, container: str, subtype: str
) -> None:
    client(tiny, server).update_weights(1, named_tensors(tiny))
    file = io.BytesIO()
    soundfile.write(file, torch.linspace(-0.5, 0.5, 8000).numpy(), 16000, format=container.upper(), subtype=subtype)
    clip = {"data": base64.b64encode(file.getvalue()).decode(), "format": container}
    content = [{"type": "input_audio", "input_audio": clip}, {"type": "text", "text": "which tone is the first ?"}]
    body = chat(messages=[{"role": "user", "content": content}], n=2, logprobs=True)
    answer = post(server, "/v1/chat/completions", body).json()
    assert answer == post(server, "/v1/chat/completions", body).json() | {
        "id": answer["id"],
        "created": answer["created"],
    }
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    tokens = [choice["logprobs"]["content"] for choice in answer["choices"]]
    assert sum(map(len, tokens)) == answer["usage"]["completion_tokens"]
    assert all(token["logprob"] <= 0 for choice in tokens for token in choice)


def test_a_run_whose_server_is_killed_saves_and_stops_and_ends_as_the_run_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_tiny_corpus(tmp_path / "synthetic")
    in_one_process = trainer_of(corpus, tmp_path / "megatron")
    assert fit(in_one_process)

    port = free_port()
    overrides = served(port, tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    with serving_command(corpus / "tokenizer", tmp_path / "weights", port, *MODEL) as server:
        failing = trainer_of(corpus, tmp_path / "served", *overrides)

        generate = failing.actor.rollout.generate

        def generate_until_killed(*args: Any, **kwargs: Any) -> Rollouts:
            if failing.step == 2:
                server.kill()
                server.wait()
            return generate(*args, **kwargs)

        monkeypatch.setattr(failing.actor.rollout, "generate", generate_until_killed)
        with pytest.raises(RolloutUnavailable, match=f"http://127.0.0.1:{port}: "):
            fit(failing)
    saved = failing.checkpoints.latest()
    assert saved is not None and saved.state["step"] == failing.step == 2

    with serving_command(corpus / "tokenizer", tmp_path / "weights", port, *MODEL):
        resumed = trainer_of(corpus, tmp_path / "served", *overrides)
        resumed.resume(saved)
        assert fit(resumed)
    pairs = zip(in_one_process.actor.policy.parameters(), resumed.actor.policy.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
