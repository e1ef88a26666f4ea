"""Completions that share a prompt attend as if each had it to itself."""

import pytest
import torch
from torch import Tensor

from nemo_mapo.attention.mass import EXPLICIT_MASK_QUERIES, attention_with_audio_mass
from nemo_mapo.attention.shared import SharedPrompt, shared_prompt_attention, shared_prompts

HEADS, KV_HEADS, DIM = 4, 2, 8
PROMPT, COMPLETIONS = 5, (3, 1, 4)


def test_groups_are_read_off_the_positions() -> None:
    positions = [0, 1, 2, 3, 2, 3, 4, 2, 0, 1, 2, 0, 0, 1, 1]
    assert shared_prompts(torch.tensor(positions)) == [
        SharedPrompt(start=0, prompt=2, completions=(2, 3, 1)),
        SharedPrompt(start=8, prompt=0, completions=(3,)),
        SharedPrompt(start=11, prompt=0, completions=(1,)),
        SharedPrompt(start=12, prompt=1, completions=(1, 1)),
    ]


@pytest.mark.parametrize("positions", [[], [1, 2], [0, 1, 2, 1, 2, 2], [0, 1, 5]])
def test_positions_that_describe_no_groups_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="begin"):
        shared_prompts(torch.tensor(positions, dtype=torch.int64))


def row_of_groups() -> tuple[Tensor, Tensor]:
    """Positions and audio keys: a group of three, a single sequence, a group of two without audio."""
    group = [*range(PROMPT + COMPLETIONS[0]), *(PROMPT + t for length in COMPLETIONS[1:] for t in range(length))]
    positions = torch.tensor([*group, *range(6), *range(4), 2, 3])
    audio = torch.zeros(len(positions), dtype=torch.bool)
    audio[1:4] = audio[len(group) + 2] = True
    return positions, audio


def random_row(time: int, dtype: torch.dtype) -> list[Tensor]:
    widths = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))
    return [torch.randn(time, heads, dim, dtype=dtype, requires_grad=True) for heads, dim in widths]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """The slow reference: every completion behind a copy of its prompt, by the positions alone."""
    outputs, masses = [], []
    for token, position in enumerate(positions.tolist()):
        begin = max(index for index in range(token + 1) if positions[index] == 0)
        own = token
        while own > begin and positions[own - 1] == positions[own] - 1:
            own -= 1
        shared = [index for index in range(begin, own) if positions[index] < positions[own]][: int(positions[own])]
        seen = [*shared, *range(own, token + 1)]
        assert positions[seen].tolist() == list(range(position + 1))
        output, mass = attention_with_audio_mass(
            query[None, token : token + 1], key[None, seen], value[None, seen], audio[None, seen]
        )
        outputs.append(output[0])
        masses.append(mass[0])
    return torch.cat(outputs), torch.cat(masses, dim=1)


def test_output_mass_and_gradients_equal_those_of_separate_sequences() -> None:
    positions, audio = row_of_groups()
    tensors = random_row(len(positions), torch.float64)
    reads_mass = torch.ones(len(positions), dtype=torch.float64)
    reads_mass[:PROMPT] = reads_mass[-6:-4] = 0
    weight = torch.randn(len(positions), HEADS, DIM, dtype=torch.float64)
    results = []
    for attend in (shared_prompt_attention, None):
        if attend is None:
            output, mass = one_by_one(*tensors, positions, audio)
        else:
            output, mass = attend(*tensors, positions, audio_key_mask=audio)
        assert mass is not None
        loss = (output * weight).sum() + (mass * reads_mass).square().sum()
        results.append((output, mass * reads_mass, *torch.autograd.grad(loss, tensors)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    positions = torch.tensor([0, 1, 2, 1, 2, 1])
    audio = torch.tensor([True, False, False, False, False, False])
    tensors = random_row(len(positions), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *row: shared_prompt_attention(*row, positions, audio_key_mask=audio), tensors
    )


def test_a_completion_depends_on_its_prompt_and_itself_alone() -> None:
    positions, audio = row_of_groups()
    query, key, value = random_row(len(positions), torch.float32)
    first = slice(PROMPT, PROMPT + COMPLETIONS[0])
    before, _ = shared_prompt_attention(query, key, value, positions, audio_key_mask=audio)
    with torch.no_grad():
        key[first] += 1.0
        value[first] += 1.0
    after, _ = shared_prompt_attention(query, key, value, positions, audio_key_mask=audio)
    changed = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == list(range(first.start, first.stop))


def test_completions_longer_than_a_block_of_queries_attend_as_in_one_call() -> None:
    length = EXPLICIT_MASK_QUERIES + 44
    positions = torch.tensor([*range(PROMPT + length), *range(PROMPT, PROMPT + length)])
    audio = torch.zeros(len(positions), dtype=torch.bool)
    audio[:3] = True
    tensors = random_row(len(positions), torch.float64)
    output, mass = shared_prompt_attention(*tensors, positions, audio_key_mask=audio)
    second = torch.tensor([*range(PROMPT), *range(PROMPT + length, len(positions))])
    alone, its_mass = attention_with_audio_mass(*(tensor[None, second] for tensor in tensors), audio[None, second])
    assert mass is not None
    torch.testing.assert_close(output[-length:], alone[0, PROMPT:])
    torch.testing.assert_close(mass[:, -length:], its_mass[0, :, PROMPT:])


def test_without_audio_keys_there_is_no_mass() -> None:
    positions, _ = row_of_groups()
    output, mass = shared_prompt_attention(*random_row(len(positions), torch.float32), positions)
    assert mass is None and output.shape == (len(positions), HEADS, DIM)
