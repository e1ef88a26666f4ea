"""A blocked query attends exactly as if the blocked keys were not there, in every way that rows are laid out."""

import pytest
import torch
from torch import Tensor

from nemo_mapo.attention.dense import dense_attention_weights
from nemo_mapo.attention.mass import Blocked, attention_with_audio_mass, attention_without_mass
from nemo_mapo.attention.shared import shared_prompt_attention

BATCH, TIME, HEADS, KV_HEADS, DIM = 2, 9, 4, 2, 8
AUDIO = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
DEAF = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0, 1]], dtype=torch.bool)
SEGMENTS = torch.tensor([[1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))
    return [torch.randn(BATCH, TIME, *shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, blocked: Blocked, segment_ids: Tensor | None) -> Tensor:
    weights = dense_attention_weights(query, key, segment_ids=segment_ids, blocked=blocked)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value.repeat_interleave(HEADS // KV_HEADS, dim=2))


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole rows", "left-padded"])
@pytest.mark.parametrize("time_q", [TIME, 3], ids=["all queries", "after a cache"])
def test_output_and_gradients_equal_those_of_dense_attention(segment_ids: Tensor | None, time_q: int) -> None:
    query, key, value = tensors()
    query = query[:, TIME - time_q :]
    blocked = Blocked(DEAF[:, TIME - time_q :], AUDIO)
    found = attention_without_mass(query, key, value, segment_ids=segment_ids, blocked=blocked)
    expected = dense(query, key, value, blocked, segment_ids)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    for one, other in zip(
        (found, *torch.autograd.grad((found * weight).sum(), (query, key, value))),
        (expected, *torch.autograd.grad((expected * weight).sum(), (query, key, value))),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_one_query_after_a_padded_cache_is_blocked_as_well() -> None:
    query, key, value = tensors()
    blocked = Blocked(DEAF[:, -1:], AUDIO)
    found = attention_without_mass(query[:, -1:], key, value, segment_ids=SEGMENTS, blocked=blocked)
    torch.testing.assert_close(found, dense(query[:, -1:], key, value, blocked, SEGMENTS), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocked_query_spends_nothing_on_audio_and_others_keep_every_digit(dtype: torch.dtype) -> None:
    query, key, value = tensors(dtype)
    heard, mass = attention_with_audio_mass(query, key, value, AUDIO)
    output, blocked_mass = attention_with_audio_mass(query, key, value, AUDIO, blocked=Blocked(DEAF, AUDIO))
    rows = DEAF[:, None].expand_as(mass)
    assert not blocked_mass[rows].any() and mass[rows].min() > 0
    assert torch.equal(output[~DEAF], heard[~DEAF]) and torch.equal(blocked_mass[~rows], mass[~rows])
    assert not torch.allclose(output[DEAF], heard[DEAF])


def test_a_shared_prompt_hides_its_audio_from_the_tokens_named_alone() -> None:
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 4, 5, 6])
    query, key, value = (tensor[:1] for tensor in tensors())
    audio, deaf = AUDIO[:1], torch.tensor([[0, 0, 0, 0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    found, _ = shared_prompt_attention(query[0], key[0], value[0], positions, blocked=Blocked(deaf, audio))
    for row in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7, 8]):
        alone = [tensor[:, row] for tensor in (query, key, value)]
        expected = dense(*alone, Blocked(deaf[:, row], audio[:, row]), None)
        torch.testing.assert_close(found[row], expected[0], rtol=1e-10, atol=1e-12)


def test_a_blocked_query_that_is_a_blocked_key_is_refused() -> None:
    with pytest.raises(ValueError, match="a blocked key itself"):
        attention_without_mass(*tensors(), blocked=Blocked(AUDIO, AUDIO))
    with pytest.raises(ValueError, match="blocked has queries"):
        attention_without_mass(*tensors(), blocked=Blocked(DEAF[:, 1:], AUDIO))
