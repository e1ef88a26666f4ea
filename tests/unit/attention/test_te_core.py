"""The Transformer Engine core attention on a host without it: everything around the two calls.

The calls themselves are torch's here, behind the constructor and forward of Megatron's TEDotProductAttention; what
Transformer Engine makes of them is for tests/gpu.
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.attention.session import AttentionSession
from nemo_mapo.attention.te_core import TECoreAttention, TransformerEngine, attention_cases
from nemo_mapo.attention.te_support import MASS_WIDTH, Machine

HEADS, KV_HEADS, DIM, BATCH = 4, 2, 8, 2
H100 = Machine(chip=(9, 0), cudnn=(9, 13, 0), te=(2, 9))


class TorchAttention(nn.Module):
    """TEDotProductAttention's interface; refuses what Transformer Engine would not understand."""

    fp8_is_off = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.widths = (k_channels or config.kv_channels, v_channels or config.kv_channels)
        self.softmax_scale = softmax_scale
        self.ran_without_fp8: list[bool] = []

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert (query.shape[-1], value.shape[-1]) == self.widths and key.shape[:-1] == value.shape[:-1]
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        assert attention_mask is None and attn_mask_type == AttnMaskType.causal
        self.ran_without_fp8.append(TorchAttention.fp8_is_off)
        if packed_seq_params is None:
            return self._rows(*(tensor.transpose(0, 1) for tensor in (query, key, value))).transpose(0, 1)
        parts = [
            self._rows(*(tensor[None, start:end] for tensor in (query, key, value)))[0]
            for start, end in pairwise(packed_seq_params.cu_seqlens_q.tolist())
        ]
        return torch.cat(parts)

    def _rows(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def without_fp8() -> Iterator[None]:
    TorchAttention.fp8_is_off = True
    yield
    TorchAttention.fp8_is_off = False


def engine(machine: Machine = H100) -> TransformerEngine:
    return TransformerEngine(machine=machine, attention=TorchAttention, without_fp8=without_fp8)


def config(**changes: Any) -> TransformerConfig:
    settings = {
        "num_layers": 2,
        "hidden_size": HEADS * DIM,
        "num_attention_heads": HEADS,
        "num_query_groups": KV_HEADS,
        "attention_dropout": 0.0,
        "params_dtype": torch.bfloat16,
    }
    return TransformerConfig(**(settings | changes))


def te_attention(session: AttentionSession, *, layer_number: int = 1, **options: Any) -> TECoreAttention:
    arguments = {"engine": engine()} | options
    return TECoreAttention(config(), layer_number, AttnMaskType.causal, "self", session=session, **arguments)


def sdpa_attention(session: AttentionSession, **options: Any) -> SDPACoreAttention:
    return SDPACoreAttention(config(), 1, AttnMaskType.causal, "self", session=session, **options)


def tensors(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as leaves, the same for the same shape."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((*leading, HEADS, DIM), (*leading, KV_HEADS, DIM), (*leading, KV_HEADS, DIM))
    query, key, value = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return query, key, value


def run(
    attention: nn.Module, session: AttentionSession, audio: Tensor, row: tuple[Tensor, Tensor, Tensor], **rows: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output, mass, and the gradient of a weighted sum of both."""
    with session.forward(audio_key_mask=audio):
        output = attention(*row, None, **rows)
    mass = session.layer_head_masses()[0]
    generator = torch.Generator().manual_seed(2)
    loss = (output * torch.randn(output.shape, generator=generator)).sum()
    loss = loss + (mass * torch.randn(mass.shape, generator=generator)).sum()
    return output, mass, torch.autograd.grad(loss, row)


def audio_mask(rows: int, time: int) -> Tensor:
    audio = torch.zeros(rows, time, dtype=torch.bool)
    audio[:, 1:4] = True
    audio[-1, 5] = True
    return audio


@pytest.mark.parametrize("softmax_scale", [None, 0.2])
def test_unpacked_rows_give_the_output_mass_and_gradient_of_the_sdpa_backend(softmax_scale: float | None) -> None:
    session = AttentionSession([0])
    audio = audio_mask(BATCH, 7)
    found = run(te_attention(session, softmax_scale=softmax_scale), session, audio, tensors(7, BATCH))
    expected = run(sdpa_attention(session, softmax_scale=softmax_scale), session, audio, tensors(7, BATCH))
    torch.testing.assert_close(found, expected)


def test_packed_rows_give_the_output_mass_and_gradient_of_the_sdpa_backend() -> None:
    session = AttentionSession([0])
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    audio = audio_mask(1, 11)
    found = run(te_attention(session, layout="thd"), session, audio, tensors(11), packed_seq_params=packing)
    expected = run(sdpa_attention(session), session, audio, tensors(11), packed_seq_params=packing)
    torch.testing.assert_close(found, expected)


def test_the_mass_is_float32_and_its_call_runs_without_fp8() -> None:
    session = AttentionSession([0])
    attention = te_attention(session)
    row = tuple(tensor.detach().bfloat16() for tensor in tensors(6, BATCH))
    with session.forward(audio_key_mask=audio_mask(BATCH, 6)):
        attention(*row, None)
    assert session.layer_head_masses()[0].dtype == torch.float32
    assert attention.output_call.ran_without_fp8 == [False]
    assert attention.mass_call is not None and attention.mass_call.ran_without_fp8 == [True]


def test_only_target_layers_have_a_second_call_and_only_where_the_mass_is_wanted_does_it_run() -> None:
    session = AttentionSession([1])
    assert te_attention(session, layer_number=1).mass_call is None
    target = te_attention(session, layer_number=2)
    assert target.mass_call is not None and target.mass_call.widths == (DIM, MASS_WIDTH)
    with session.forward():
        target(*tensors(5, BATCH), None)
    assert target.mass_call.ran_without_fp8 == []


def test_segment_ids_and_key_caches_are_refused_in_training() -> None:
    query, key, value = tensors(3, BATCH)
    attention = te_attention(AttentionSession([0]))
    for arguments in ((query, key, value, torch.ones(BATCH, 3, dtype=torch.long)), (query[2:], key, value, None)):
        with pytest.raises(ValueError, match="pack rows to train on Transformer Engine"):
            attention(*arguments)


@torch.no_grad()
def test_generation_attends_as_the_sdpa_backend_does() -> None:
    query, key, value = tensors(4, BATCH)
    session = AttentionSession([0])
    segment_ids = torch.ones(BATCH, 4, dtype=torch.long)
    segment_ids[0, 0] = 0
    engine, sdpa = te_attention(session), sdpa_attention(session)
    for rows in ((query, key, value, segment_ids), (query[3:], key, value, segment_ids), (query[3:], key, value, None)):
        assert torch.equal(engine(*rows), sdpa(*rows))


def test_an_attention_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_bias must be None"):
        te_attention(AttentionSession([0]))(*tensors(3, BATCH), None, attention_bias=torch.zeros(1))


def test_packed_rows_are_refused_where_only_unpacked_ones_were_checked() -> None:
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with pytest.raises(ValueError, match="build it with layout='thd'"):
        te_attention(AttentionSession([0]))(*tensors(3), None, packed_seq_params=packing)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"context_parallel_size": 2}, "context_parallel_size=2"),
        ({"params_dtype": torch.float32}, "trainer.precision=bf16"),
        ({"kv_channels": 12}, "multiples of 8, not 12/12"),
    ],
)
def test_what_the_module_cannot_do_is_refused_when_it_is_built(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TECoreAttention(
            config(**changes), 1, AttnMaskType.causal, "self", session=AttentionSession([0]), engine=engine()
        )


def test_only_causal_self_attention_is_built() -> None:
    for mask_type, attention_type in ((AttnMaskType.padding, "self"), (AttnMaskType.causal, "cross")):
        with pytest.raises(ValueError, match="only causal self-attention"):
            TECoreAttention(config(), 1, mask_type, attention_type, session=AttentionSession([0]), engine=engine())


def test_a_machine_that_cannot_run_packed_rows_is_refused_when_the_module_is_built() -> None:
    a100 = Machine(chip=(8, 0), cudnn=(9, 13, 0), te=(2, 9))
    with pytest.raises(ValueError, match="output, audio mass: packed rows need compute capability"):
        te_attention(AttentionSession([0]), engine=engine(a100), layout="thd")


def test_the_config_decides_which_calls_are_checked() -> None:
    plain = attention_cases(config(fp8="hybrid", window_size=(-1, 0)), H100, "sbhd")["output"]
    assert (plain.dtype, plain.window) == ("bf16", None), "FP8 linear layers leave attention in bfloat16"
    fp8 = attention_cases(config(fp8="hybrid", fp8_dot_product_attention=True, window_size=(64, 0)), H100, "sbhd")
    assert (fp8["output"].dtype, fp8["output"].window) == ("fp8", 64)
    assert (fp8["audio mass"].dtype, fp8["audio mass"].window, fp8["audio mass"].head_dim_v) == ("bf16", 64, 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has what the test wants to be missing")
def test_a_host_without_transformer_engine_gets_an_error_naming_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"use a container that has it, or the SDPA backend|needs a CUDA device"):
        te_attention(AttentionSession([0]), engine=None)
