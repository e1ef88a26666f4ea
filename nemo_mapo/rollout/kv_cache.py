"""Rows of Megatron's static KV cache: shared by the completions of a prompt, dropped when a completion is finished."""

from collections.abc import Callable

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


def join_rows(
    live: StaticInferenceContext, arrived: StaticInferenceContext, rotate: Callable[[Tensor, int], Tensor]
) -> StaticInferenceContext:
    """A cache of the rows of `live` and, moved to end where they end, those of `arrived`; both are emptied.

    Args:
        live: filled up to its `sequence_len_offset`, which is at least that of `arrived`.
        arrived: prompts that have just been read, from position 0.
        rotate: keys `[time, batch, kv_heads, dim]` as they would be this many positions later.
    """
    end, width = live.sequence_len_offset, arrived.sequence_len_offset
    assert width <= end, f"a prompt of {width} positions cannot end at {end}"
    joined = StaticInferenceContext(live.max_batch_size + arrived.max_batch_size, live.max_sequence_length)
    joined.sequence_len_offset = end
    joined.materialize_only_last_token_logits = True
    joined.enable_decode_mode()
    for layer in list(live.key_value_memory_dict):
        (live_key, live_value), (key, value) = (one.key_value_memory_dict.pop(layer) for one in (live, arrived))
        joined.key_value_memory_dict[layer] = (
            _join(live_key, rotate(key[:width], end - width), end),
            _join(live_value, value[:width], end),
        )
    return joined


def _join(live: Tensor, arrived: Tensor, end: int) -> Tensor:
    room, rows, kv_heads, dim = live.shape
    joined = live.new_empty(room, rows + arrived.shape[1], kv_heads, dim)
    joined[:end, :rows] = live[:end]
    # What lies before a prompt is masked; it must be finite all the same.
    joined[: end - len(arrived), rows:] = 0
    joined[end - len(arrived) : end, rows:] = arrived
    return joined


def _take(memory: Tensor, rows: Tensor, max_sequence_length: int) -> Tensor:
    """Select rows of `[filled, batch, kv_heads, dim]`, with room behind them that stays unset."""
    filled, _, kv_heads, dim = memory.shape
    taken = memory.new_empty(max_sequence_length, len(rows), kv_heads, dim)
    torch.index_select(memory, 1, rows, out=taken[:filled])
    return taken
