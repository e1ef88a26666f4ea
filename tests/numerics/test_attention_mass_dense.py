"""The fused audio mass equals the dense one, in value and gradient, and stays fused and linear in memory."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_mapo.attention import audio_attention_mass, dense_audio_attention_mass
from nemo_mapo.attention.dense import dense_attention_weights
from nemo_mapo.attention.mass import EXPLICIT_MASK_QUERIES, attention_with_audio_mass, attention_without_mass

BFLOAT16_TOLERANCE = 2.0**-7
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: BFLOAT16_TOLERANCE}
"""Absolute and relative, of masses and outputs."""


@dataclass(frozen=True)
class Case:
    """One combination of masks and shapes."""

    time_q: int = 23
    time_k: int = 23
    heads: int = 4
    kv_heads: int = 4
    dim: int = 8
    causal: bool = True
    segmented: bool = False
    softmax_scale: float | None = None


CASES = {
    "causal": Case(),
    "bidirectional": Case(causal=False),
    "grouped": Case(kv_heads=2),
    "one key head": Case(kv_heads=1, dim=12),
    "odd width": Case(dim=5, softmax_scale=0.7),
    "packed": Case(segmented=True, kv_heads=2),
    "packed bidirectional": Case(segmented=True, causal=False),
    "one cached query": Case(time_q=1, segmented=True),
    "cached": Case(time_q=9, kv_heads=2),
    "cached packed": Case(time_q=9, segmented=True),
    "cached bidirectional": Case(time_q=9, causal=False),
    "cached, many queries": Case(time_q=EXPLICIT_MASK_QUERIES + 5, time_k=EXPLICIT_MASK_QUERIES + 20, segmented=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE.keys(), ids=str)


class Inputs:
    """Random tensors of a case: two rows, packed differently, with audio in every segment."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        self.query = torch.randn(2, case.time_q, case.heads, case.dim, generator=generator).to(dtype)
        self.key = torch.randn(2, case.time_k, case.kv_heads, case.dim, generator=generator).to(dtype)
        self.value = torch.randn(2, case.time_k, case.kv_heads, case.dim, generator=generator).to(dtype)
        for tensor in (self.query, self.key, self.value):
            tensor.requires_grad_()
        self.audio_key_mask = torch.rand(2, case.time_k, generator=generator) < 0.4
        self.options = {"causal": case.causal, "softmax_scale": case.softmax_scale, "segment_ids": None}
        if case.segmented:
            self.options["segment_ids"] = _segments(case.time_k)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and mass by the S x S matrix."""
        weights = dense_attention_weights(self.query, self.key, **self.options)
        values = self.value.to(weights.dtype).repeat_interleave(self.query.shape[2] // self.key.shape[2], dim=2)
        mass = dense_audio_attention_mass(self.query, self.key, self.audio_key_mask, **self.options)
        return torch.einsum("bhqk,bkhd->bqhd", weights, values), mass

    def gradients(self, output: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of a scalar that weighs every output and mass differently."""
        generator = torch.Generator().manual_seed(11)
        scalar = sum(
            (part * torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)).sum()
            for part in (output.to(mass.dtype), mass)
        )
        return torch.autograd.grad(scalar, (self.query, self.key, self.value))


def _segments(time: int) -> torch.Tensor:
    """Row 0: samples 1, 2, 9 and right padding; row 1: left padding, then sample 3."""
    position = torch.arange(time) / time
    first = torch.where(position < 0.3, 1, torch.where(position < 0.55, 2, torch.where(position < 0.9, 9, 0)))
    return torch.stack((first, torch.where(position < 0.2, 0, 3)))


