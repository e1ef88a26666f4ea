"""Tokens that do not hear: read in every layout and drawn with a key cache, always as one slow forward has it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_mapo.attention.session import Deafness
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.layout import PADDED_ROWS, MicroBatching
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rows import Prompt, Row
from nemo_mapo.training.signals import token_signals_in_parts
from support.tiny import CONTROL_TOKENS, TinyAudioLLM, tiny_audio_llm, tiny_batch, tiny_prompts, tiny_rows

pytestmark = pytest.mark.integration

NEW_TOKENS = 12
FIRST, END = torch.tensor([0, 4, 6, 20]), torch.tensor([3, 99, 8, 30])
CASES = [
    DeafTokens(first=FIRST, end=END),
    DeafTokens(first=FIRST, end=END, prompt_text=True),
    DeafTokens(first=FIRST, end=END, layers=(1,)),
]


@pytest.fixture(scope="module")
def tiny() -> TinyAudioLLM:
    return tiny_audio_llm()


@pytest.fixture(scope="module")
def prompts(tiny: TinyAudioLLM) -> list[Prompt]:
    return tiny_prompts(tiny, num_prompts=4)


@torch.no_grad()
def slow_logits(tiny: TinyAudioLLM, asked: Row, row: int, deaf: DeafTokens) -> Tensor:
    """One row alone, its deaf positions written out by hand; `row` is its number in `deaf`."""
    alone, prompt = PADDED_ROWS.lay_out([asked], tiny.model), asked.prompt.token_ids
    queries = torch.zeros_like(alone.tokens, dtype=torch.bool)
    for number in range(len(asked.token_ids)):
        queries[0, len(prompt) - 1 + number] = bool(deaf.first[row] <= number < deaf.end[row])
    if deaf.prompt_text:
        queries[0, : len(prompt) - 1] = prompt[:-1] != tiny.model.audio_token_id
    deafness = Deafness(queries=queries, layers=deaf.layers)
    output = tiny.model(alone.tokens, alone.audio, alone.audio_row, deaf=deafness)
    return output.logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("batch_size", [4, 2], ids=["one batch", "with prompts waiting"])
@pytest.mark.parametrize("deaf", CASES, ids=["some tokens", "and the prompt", "in one layer"])
def test_deaf_generation_is_the_argmax_of_the_deaf_forward(tiny, prompts, deaf, batch_size) -> None:
    stops = [tiny.token_id(token) for token in ("<|end|>", "deep", "is")]
    backend = MegatronRollout(tiny.model, tiny.tokenizer, batch_size=batch_size, stop_token_ids=stops)
    greedy = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    call = {"group_size": 1, "seeds": torch.zeros(4, dtype=torch.int64)}
    found = backend.generate(prompts, greedy, **call, deaf=deaf)
    never = torch.tensor([tiny.token_id(token) for token in CONTROL_TOKENS if token != "<|end|>"])
    for row, (prompt, (one,)) in enumerate(zip(prompts, found, strict=True)):
        logits = slow_logits(tiny, Row(prompt=prompt, token_ids=one.token_ids), row, deaf)
        log_probs = logits.log_softmax(-1).gather(1, one.token_ids[:, None])[:, 0]
        torch.testing.assert_close(one.log_probs, log_probs, atol=2e-5, rtol=1e-4)
        assert one.token_ids.tolist() == logits.index_fill(1, never, -torch.inf).argmax(-1).tolist()
    heard = backend.generate(prompts, greedy, **call)
    assert [one.text for (one,) in heard] != [one.text for (one,) in found]


def rows_of_groups(tiny: TinyAudioLLM) -> tuple[list[Row], DeafTokens]:
    first = torch.tensor([0, 1, 0, 2, 3, 9])
    return tiny_rows(tiny, num_prompts=2, group_size=3), DeafTokens(first=first, end=first + 2)


@pytest.mark.parametrize("prompt_text", [False, True])
@pytest.mark.parametrize(
    "batching",
    [
        MicroBatching(rows=4),
        MicroBatching(rows=1, packed_tokens=90),
        MicroBatching(rows=6, shared_prompts=True),
        MicroBatching(rows=1, packed_tokens=90, shared_prompts=True),
    ],
    ids=["padded", "packed", "shared", "shared and packed"],
)
def test_deaf_log_probs_are_those_of_rows_read_alone(tiny, batching, prompt_text) -> None:
    rows, deaf = rows_of_groups(tiny)
    deaf = replace(deaf, prompt_text=prompt_text)
    found = token_signals_in_parts(tiny.model, rows, head_reduction="max", batching=batching, deaf=deaf)
    heard = token_signals_in_parts(tiny.model, rows, head_reduction="max", batching=batching)
    for row, asked in enumerate(rows):
        length = len(asked.token_ids)
        logits = slow_logits(tiny, asked, row, deaf)
        log_probs = logits.log_softmax(-1).gather(1, asked.token_ids[:, None])[:, 0]
        torch.testing.assert_close(found[row].log_probs, log_probs, atol=2e-5, rtol=1e-4)
        silent = (deaf.first[row] <= torch.arange(length)) & (torch.arange(length) < deaf.end[row])
        deaf_mass, mass = found[row].audio_mass, heard[row].audio_mass
        assert deaf_mass is not None and not deaf_mass[silent].any() and mass is not None and mass.min() > 0


def test_deaf_tokens_with_gradient_and_recompute_are_refused(tiny) -> None:
    prompts = tiny_batch(tiny, num_prompts=4)
    queries = torch.zeros_like(prompts.tokens, dtype=torch.bool)
    config = tiny.model.config
    config.recompute_granularity = "full"
    try:
        with pytest.raises(ValueError, match=r"torch\.no_grad\(\), or set model\.decoder\.recompute_granularity=null"):
            tiny.model(prompts.tokens, prompts.audio, prompts.audio_row, deaf=Deafness(queries=queries))
    finally:
        config.recompute_granularity = None


def test_deafness_about_other_prompts_is_refused(tiny, prompts) -> None:
    backend = MegatronRollout(tiny.model, tiny.tokenizer, batch_size=4)
    with pytest.raises(ValueError, match="deaf tokens are given for 3 and 3 prompts, there are 4"):
        backend.generate(
            prompts,
            SamplingConfig(temperature=0, max_new_tokens=2),
            group_size=1,
            seeds=torch.zeros(4, dtype=torch.int64),
            deaf=DeafTokens(first=FIRST[:3], end=END[:3]),
        )
