"""Megatron's static KV cache as slots: allocated once with a fixed shape, and reused for successive completions."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from nemo_mapo.upstream.megatron import key_value_cache


class SlotCache:
    """A cache of fixed shape; active completions occupy the first slots and all end at the same position."""

    def __init__(self, slots: int, room: int) -> None:
        """Reserve `slots` completions of `room` positions; memory is allocated on first use."""
        self.context = key_value_cache(slots, room)
        self.context.enable_decode_mode()

    @property
    def end(self) -> int:
        """Positions that are filled."""
        filled: int = self.context.sequence_len_offset
        return filled

    @property
    def room(self) -> int:
        """Positions there are."""
        positions: int = self.context.max_sequence_length
        return positions

    def begin(self, end: int) -> None:
        """Empty the cache; the first completions will end at `end`."""
        self.context.sequence_len_offset = end

    def admit(
        self,
        read: StaticInferenceContext,
        copies: Int[Tensor, " arriving"],
        *,
        first: int,
        rotate: Callable[[Tensor, int], Tensor],
    ) -> None:
        """Copy computed prompts into slots from `first` on, so that they end at `end`; empties `read`.

        Args:
            read: prompts from position 0, filled up to its `sequence_len_offset`.
            copies: row of `read` for each slot; a row may be taken several times (the completions of one prompt).
            first: slot of the first; those before it are kept.
            rotate: keys `[time, batch, kv_heads, dim]` as they would be this many positions later.
        """
        width = read.sequence_len_offset
        start, slots = self.end - width, slice(first, first + len(copies))
        assert start >= 0, f"a prompt of {width} positions cannot end at {self.end}"
        # Layer by layer, so that both exist in full for one layer only.
        for layer in list(read.key_value_memory_dict):
            key, value = (memory[:width] for memory in read.key_value_memory_dict.pop(layer))
            keys, values = self._memory(layer, like=key)
            keys[start : self.end, slots] = (rotate(key, start) if start > 0 else key)[:, copies]
            values[start : self.end, slots] = value[:, copies]

    def close_ranks(self, kept: Int[Tensor, " kept"]) -> Int[Tensor, " kept"]:
        """Move completions from the last slots into free ones, until the kept ones occupy the first slots.

        Args:
            kept: slots to keep, in ascending order.

        Returns:
            The slot from which each now comes.
        """
        slots = torch.arange(len(kept), device=kept.device)
        free, movers = slots[~torch.isin(slots, kept)], kept[kept >= len(kept)]
        for memories in self.context.key_value_memory_dict.values():
            for memory in memories:
                memory[: self.end, free] = memory[: self.end, movers]
        slots[free] = movers
        return slots

    def _memory(self, layer: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        memories: dict[int, tuple[Tensor, Tensor]] = self.context.key_value_memory_dict
        if layer not in memories:
            # What lies before a prompt is masked, but must be finite all the same. A head's positions lie one after
            # the other, as attention reads them; Megatron indexes [time, batch, kv_heads, dim].
            heads, dim = like.shape[2:]
            shape = (self.context.max_batch_size, heads, self.room, dim)
            keys, values = like.new_zeros(shape), like.new_zeros(shape)
            memories[layer] = (keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3))
        return memories[layer]
