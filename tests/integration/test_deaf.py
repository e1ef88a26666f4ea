"""Tokens that do not hear: read in every layout and drawn with a key cache, always as one slow forward has it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_mapo.attention.session import Deafness
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.sequences import token_batch
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.rollout.deaf import DeafTokens
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.testing.tiny import CONTROL_TOKENS, TinyAudioLLM, tiny_audio_llm, tiny_prompt_batch, tiny_rollouts
from nemo_mapo.training.signals import MicroBatching, token_signals_in_parts
from nemo_mapo.types import PromptBatch, TokenBatch

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
def prompts(tiny: TinyAudioLLM) -> PromptBatch:
    return tiny_prompt_batch(tiny, num_prompts=4)


@torch.no_grad()
def slow_logits(tiny: TinyAudioLLM, prompts: PromptBatch, row: int, completion: Tensor, deaf: DeafTokens) -> Tensor:
    """One row alone, its deaf positions written out by hand."""
    prompt = prompts.tokens[row, : prompts.lengths[row]]
    tokens = torch.cat((prompt, completion))[None]
    queries = torch.zeros_like(tokens, dtype=torch.bool)
    for number in range(len(completion)):
        queries[0, len(prompt) - 1 + number] = bool(deaf.first[row] <= number < deaf.end[row])
    if deaf.prompt_text:
        queries[0, : len(prompt) - 1] = prompt[:-1] != tiny.model.audio_token_id
    deafness = Deafness(queries=queries, layers=deaf.layers)
    output = tiny.model(tokens, prompts.audio, prompts.audio_row[row : row + 1], deaf=deafness)
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
    for row, length in enumerate(found.completion_lengths.tolist()):
        completion = found.completions[row, :length]
        logits = slow_logits(tiny, prompts, row, completion, deaf)
        log_probs = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(found.log_probs[row, :length], log_probs, atol=2e-5, rtol=1e-4)
        assert completion.tolist() == logits.index_fill(1, never, -torch.inf).argmax(-1).tolist()
    heard = backend.generate(prompts, greedy, **call)
    assert not torch.equal(heard.completions, found.completions)


def rows_of_groups(tiny: TinyAudioLLM) -> tuple[PromptBatch, TokenBatch, DeafTokens]:
    rollouts = tiny_rollouts(tiny, num_prompts=2, group_size=3)
    sequences = token_batch(rollouts, pad_id=SpecialTokens.from_tokenizer(tiny.tokenizer).pad_id)
    first = torch.tensor([0, 1, 0, 2, 3, 9])
    return rollouts.prompts, sequences, DeafTokens(first=first, end=first + 2)


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
    prompts, sequences, deaf = rows_of_groups(tiny)
    deaf = replace(deaf, prompt_text=prompt_text)
    found = token_signals_in_parts(tiny.model, sequences, head_reduction="max", batching=batching, deaf=deaf)
    heard = token_signals_in_parts(tiny.model, sequences, head_reduction="max", batching=batching)
    assert found.audio_mass is not None and heard.audio_mass is not None
    for row, length in enumerate(sequences.completion_lengths.tolist()):
        prompt = int(sequences.prompt_lengths[row])
        completion = sequences.tokens[row, prompt : prompt + length]
        by_prompt = replace(deaf, first=deaf.first[row].expand(2), end=deaf.end[row].expand(2))
        logits = slow_logits(tiny, prompts, row // 3, completion, by_prompt)
        log_probs = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(found.log_probs[row, :length], log_probs, atol=2e-5, rtol=1e-4)
        silent = (deaf.first[row] <= torch.arange(length)) & (torch.arange(length) < deaf.end[row])
        assert not found.audio_mass[row, :length][silent].any() and heard.audio_mass[row, :length].min() > 0


def test_deaf_tokens_with_gradient_and_recompute_are_refused(tiny, prompts) -> None:
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
