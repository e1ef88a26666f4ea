"""What each kind of server is asked and what its answers may be, against a scripted HTTP server."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.adapters import (
    BadAnswer,
    Completion,
    NemoMapoAdapter,
    TrtllmAdapter,
    VllmAdapter,
    Wanted,
    check_completions,
)
from nemo_mapo.rollout.client import prompt_rows
from nemo_mapo.rollout.client_http import Refused, ServerConnection, Unreachable
from nemo_mapo.testing.tiny import SAMPLE_RATE, TinyAudioLLM, tiny_audio_llm, tiny_prompt_batch
from nemo_mapo.types import PromptBatch
from tests.chat_server import Server, serve

__all__ = ["serve"]

PLAIN = SamplingConfig(max_new_tokens=3)
WANTED = Wanted(sampling=PLAIN, seeds=(4,), weight_version=0, weight_digest=None)
WHOLE = Completion(token_ids=(9, 1), log_probs=(-0.5, -1.0), sampling_log_probs=(-0.5, -1.0), stopped=True)

Serve = Callable[[Callable[[str, dict[str, Any]], Any]], Server]


@pytest.fixture(scope="module")
def tiny() -> TinyAudioLLM:
    return tiny_audio_llm()


@pytest.fixture
def prompts(tiny: TinyAudioLLM) -> PromptBatch:
    return tiny_prompt_batch(tiny, num_prompts=2, without_audio=(1,))


def connection(server: Server, timeout_seconds: float = 5.0) -> ServerConnection:
    return ServerConnection(server.base_url.removesuffix("/v1"), token="key", timeout_seconds=timeout_seconds)


def vllm_answer(prompt: list[int]) -> dict[str, Any]:
    logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]}
    choice = {"index": 0, "finish_reason": "stop", "token_ids": [9, 1], "logprobs": logprobs}
    return {"prompt_token_ids": prompt, "choices": [choice]}


def test_a_token_and_a_json_body_are_sent(serve: Serve) -> None:
    server = serve(lambda path, body: (200, {"echo": body}))
    assert connection(server).post("/v1/x", {"a": 1}) == {"echo": {"a": 1}}
    assert server.requests == [("/v1/x", {"a": 1}, "Bearer key")]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_can_be_asked_again(serve: Serve, status: int) -> None:
    with pytest.raises(Unreachable, match=f"status {status}: in trouble"):
        connection(serve(lambda path, body: (status, "in trouble"))).post("/v1/x", {})


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422])
def test_a_refusal_is_final(serve: Serve, status: int) -> None:
    with pytest.raises(Refused, match=f"status {status}: no") as refused:
        connection(serve(lambda path, body: (status, "no"))).post("/v1/x", {})
    assert refused.value.status == status


def test_what_is_no_json_is_no_answer(serve: Serve) -> None:
    with pytest.raises(Unreachable):
        connection(serve(lambda path, body: (200, "<html>"))).post("/v1/x", {})


def test_prompts_are_sent_without_padding(tiny: TinyAudioLLM, prompts: PromptBatch) -> None:
    with_clip, without = prompt_rows(prompts, SAMPLE_RATE)
    assert len(with_clip.token_ids) == int(prompts.lengths[0])
    assert with_clip.waveform is not None and len(with_clip.waveform) == int(prompts.audio.lengths[0])
    assert without.waveform is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": (), "log_probs": (), "sampling_log_probs": ()}, "a completion is empty"),
        ({"log_probs": (-0.5,)}, "a completion of 2 tokens has 1 log-probs"),
        ({"token_ids": (9, 10_000)}, "a token id is not one of the"),
        ({"token_ids": (9, -1)}, "a token id is not one of the"),
        ({"log_probs": (-0.5, float("nan"))}, "a log-prob is not finite"),
        ({"sampling_log_probs": (-0.5, -float("inf"))}, "a log-prob is not finite"),
        ({"stopped": False}, "ended at the length limit, which is 3"),
    ],
)
def test_what_is_no_whole_completion_is_no_sample(tiny: TinyAudioLLM, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadAnswer, match=reason):
        check_completions([replace(WHOLE, **change)], WANTED, len(tiny.tokenizer))


def test_there_is_a_completion_for_every_seed(tiny: TinyAudioLLM) -> None:
    check_completions([WHOLE], WANTED, len(tiny.tokenizer))
    with pytest.raises(BadAnswer, match="0 completions for 1 seeds"):
        check_completions([], WANTED, len(tiny.tokenizer))


def test_completions_of_other_weights_or_prompts_are_refused(tiny: TinyAudioLLM, prompts: PromptBatch) -> None:
    row = prompt_rows(prompts, SAMPLE_RATE)[0]
    wanted = replace(WANTED, weight_version=2, weight_digest="new")
    extension = {"weight_version": 2, "weight_digest": "new", "prompt_token_ids": list(row.token_ids)}
    assert NemoMapoAdapter().completions({"choices": [], "nemo_mapo": extension}, row, wanted) == []
    for wrong in ({"weight_version": 1}, {"weight_digest": "old"}, {"prompt_token_ids": [1, 2]}):
        with pytest.raises(BadAnswer):
            NemoMapoAdapter().completions({"choices": [], "nemo_mapo": extension | wrong}, row, wanted)


def test_vllm_is_asked_for_token_ids_and_its_prompt_is_compared(tiny: TinyAudioLLM, prompts: PromptBatch) -> None:
    adapter = VllmAdapter(tiny.tokenizer)
    row = prompt_rows(prompts, SAMPLE_RATE)[0]
    body = adapter.request("qwen", row, WANTED)
    assert (body["return_token_ids"], body["logprobs"], body["seed"], body["n"]) == (True, True, 4, 1)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["input_audio", "text"]
    audio = tiny.token_id("<|audio|>")
    collapsed = [token for token in row.token_ids if token != audio]
    place = row.token_ids.index(audio)
    reported = [*collapsed[:place], audio, *collapsed[place:]]
    assert adapter.completions(vllm_answer(reported), row, WANTED) == [WHOLE]
    with pytest.raises(BadAnswer, match="another than"):
        adapter.completions(vllm_answer(collapsed), row, WANTED)


def test_trtllm_takes_ids_and_gives_ids_but_takes_no_audio(tiny: TinyAudioLLM, prompts: PromptBatch) -> None:
    adapter = TrtllmAdapter(tiny.tokenizer)
    with_clip, text = prompt_rows(prompts, SAMPLE_RATE)
    body = adapter.request("qwen", text, WANTED)
    assert (body["prompt"], body["detokenize"]) == (text.token_ids, False)
    choice = {"token_ids": [9, 1], "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5, -1.0]}}
    assert adapter.completions({"choices": [choice]}, text, WANTED) == [WHOLE]
    assert not adapter.capabilities({}).audio
    with pytest.raises(ValueError, match="kind=trtllm: its completions take no audio"):
        adapter.request("qwen", with_clip, WANTED)


@pytest.mark.parametrize(
    "option", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"repetition_penalty": 1.1}, {"min_new_tokens": 1}]
)
@pytest.mark.parametrize("kind", [VllmAdapter, TrtllmAdapter])
def test_a_server_without_sampling_log_probs_refuses_what_changes_them(
    tiny: TinyAudioLLM, kind: Any, option: dict[str, float]
) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"rollout.sampling.{name}="):
        kind(tiny.tokenizer).refuse(SamplingConfig(**option))
    kind(tiny.tokenizer).refuse(SamplingConfig(temperature=1.0))
    kind(tiny.tokenizer).refuse(SamplingConfig(temperature=0.0))
