"""The engine behind the server, and what a request has to be, without HTTP."""

import base64
import io
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from jaxtyping import Int
from pydantic import ValidationError
from torch import Tensor

from nemo_mapo.config.rollout import RolloutServerConfig, ServingConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.server.chat import ChatRequest, PromptReader
from nemo_mapo.rollout.server.engine import (
    EngineFull,
    Job,
    NotServing,
    OtherVersion,
    RolloutEngine,
    TooLate,
    WeightId,
)
from nemo_mapo.rollout.server.policy import ServedPolicy
from nemo_mapo.rollout.server.run import serve
from nemo_mapo.rollout.weight_sync import Weights
from nemo_mapo.testing.tiny import SAMPLE_RATE, TinyAudioLLM, tiny_audio_llm
from nemo_mapo.types import PromptBatch, Rollouts

START = WeightId(version=0, digest="start")
SHORT = SamplingConfig(max_new_tokens=5)
BATCH_SIZE = 8


class Gated(ServedPolicy):
    """Waits at a gate before each batch, and notes how many completions each had."""

    def __init__(self, rollout: MegatronRollout) -> None:
        super().__init__(rollout)
        self.gate = threading.Event()
        self.batches: list[int] = []
        self.breaks_in_the_middle = False

    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> Rollouts:
        assert self.gate.wait(10)
        self.batches.append(len(seeds))
        return super().generate(prompts, sampling, group_size=group_size, seeds=seeds)

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self.breaks_in_the_middle:
            raise RuntimeError("device lost")
        super().update_weights(version, tensors)


@pytest.fixture(scope="module")
def tiny() -> TinyAudioLLM:
    return tiny_audio_llm()


@pytest.fixture
def policy(tiny: TinyAudioLLM) -> Gated:
    return Gated(MegatronRollout(tiny.model, tiny.tokenizer, batch_size=BATCH_SIZE))


@pytest.fixture
def engine(policy: Gated) -> Iterator[RolloutEngine]:
    made = RolloutEngine(
        policy, pad_id=policy.rollout.pad_id, batch_size=BATCH_SIZE, max_waiting=20, batching_seconds=0.0, weights=START
    )
    yield made
    policy.gate.set()
    made.stop()


@pytest.fixture
def reader(tiny: TinyAudioLLM) -> PromptReader:
    return PromptReader(
        tokenizer=tiny.tokenizer,
        audio_tokens=tiny.model.num_audio_tokens,
        sample_rate=SAMPLE_RATE,
        max_length=tiny.model.max_positions,
        max_group=BATCH_SIZE,
    )


def job(*seeds: int, sampling: SamplingConfig = SHORT, weights: WeightId | None = None, seconds: float = 60.0) -> Job:
    return Job(
        token_ids=(3, 12, 13, 14, 4),
        waveform=None,
        sampling=sampling,
        seeds=seeds,
        weights=weights,
        deadline=time.monotonic() + seconds,
    )


def weights_of(tiny: TinyAudioLLM, version: int) -> Weights:
    tensors = {name: value for name, value in tiny.model.state_dict().items() if isinstance(value, Tensor)}
    return Weights(version=version, digest=f"digest {version}", tensors=tensors)


def started(engine: RolloutEngine, first: Job) -> Any:
    """Submit a job and return when the engine has taken it up, so that what follows waits."""
    done = engine.submit(first)
    while engine.waiting:
        time.sleep(0.001)
    return done


def test_jobs_that_draw_alike_share_a_batch(engine: RolloutEngine, policy: Gated) -> None:
    first = started(engine, job(1))
    hot = SamplingConfig(temperature=2.0, max_new_tokens=5)
    pairs = [job(2, 3), job(4, sampling=hot), job(5, 6), job(7, 8), job(9, 10), job(11, 12)]
    waiting = [engine.submit(one) for one in pairs]
    policy.gate.set()
    assert [len(done.result(30)) for done in (first, *waiting)] == [1, 2, 1, 2, 2, 2, 2]
    assert policy.batches == [1, 8, 1, 2]


def test_a_job_gets_the_completions_of_its_own_seeds(engine: RolloutEngine, policy: Gated) -> None:
    policy.gate.set()
    alone = engine.submit(job(21, 22)).result(30)
    together = [engine.submit(job(seed, seed + 1)) for seed in (20, 21, 22)]
    assert [one.token_ids for one in together[1].result(30)] == [one.token_ids for one in alone]
    assert together[0].result(30)[1].token_ids == alone[0].token_ids
    assert alone[0].weights == START


