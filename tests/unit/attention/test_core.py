"""The Megatron core attention: same attention, audio keys from the session, mass to the session."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.attention.dense import dense_attention_weights, dense_audio_attention_mass
from nemo_mapo.attention.session import AttentionSession

HEADS, KV_HEADS, DIM, BATCH = 4, 2, 8, 2


def megatron_config(**changes: Any) -> TransformerConfig:
    settings = {"num_layers": 2, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "attention_dropout": 0.0}
    return TransformerConfig(**(settings | changes))


def core_attention(session: AttentionSession, layer_number: int = 1, **changes: Any) -> SDPACoreAttention:
    return SDPACoreAttention(megatron_config(**changes), layer_number, AttnMaskType.causal, "self", session=session)


def projections(time: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as Megatron hands them over: time first."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(time, BATCH, HEADS, DIM, generator=generator),
        torch.randn(time, BATCH, KV_HEADS, DIM, generator=generator),
        torch.randn(time, BATCH, KV_HEADS, DIM, generator=generator),
    )


def dense_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    weights = dense_attention_weights(query.transpose(0, 1), key.transpose(0, 1), **options)
    values = value.repeat_interleave(HEADS // KV_HEADS, dim=2)
    return torch.einsum("bhqk,kbhd->qbhd", weights, values).flatten(2)


class HeadWidths(TorchDispatchMode):
    """Records the head width of every fused attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func.name() and "backward" not in func.name():
            self.seen.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def test_output_and_mass_equal_dense_attention() -> None:
    session = AttentionSession([0])
    query, key, value = projections(10)
    audio = torch.zeros(BATCH, 10, dtype=torch.bool)
    audio[:, 2:5] = True
    segment_ids = torch.tensor([[1] * 6 + [2] * 4, [1] * 10])
    with session.forward(audio_key_mask=audio):
        output = core_attention(session)(query, key, value, segment_ids, attn_mask_type=AttnMaskType.causal)
    torch.testing.assert_close(output, dense_output(query, key, value, segment_ids=segment_ids))
    dense = dense_audio_attention_mass(query.transpose(0, 1), key.transpose(0, 1), audio, segment_ids=segment_ids)
    torch.testing.assert_close(session.layer_head_masses()[0], dense)


def test_layers_count_from_zero_and_only_targets_report() -> None:
    session = AttentionSession([1])
    tensors = projections(4)
    with session.forward(audio_key_mask=torch.ones(BATCH, 4, dtype=torch.bool)):
        core_attention(session, layer_number=1)(*tensors, None)
        with pytest.raises(RuntimeError, match="no audio mass"):
            session.audio_mass()
        core_attention(session, layer_number=2)(*tensors, None)
    assert list(session.layer_head_masses()) == [1]


def test_without_an_audio_mask_nothing_is_captured_and_the_kernel_call_is_plain() -> None:
    session = AttentionSession([0])
    attention = core_attention(session)
    tensors = projections(6)
    with session.forward(), HeadWidths() as widths:
        attention(*tensors, None)
    assert widths.seen == [DIM]
    with pytest.raises(RuntimeError, match="no audio mass"):
        session.layer_head_masses()
    with session.forward(audio_key_mask=torch.ones(BATCH, 6, dtype=torch.bool)), HeadWidths() as widths:
        attention(*tensors, None)
    assert widths.seen == [2 * DIM], "one call, widened by eight columns"


@pytest.mark.parametrize("left_padding", [0, 3])
@pytest.mark.parametrize("steps", [[7, 1, 1, 1], [4, 3, 3], [1] * 10])
def test_a_key_cache_gives_the_output_and_mass_of_the_full_pass(left_padding: int, steps: list[int]) -> None:
    """Megatron asks for no mask after the prompt; a chunk of new tokens is causal all the same."""
    session = AttentionSession([0])
    attention = core_attention(session)
    query, key, value = projections(10)
    audio = torch.zeros(BATCH, 12, dtype=torch.bool)
    audio[:, left_padding + 1 : 7] = True
    segment_ids = torch.ones(BATCH, 12, dtype=torch.long)
    segment_ids[0, :left_padding] = 0
    segments = segment_ids if left_padding else None
    with session.forward(audio_key_mask=audio):
        full = attention(query, key, value, segments)
    full_mass = session.layer_head_masses()[0]
    outputs, masses, end = [], [], 0
    for count in steps:
        begin, end = end, end + count
        mask_type = AttnMaskType.no_mask if begin else AttnMaskType.causal
        with session.forward(audio_key_mask=audio):
            outputs.append(attention(query[begin:end], key[:end], value[:end], segments, attn_mask_type=mask_type))
        masses.append(session.layer_head_masses()[0])
    torch.testing.assert_close(torch.cat(outputs), full)
    torch.testing.assert_close(torch.cat(masses, dim=-1), full_mass)


