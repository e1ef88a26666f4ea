"""Rows that share their prompt say what they say in a row each."""

import pytest
import torch

from nemo_mapo.data.sequences import by_completion, drop_audio, select_rows, shared_row, token_batch, without_audio
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.rows import training_rows
from nemo_mapo.training.packing import pack_shared_rows
from nemo_mapo.training.signals import MicroBatching, token_signals
from nemo_mapo.types import AudioBatch, TokenBatch
from support.layouts import hard_groups
from support.tiny import TinyAudioLLM, tiny_audio_llm

PAD = 0
SHARED = MicroBatching(rows=8, shared_prompts=True)
UNEQUAL = [0, 1, 2, 4, 5, 6]
"""Of groups of two: whole, one left, none, whole."""


def rows_of_text(tokens: list[list[int]], prompt_lengths: list[int], completion_lengths: list[int]) -> TokenBatch:
    return TokenBatch(
        tokens=torch.tensor(tokens),
        prompt_lengths=torch.tensor(prompt_lengths),
        completion_lengths=torch.tensor(completion_lengths),
        audio=AudioBatch(waveforms=torch.zeros(0, 0), lengths=torch.zeros(0, dtype=torch.int64)),
        audio_row=torch.full((len(tokens),), -1),
    )


def test_a_prompt_stands_once_before_its_completions_and_its_last_token_before_each() -> None:
    sequences = rows_of_text(
        [[7, 8, 9, 1, 2, PAD], [7, 8, 9, 3, PAD, PAD], [7, 5, 4, PAD, PAD, PAD]], [3, 3, 2], [2, 1, 1]
    )
    row = shared_row(sequences)
    assert row.tokens.tolist() == [[7, 8, 9, 1, 9, 7, 5]]
    assert row.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert row.read_at.tolist() == [2, 3, 4, 6]
    assert row.targets.tolist() == [[1, 2, 3, 4]]
    assert row.lengths.tolist() == [5, 2]
    assert row.leaders.tolist() == [0, 2]


def test_values_of_completion_tokens_become_right_padded_rows() -> None:
    values = by_completion(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 1]))
    assert values.tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_packs_count_a_prompt_once_and_again_where_its_group_goes_on() -> None:
    shares = [False, True, True, False]
    assert pack_shared_rows([5, 5, 5, 3], [4, 4, 4, 6], shares, budget=12) == [[0, 1], [2], [3]]
    assert pack_shared_rows([5, 5, 5, 3], [4, 4, 4, 6], shares, budget=24) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"row 3 has 8 tokens, more than model\.packed_tokens=7"):
        pack_shared_rows([3, 3, 3, 3], [4, 4, 4, 6], shares, budget=7)


def variants(tiny: TinyAudioLLM) -> dict[str, TokenBatch]:
    sequences = token_batch(training_rows(hard_groups(tiny)), pad_id=PAD)
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    return {
        "whole groups": sequences,
        "unequal groups": select_rows(sequences, UNEQUAL),
        "one completion": select_rows(sequences, [3]),
        "placeholders without audio": without_audio(sequences),
        "text alone": drop_audio(without_audio(sequences), special),
    }


@pytest.mark.parametrize(
    "variant", ["whole groups", "unequal groups", "one completion", "placeholders without audio", "text alone"]
)
def test_signals_and_gradients_equal_those_of_a_row_each(variant: str) -> None:
    tiny = tiny_audio_llm()
    sequences = variants(tiny)[variant]
    heard = variant in ("whole groups", "unequal groups", "one completion")
    found = []
    for batching in (SHARED, MicroBatching(rows=8)):
        tiny.model.zero_grad()
        signals = token_signals(tiny.model, sequences, head_reduction="max" if heard else None, batching=batching)
        loss = signals.log_probs.square().sum()
        if signals.audio_mass is not None:
            loss = loss + signals.audio_mass.sum()
        loss.backward()
        gradients = {name: weight.grad for name, weight in tiny.model.named_parameters() if weight.grad is not None}
        found.append((signals, gradients))
    (shared, gradients), (separate, expected) = found
    torch.testing.assert_close(shared.log_probs, separate.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.entropy_nats, separate.entropy_nats, atol=1e-5, rtol=1e-5)
    if heard:
        torch.testing.assert_close(shared.audio_mass, separate.audio_mass, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_a_shared_prompt_is_longer_than_the_positions_only_if_a_row_is() -> None:
    tiny = tiny_audio_llm()
    sequences = token_batch(training_rows(hard_groups(tiny)), pad_id=PAD)
    read = int(shared_row(sequences).lengths.sum())
    tiny.model.max_positions = int((sequences.prompt_lengths + sequences.completion_lengths).max()) - 1
    assert read > tiny.model.max_positions
    token_signals(tiny.model, sequences, head_reduction=None, batching=SHARED)
    tiny.model.max_positions -= 1
    with pytest.raises(ValueError, match=r"exceed model\.decoder\.max_position_embeddings"):
        token_signals(tiny.model, sequences, head_reduction=None, batching=SHARED)