def test_more_than_may_wait_is_turned_away(engine: RolloutEngine) -> None:
    started(engine, job(1))
    engine.submit(job(*range(8)))
    engine.submit(job(*range(8)))
    with pytest.raises(EngineFull, match="16 completions are waiting"):
        engine.submit(job(*range(8)))


def test_a_job_for_other_weights_is_not_done(engine: RolloutEngine, policy: Gated) -> None:
    policy.gate.set()
    engine.submit(job(1, weights=START)).result(30)
    for other in (WeightId(version=1, digest="start"), WeightId(version=0, digest="other")):
        with pytest.raises(OtherVersion, match="version 0"):
            engine.submit(job(1, weights=other)).result(30)


def test_a_job_whose_time_is_up_is_not_done(engine: RolloutEngine, policy: Gated) -> None:
    first = started(engine, job(1))
    late = engine.submit(job(2, seconds=0.0))
    policy.gate.set()
    first.result(30)
    with pytest.raises(TooLate):
        late.result(30)
    assert policy.batches == [1]


def test_weights_change_between_batches_in_the_order_of_arrival(
    engine: RolloutEngine, policy: Gated, tiny: TinyAudioLLM
) -> None:
    first = started(engine, job(1))
    before = engine.submit(job(2))
    change = engine.change_weights(weights_of(tiny, 5))
    after = engine.submit(job(3))
    policy.gate.set()
    assert change.result(30) == WeightId(version=5, digest="digest 5")
    versions = [done.result(30)[0].weights.version for done in (first, before, after)]
    assert versions == [0, 0, 5]
    assert policy.batches == [1, 1, 1]


def test_a_change_that_does_not_fit_leaves_the_old_weights(
    engine: RolloutEngine, policy: Gated, tiny: TinyAudioLLM
) -> None:
    policy.gate.set()
    before = engine.submit(job(1)).result(30)
    broken = weights_of(tiny, 5)
    name, value = broken.tensors.popitem()
    with pytest.raises(ValueError, match=f"the update lacks 1 tensors of the served model, among them {name}"):
        engine.change_weights(broken).result(30)
    broken.tensors[name] = value.double()
    with pytest.raises(ValueError, match=f"{name} is torch.float64"):
        engine.change_weights(broken).result(30)
    after = engine.submit(job(1)).result(30)
    assert after == before
    assert engine.updates == {"taken": 0, "failed": 2}


def test_after_a_change_that_broke_in_the_middle_nothing_is_served_until_a_whole_one(
    engine: RolloutEngine, policy: Gated, tiny: TinyAudioLLM
) -> None:
    policy.gate.set()
    policy.breaks_in_the_middle = True
    with pytest.raises(RuntimeError, match="device lost"):
        engine.change_weights(weights_of(tiny, 5)).result(30)
    assert engine.state == "no weights"
    with pytest.raises(NotServing):
        engine.submit(job(1))
    policy.breaks_in_the_middle = False
    engine.change_weights(weights_of(tiny, 6)).result(30)
    assert engine.submit(job(1)).result(30)[0].weights.version == 6


def test_a_batch_that_fails_fails_for_those_who_asked_only(engine: RolloutEngine, policy: Gated) -> None:
    policy.gate.set()
    too_long = SamplingConfig(max_new_tokens=1000)
    with pytest.raises(ValueError, match="max_new_tokens=1000 exceed"):
        engine.submit(job(1, sampling=too_long)).result(30)
    assert len(engine.submit(job(1)).result(30)) == 1


def test_a_stopped_engine_says_so_to_those_who_wait(engine: RolloutEngine, policy: Gated) -> None:
    first = started(engine, job(1))
    waiting = engine.submit(job(2))
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while engine.state != "stopped":
        time.sleep(0.001)
    policy.gate.set()
    stopping.join()
    assert len(first.result(30)) == 1
    with pytest.raises(NotServing, match="stopped"):
        waiting.result(30)
    with pytest.raises(NotServing, match="stopped"):
        engine.submit(job(3))


def request(content: Any = "what is the tone ?", **changes: Any) -> ChatRequest:
    message = {"role": "user", "content": content}
    return ChatRequest.model_validate({"model": "policy", "messages": [message], "max_tokens": 5, **changes})