def test_one_forward_spans_all_decoding_steps_when_nothing_is_captured() -> None:
    session = AttentionSession([0])
    query, key, value = projections(5)
    attention = core_attention(session)
    with session.forward():
        steps = [attention(query[t : t + 1], key[: t + 1], value[: t + 1], None) for t in range(5)]
        torch.testing.assert_close(torch.cat(steps), attention(query, key, value, None))


def test_a_decoding_step_over_left_padding_sees_what_the_full_pass_sees() -> None:
    """Where nothing is captured one query takes a kernel of its own."""
    session = AttentionSession([0])
    query, key, value = projections(8)
    attention = core_attention(session)
    segment_ids = torch.ones(BATCH, 8, dtype=torch.long)
    segment_ids[0, :3] = 0
    full = attention(query, key, value, segment_ids)
    last = attention(query[7:], key, value, segment_ids, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(last, full[7:])
    torch.testing.assert_close(full, dense_output(query, key, value, segment_ids=segment_ids))


def test_outside_a_forward_attention_is_the_same_and_reports_nothing() -> None:
    """As when activation recompute runs a layer again in the backward pass."""
    session = AttentionSession([1])
    query, key, value = projections(5)
    torch.testing.assert_close(core_attention(session)(query, key, value, None), dense_output(query, key, value))
    with pytest.raises(RuntimeError, match="no audio mass"):
        session.layer_head_masses()


def test_a_packed_row_equals_its_sequences_one_by_one() -> None:
    session = AttentionSession([0])
    attention = core_attention(session)
    lengths = [4, 1, 6]
    query, key, value = (tensor[:, 0] for tensor in projections(sum(lengths)))
    audio = torch.zeros(1, sum(lengths), dtype=torch.bool)
    audio[0, [1, 4, 6, 7]] = True
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with session.forward(audio_key_mask=audio):
        packed = attention(query, key, value, None, packed_seq_params=packing)
    mass = session.layer_head_masses()[0]
    for start, end in pairwise(bounds.tolist()):
        alone = tuple(tensor[start:end, None] for tensor in (query, key, value))
        with session.forward(audio_key_mask=audio[:, start:end]):
            output = attention(*alone, None)
        torch.testing.assert_close(packed[start:end], output[:, 0])
        torch.testing.assert_close(mass[:, :, start:end], session.layer_head_masses()[0])


def test_packing_and_segment_ids_do_not_mix() -> None:
    session = AttentionSession([0])
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    row = tuple(tensor[:, 0] for tensor in projections(3))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        core_attention(session)(*row, torch.ones(1, 3, dtype=torch.long), packed_seq_params=packing)


def test_masks_that_are_shorter_than_the_keys_are_refused() -> None:
    session = AttentionSession([0])
    with (
        session.forward(audio_key_mask=torch.ones(BATCH, 3, dtype=torch.bool)),
        pytest.raises(ValueError, match="audio_key_mask covers 3 positions, attention has 4 keys"),
    ):
        core_attention(session)(*projections(4), None)


def test_megatron_masks_are_refused() -> None:
    session = AttentionSession([0])
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    with session.forward(), pytest.raises((ValueError, TypeError)):
        core_attention(session)(*projections(3), mask)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"context_parallel_size": 2}, "context_parallel_size=2"),
        ({"window_size": (4, 0)}, "window_size"),
    ],
)
def test_what_the_module_cannot_do_is_refused_when_it_is_built(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        core_attention(AttentionSession([0]), **changes)


def test_only_causal_self_attention_is_built() -> None:
    for mask_type, attention_type in ((AttnMaskType.padding, "self"), (AttnMaskType.causal, "cross")):
        with pytest.raises(ValueError, match="only causal self-attention"):
            SDPACoreAttention(megatron_config(), 1, mask_type, attention_type, session=AttentionSession([0]))
