"""Rows that share their prompt say what they say in a row each."""

from dataclasses import replace

import pytest
import torch

from nemo_mapo.data.prompts import without_audio
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.models.packing import pack_shared_rows
from nemo_mapo.rows import Prompt, Row, training_rows
from nemo_mapo.training.signals import token_signals
from support.layouts import hard_groups
from support.tiny import TinyAudioLLM, tiny_audio_llm

SHARED = MicroBatching(rows=8, shared_prompts=True)
UNEQUAL = [0, 1, 2, 4, 5, 6]
"""Of groups of two: whole, one left, none, whole."""


def test_a_prompt_stands_once_before_its_completions_and_its_last_token_before_each() -> None:
    first, second = Prompt(id="a", token_ids=torch.tensor([7, 8, 9])), Prompt(id="b", token_ids=torch.tensor([7, 5]))
    asked = [(first, [1, 2]), (first, [3]), (second, [4])]
    rows = [Row(prompt=prompt, token_ids=torch.tensor(completion)) for prompt, completion in asked]
    inputs = SHARED.lay_out(rows, tiny_audio_llm().model)
    assert inputs.tokens.tolist() == [[7, 8, 9, 1, 9, 7, 5]]
    assert inputs.positions is not None and inputs.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert inputs.read_at is not None and inputs.read_at.tolist() == [2, 3, 4, 6]
    assert inputs.targets.tolist() == [[1, 2, 3, 4]]
    assert inputs.packed_lengths is not None and inputs.packed_lengths.tolist() == [5, 2]
    assert inputs.audio_row.tolist() == [-1, -1]


def test_packs_count_a_prompt_once_and_again_where_its_group_goes_on() -> None:
    shares = [False, True, True, False]
    assert pack_shared_rows([5, 5, 5, 3], [4, 4, 4, 6], shares, budget=12) == [[0, 1], [2], [3]]
    assert pack_shared_rows([5, 5, 5, 3], [4, 4, 4, 6], shares, budget=24) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"row 3 has 8 tokens, more than model\.packed_tokens=7"):
        pack_shared_rows([3, 3, 3, 3], [4, 4, 4, 6], shares, budget=7)


def variants(tiny: TinyAudioLLM) -> dict[str, list[Row]]:
    rows = training_rows(hard_groups(tiny))
    special = SpecialTokens.from_tokenizer(tiny.tokenizer)
    return {
        "whole groups": rows,
        "unequal groups": [rows[number] for number in UNEQUAL],
        "one completion": [rows[3]],
        "placeholders without audio": [replace(row, prompt=row.prompt.unheard()) for row in rows],
        "text alone": [replace(row, prompt=without_audio(row.prompt, special)) for row in rows],
    }


@pytest.mark.parametrize(
    "variant", ["whole groups", "unequal groups", "one completion", "placeholders without audio", "text alone"]
)
def test_signals_and_gradients_equal_those_of_a_row_each(variant: str) -> None:
    tiny = tiny_audio_llm()
    rows = variants(tiny)[variant]
    heard = variant in ("whole groups", "unequal groups", "one completion")
    found = []
    for batching in (SHARED, MicroBatching(rows=8)):
        tiny.model.zero_grad()
        signals = token_signals(tiny.model, rows, head_reduction="max" if heard else None, batching=batching)
        loss = torch.cat([one.log_probs for one in signals]).square().sum()
        if heard:
            loss = loss + torch.cat([one.audio_mass for one in signals if one.audio_mass is not None]).sum()
        loss.backward()
        gradients = {name: weight.grad for name, weight in tiny.model.named_parameters() if weight.grad is not None}
        found.append((signals, gradients))
    (shared, gradients), (separate, expected) = found
    for one, other in zip(shared, separate, strict=True):
        torch.testing.assert_close(vars(one), vars(other), atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_a_shared_prompt_is_longer_than_the_positions_only_if_a_row_is() -> None:
    tiny = tiny_audio_llm()
    rows = training_rows(hard_groups(tiny))
    tiny.model.max_positions = max(map(len, rows)) - 1
    assert SHARED.lay_out(rows, tiny.model).tokens.shape[1] > tiny.model.max_positions
    token_signals(tiny.model, rows, head_reduction=None, batching=SHARED)
    tiny.model.max_positions -= 1
    with pytest.raises(ValueError, match=r"exceed model\.decoder\.max_position_embeddings"):
        token_signals(tiny.model, rows, head_reduction=None, batching=SHARED)