@each_dtype
@each_case
def test_output_and_mass_equal_dense(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(case, dtype)
    output, mass = attention_with_audio_mass(
        inputs.query, inputs.key, inputs.value, inputs.audio_key_mask, **inputs.options
    )
    dense_output, dense_mass = inputs.dense()
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(mass, dense_mass, **tolerance)
    torch.testing.assert_close(output.to(dense_output.dtype), dense_output, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_case
def test_gradients_equal_dense(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(case, dtype)
    fused = inputs.gradients(
        *attention_with_audio_mass(inputs.query, inputs.key, inputs.value, inputs.audio_key_mask, **inputs.options)
    )
    for gradient, dense_gradient in zip(fused, inputs.gradients(*inputs.dense()), strict=True):
        # Gradients sum over the queries of a key, so their rounding grows with the largest of them.
        allowed = TOLERANCE[dtype] * float(dense_gradient.abs().max().clamp(min=1))
        torch.testing.assert_close(gradient, dense_gradient, atol=allowed, rtol=0)


@each_case
def test_bfloat16_gradients_point_where_dense_ones_do(case: Case) -> None:
    inputs = Inputs(case, torch.bfloat16)
    fused = inputs.gradients(
        *attention_with_audio_mass(inputs.query, inputs.key, inputs.value, inputs.audio_key_mask, **inputs.options)
    )
    for gradient, dense_gradient in zip(fused, inputs.gradients(*inputs.dense()), strict=True):
        error = (gradient - dense_gradient).float().norm() / dense_gradient.float().norm()
        assert error < 4 * BFLOAT16_TOLERANCE


@each_case
def test_mass_alone_equals_mass_beside_the_output(case: Case) -> None:
    inputs = Inputs(case)
    mass = audio_attention_mass(inputs.query, inputs.key, inputs.audio_key_mask, **inputs.options)
    torch.testing.assert_close(mass, inputs.dense()[1], atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    "case", [Case(time_k=7, time_q=7, kv_heads=2, dim=3, segmented=True), Case(time_k=6, time_q=4)]
)
def test_gradcheck(case: Case) -> None:
    inputs = Inputs(case)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_with_audio_mass(query, key, value, inputs.audio_key_mask, **inputs.options)

    assert torch.autograd.gradcheck(attend, (inputs.query, inputs.key, inputs.value))


def test_segments_leave_no_trace_even_beside_large_logits() -> None:
    """Logits in the hundreds, in float32, and the packed row still equals its samples run alone."""
    generator = torch.Generator().manual_seed(3)
    query, key = (20 * torch.randn(1, 24, 2, 8, generator=generator) for _ in range(2))
    audio = torch.rand(1, 24, generator=generator) < 0.5
    segment_ids = torch.tensor([[1] * 10 + [2] * 14])
    packed = audio_attention_mass(query, key, audio, segment_ids=segment_ids)
    for rows in (slice(0, 10), slice(10, 24)):
        alone = audio_attention_mass(query[:, rows], key[:, rows], audio[:, rows])
        torch.testing.assert_close(packed[..., rows], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_bfloat16_mass_is_accurate_over_long_contexts(share: float) -> None:
    """Thousands of rounded weights: their errors average out, and the stated 2^-7 relative tolerance holds."""
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(1, 2048, 2, 64, generator=generator).bfloat16() for _ in range(2))
    audio = torch.rand(1, 2048, generator=generator) < share
    mass = audio_attention_mass(query, key, audio)
    dense = dense_audio_attention_mass(query, key, audio)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass, dense, atol=0, rtol=BFLOAT16_TOLERANCE)


@each_dtype
@each_case
def test_every_form_stays_on_the_fused_kernel(case: Case, dtype: torch.dtype) -> None:
    """With every other backend off, a call that the fused kernel cannot take raises."""
    inputs = Inputs(case, dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attention_with_audio_mass(inputs.query, inputs.key, inputs.value, inputs.audio_key_mask, **inputs.options)
        attention_without_mass(inputs.query, inputs.key, inputs.value, **inputs.options)
        audio_attention_mass(inputs.query, inputs.key, inputs.audio_key_mask, **inputs.options)


def _bytes_kept_for_backward(time: int, queries: int, segmented: bool) -> int:
    inputs = Inputs(Case(time_q=queries, time_k=time, kv_heads=2, segmented=segmented), torch.float32)
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention_with_audio_mass(inputs.query, inputs.key, inputs.value, inputs.audio_key_mask, **inputs.options)
    return sum(storages.values())


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("cached_share", [0.0, 0.25])
def test_what_backward_keeps_is_linear_in_length(segmented: bool, cached_share: float) -> None:
    short, long = (_bytes_kept_for_backward(time, int(time * (1 - cached_share)), segmented) for time in (512, 2048))
    assert long <= 4.1 * short