def clip(samples: int = 8000, rate: int = SAMPLE_RATE, channels: int = 1, format: str = "wav") -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(
        file, np.full((samples, channels), [0.25] * channels), rate, format=format.upper(), subtype="PCM_16"
    )
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": format}}


def test_a_text_becomes_the_prompt_of_training(reader: PromptReader, tiny: TinyAudioLLM) -> None:
    made = reader.job(request(), deadline=0.0)
    assert tiny.tokenizer.decode(made.token_ids) == "<|user|> what is the tone ? <|assistant|>"
    assert made.waveform is None and made.sampling.max_new_tokens == 5


def test_a_clip_becomes_placeholders_and_its_channels_are_averaged(reader: PromptReader, tiny: TinyAudioLLM) -> None:
    made = reader.job(request([clip(channels=2), {"type": "text", "text": "what ?"}]), deadline=0.0)
    assert made.waveform is not None and torch.equal(made.waveform, torch.full((8000,), 0.25))
    assert made.token_ids.count(tiny.token_id("<|audio|>")) == tiny.model.num_audio_tokens(8000)


def test_seeds_follow_from_one_or_are_given_or_drawn(reader: PromptReader) -> None:
    assert request(n=3, seed=7).seeds() == (7, 8, 9)
    assert request(n=2, nemo_mapo={"seeds": [5, -1]}).seeds() == (5, -1)
    assert request(n=2).seeds() != request(n=2).seeds()


@pytest.mark.parametrize(
    ("content", "changes", "reason"),
    [
        ([clip(), clip()], {}, "one clip at most, not 2"),
        ([clip(rate=8000)], {}, "input_audio has 8000 Hz; resample it to 16000 Hz"),
        ([clip(samples=16000 * 60)], {}, "longer than the model can read"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], {}, "no wav file in base64"),
        ([{"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}], {}, "no wav file in base64"),
        ("what ?", {"max_tokens": 1000}, "is longer than the model's"),
        ("what ?", {"n": 9}, "n=9 is more than the 8 completions"),
        ("what ?", {"n": 2, "nemo_mapo": {"seeds": [1]}}, r"nemo_mapo.seeds must be 2 \(n\)"),
        ("what ?", {"seed": 1, "nemo_mapo": {"seeds": [1]}}, "seed must not be given"),
        ("what ?", {"n": 2, "seed": 2**63 - 1}, "does not fit 64 bits"),
        ("what ?", {"nemo_mapo": {"prompt_token_ids": [3, 4]}}, "has no text part"),
        ([], {"nemo_mapo": {"prompt_token_ids": [3, 10_000]}}, "must be ids from 0 to"),
        ([], {"nemo_mapo": {"prompt_token_ids": []}}, "at least one"),
        ([clip()], {"nemo_mapo": {"prompt_token_ids": [3, 4]}}, "has 0 audio placeholders, the clip takes"),
        ("what ?", {"nemo_mapo": {"weight_version": 1}}, "go together"),
        ("what ?", {"temperature": -1.0}, "temperature"),
        ("<|audio|>", {}, "stand for"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(
    reader: PromptReader, content: Any, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        reader.job(request(content, **changes), deadline=0.0)


@pytest.mark.parametrize(
    "changes",
    [{"stream": True}, {"tools": []}, {"top_logprobs": 3}, {"presence_penalty": 1.0}, {"n": 0}, {"seed": 2**63}],
)
def test_what_is_not_served_is_refused_and_not_ignored(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(**changes)


def test_beyond_this_machine_a_token_is_needed(policy: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_MAPO_ROLLOUT_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"serving.host=0.0.0.0 .* NEMO_MAPO_ROLLOUT_TOKEN"):
        serve(policy, ServingConfig(host="0.0.0.0"), sample_rate=SAMPLE_RATE, weights=START, announce=print)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({}, "urls is empty"),
        ({"urls": ("node7:8000",)}, "must start with http"),
        ({"urls": ("http://node7:8000",)}, "needs sync_dir"),
    ],
)
def test_a_server_section_that_cannot_work_is_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RolloutServerConfig(**section)


def test_the_server_backend_needs_its_section() -> None:
    with pytest.raises(ValidationError, match="backend=server needs a section server"):
        RolloutConfig(backend="server")
