"""How several of Hugging Face's tensors are laid out in one of Megatron's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor


class Layout(Protocol):
    """A rule that is used both ways, bit for bit: `split(fuse(parts))` returns the parts."""

    def fuse(self, parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """Megatron's tensor."""
        ...

    def split(self, fused: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
        """Hugging Face's tensors, in the order of the rule."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def fuse(self, parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """See `Layout`."""
        (tensor,) = parts
        return tensor

    def split(self, fused: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
        """See `Layout`."""
        return [fused]


@dataclass(frozen=True)
class GateUp:
    """The SwiGLU's two matrices, gate above up."""

    def fuse(self, parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """See `Layout`."""
        return torch.cat(list(parts))

    def split(self, fused: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
        """See `Layout`."""
        return [part.clone() for part in fused.chunk(2)]


@dataclass(frozen=True, kw_only=True)
class QueryKeyValue:
    """Rows of each group together: its query heads, then its key head, then its value head."""

    groups: int
    heads_per_group: int

    def fuse(self, parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """See `Layout`."""
        by_group = [part.view(self.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(self, fused: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
        """See `Layout`."""
        by_group = fused.view(self.groups, -1, *fused.shape[1:])
        width = by_group.shape[1] // (self.heads_per_group + 2)
        parts = torch.split(by_group, [self.heads_per_group * width, width, width], dim=1)
        return [part.flatten(0, 1).clone() for part in parts]
