"""Transformer Engine against the SDPA backend, on a GPU: output, mass and gradients.

    CUDA_VISIBLE_DEVICES=0 pytest tests/gpu

Calls that the rules refuse on the machine at hand are skipped with the rules' reason.
"""

import contextlib
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.attention.session import AttentionSession
from nemo_mapo.attention.te_core import TECoreAttention, attention_cases, transformer_engine
from nemo_mapo.attention.te_support import AttentionCase, Layout, Machine, mass_call_case, refusals

te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine", exc_type=ImportError)
pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, BATCH = 8, 2, 2
LENGTHS = (37, 1, 90, 72)
TIME = sum(LENGTHS)
BFLOAT16_TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}
"""Against float32: weights and results are rounded to 2^-8, and gradients sum over hundreds of such terms."""
FP8_TOLERANCE = {"rtol": 0.15, "atol": 0.15}
"""e4m3 keeps three bits behind the point."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one attention module makes of one set of rows."""

    output: Tensor
    mass: Tensor
    gradients: tuple[Tensor, ...]
    """Of a weighted sum of output and mass, with respect to query, key and value."""
    mass_gradients: tuple[Tensor, ...]
    """Of a weighted sum of the mass alone, with respect to query and key."""


@pytest.fixture(autouse=True)
def fused_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As te_spec has it in a model, so that no slower kernel answers instead."""
    for name, value in (("NVTE_FLASH_ATTN", "0"), ("NVTE_FUSED_ATTN", "1"), ("NVTE_UNFUSED_ATTN", "0")):
        monkeypatch.setenv(name, value)


def config(head_dim: int, **changes: Any) -> TransformerConfig:
    settings = {
        "num_layers": 1,
        "hidden_size": HEADS * head_dim,
        "num_attention_heads": HEADS,
        "num_query_groups": KV_HEADS,
        "attention_dropout": 0.0,
        "params_dtype": torch.bfloat16,
        "bf16": True,
    }
    return TransformerConfig(**(settings | changes))


def skip_what_is_refused(settings: TransformerConfig, layout: Layout) -> Machine:
    machine = transformer_engine().machine
    reasons = [r for case in attention_cases(settings, machine, layout).values() for r in refusals(case)]
    if reasons:
        pytest.skip("; ".join(reasons))
    return machine


def rows(layout: Layout, head_dim: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, PackedSeqParams | None]:
    """Query, key and value, the audio keys, and the packing: values that bfloat16 holds exactly."""
    packed = layout == "thd"
    leading = (TIME,) if packed else (TIME, BATCH)
    generator = torch.Generator().manual_seed(1)
    shapes = ((*leading, HEADS, head_dim), (*leading, KV_HEADS, head_dim), (*leading, KV_HEADS, head_dim))
    query, key, value = (torch.randn(shape, generator=generator).bfloat16().cuda() for shape in shapes)
    audio = torch.rand(1 if packed else BATCH, TIME, generator=generator).cuda() < 0.3
    if not packed:
        return (query, key, value), audio, None
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    longest = max(LENGTHS)
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return (query, key, value), audio, packing


def run(
    attention: torch.nn.Module,
    layout: Layout,
    head_dim: int,
    dtype: torch.dtype,
    context: contextlib.AbstractContextManager[Any] | None = None,
) -> Result:
    row, audio, packing = rows(layout, head_dim)
    row = tuple(tensor.to(dtype).requires_grad_() for tensor in row)
    session = attention.session
    with session.forward(audio_key_mask=audio), context or contextlib.nullcontext():
        output = attention(*row, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packing)
    mass = session.layer_head_masses()[0]
    weights = (torch.randn(part.shape, generator=torch.Generator().manual_seed(2)).cuda() for part in (output, mass))
    of_output, of_mass = ((part.float() * weight).sum() for part, weight in zip((output, mass), weights, strict=True))
    mass_gradients = torch.autograd.grad(of_mass, row[:2], retain_graph=True)
    gradients = torch.autograd.grad(of_output + of_mass, row)
    return Result(output=output, mass=mass, gradients=gradients, mass_gradients=mass_gradients)


def both(
    settings: TransformerConfig, layout: Layout, context: contextlib.AbstractContextManager[Any] | None = None
) -> tuple[Result, Result]:
    """Transformer Engine's result in bfloat16 (or FP8), and the SDPA backend's in float32 on the same values."""
    head_dim = settings.kv_channels
    arguments: Any = (settings, 1, AttnMaskType.causal, "self")
    engine = TECoreAttention(*arguments, session=AttentionSession([0]), layout=layout).cuda()
    reference = SDPACoreAttention(*arguments, session=AttentionSession([0]))
    return (
        run(engine, layout, head_dim, torch.bfloat16, context),
        run(reference, layout, head_dim, torch.float32),
    )


def assert_close(found: Any, expected: Any, tolerance: dict[str, float]) -> None:
    found, expected = ((item,) if isinstance(item, Tensor) else item for item in (found, expected))
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().clamp(min=1.0)
        torch.testing.assert_close(one.float() / scale, other.float() / scale, **tolerance)


@pytest.mark.parametrize("layout", ["sbhd", "thd"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_output_mass_and_gradients_are_those_of_the_sdpa_backend(layout: Layout, head_dim: int) -> None:
    settings = config(head_dim)
    skip_what_is_refused(settings, layout)
    found, expected = both(settings, layout)
    assert_close(found.output, expected.output, BFLOAT16_TOLERANCE)
    assert_close(found.mass, expected.mass, BFLOAT16_TOLERANCE)
    assert_close(found.gradients, expected.gradients, BFLOAT16_TOLERANCE)
    assert_close(found.mass_gradients, expected.mass_gradients, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("layout", ["sbhd", "thd"])
def test_the_mass_is_that_of_the_dense_softmax_within_bfloat16(layout: Layout) -> None:
    """Each mass by itself, not by the largest: small masses matter to -log(a_t)."""
    settings = config(128)
    skip_what_is_refused(settings, layout)
    found, expected = both(settings, layout)
    torch.testing.assert_close(found.mass, expected.mass, rtol=2**-6, atol=2**-9)


def test_under_fp8_attention_the_mass_keeps_its_bfloat16_accuracy() -> None:
    from transformer_engine.common.recipe import DelayedScaling

    settings = config(128, fp8="hybrid", fp8_dot_product_attention=True)
    skip_what_is_refused(settings, "sbhd")
    found, expected = both(settings, "sbhd", te.fp8_autocast(enabled=True, fp8_recipe=DelayedScaling(fp8_dpa=True)))
    assert_close(found.output, expected.output, FP8_TOLERANCE)
    assert_close(found.mass, expected.mass, BFLOAT16_TOLERANCE)
    assert_close(found.mass_gradients, expected.mass_gradients, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize(("layout", "dtype"), [("sbhd", "bf16"), ("thd", "bf16"), ("sbhd", "fp8"), ("thd", "fp8")])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_the_rules_allow_transformer_engine_runs_fused(layout: Layout, dtype: Any, head_dim: int) -> None:
    """Our rules may be stricter than this version of Transformer Engine, never laxer."""
    machine = transformer_engine().machine
    output = AttentionCase(machine=machine, head_dim_qk=head_dim, head_dim_v=head_dim, layout=layout, dtype=dtype)
    for case, training, window in product((output, mass_call_case(output)), (False, True), (None, 64)):
        case = replace(case, training=training, window=window)
        if not refusals(case):
            assert runs_fused(case), case


def runs_fused(case: AttentionCase) -> bool:
    """Transformer Engine's own answer for rows of 200 tokens."""
    from transformer_engine.common.recipe import DelayedScaling

    selection = pytest.importorskip("transformer_engine.pytorch.attention.dot_product_attention.utils")
    packed = case.layout == "thd"
    answer = selection.get_attention_backend(
        selection.AttentionParams(
            qkv_dtype=torch.bfloat16,
            qkv_layout="_".join([case.layout] * 3),
            batch_size=4,
            num_heads=HEADS,
            num_gqa_groups=KV_HEADS,
            max_seqlen_q=200,
            max_seqlen_kv=200,
            head_dim_qk=case.head_dim_qk,
            head_dim_v=case.head_dim_v,
            attn_mask_type="padding_causal" if packed else "causal",
            window_size=(-1 if case.window is None else case.window, 0),
            core_attention_bias_shape=None,
            core_attention_bias_requires_grad=False,
            is_training=case.training,
            deterministic=case.machine.deterministic,
            fp8=case.dtype == "fp8",
            fp8_meta={"recipe": DelayedScaling(fp8_dpa=case.dtype == "fp8")},
        )
    )
    available = answer[-1]
    return bool(available[1])
