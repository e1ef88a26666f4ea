"""Rows of Megatron's static KV cache: shared by the completions of a prompt, dropped when a completion is finished."""

import torch
from jaxtyping import Int
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor


def take_rows(
    context: StaticInferenceContext, rows: Int[Tensor, " taken"], *, max_sequence_length: int
) -> StaticInferenceContext:
    """A cache for decoding whose row i holds the keys and values of row `rows[i]`; `context` is emptied.

    A row may be taken several times (the completions of one prompt) or not at all (finished completions). Layers are
    moved one by one, so that both caches exist in full for one layer only.

    Args:
        context: cache filled up to its `sequence_len_offset`.
        rows: rows to take, in the order of the new cache.
        max_sequence_length: room of the new cache, at least what is filled.
    """
    filled = context.sequence_len_offset
    assert filled <= max_sequence_length, f"{filled} cached positions do not fit {max_sequence_length}"
    taken = StaticInferenceContext(len(rows), max_sequence_length)
    taken.sequence_len_offset = filled
    taken.materialize_only_last_token_logits = True
    taken.enable_decode_mode()
    for layer in list(context.key_value_memory_dict):
        key, value = context.key_value_memory_dict.pop(layer)
        taken.key_value_memory_dict[layer] = tuple(
            _take(memory[:filled], rows, max_sequence_length) for memory in (key, value)
        )
    return taken


def _take(memory: Tensor, rows: Tensor, max_sequence_length: int) -> Tensor:
    """Select rows of `[filled, batch, kv_heads, dim]`, with room behind them that stays unset."""
    filled, _, kv_heads, dim = memory.shape
    taken = memory.new_empty(max_sequence_length, len(rows), kv_heads, dim)
    torch.index_select(memory, 1, rows, out=taken[:filled])
    return taken
