"""State of the forward pass in progress that the core-attention modules of one model share."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemo_mapo.attention.mass import Blocked

HeadReduction = Literal["max", "mean"]


@dataclass(frozen=True, kw_only=True)
class Deafness:
    """Tokens that attend to no audio in a forward pass, and the layers this applies to.

    An intervention that measures what listening is worth: `Deafness(queries=late)` removes late tokens' attention to
    the audio and nothing else. They still attend to earlier tokens that did listen.
    """

    queries: Bool[Tensor, "batch time_q"]
    """True on deaf tokens; never on audio tokens."""
    audio_keys: Bool[Tensor, "batch time_k"] | None = None
    """True on audio keys; with a KV cache it covers the whole cache. None: the placeholders among the tokens read."""
    layers: tuple[int, ...] | None = None
    """0-based decoder layers; None means all of them."""

    def to(self, device: torch.device) -> "Deafness":
        """Copy to `device`."""
        keys = None if self.audio_keys is None else self.audio_keys.to(device)
        return Deafness(queries=self.queries.to(device), audio_keys=keys, layers=self.layers)


class AttentionSession:
    """Tells the core-attention modules of one model which keys are audio, and collects their audio masses.

    Every core attention of the model holds the same session; nothing is global. The masses of a forward stay
    readable until the next one begins, and they are part of the autograd graph. Outside a forward nothing is captured:
    layers that activation recompute runs again in the backward pass report nothing, and target layers are never
    recomputed.

        with session.forward(audio_key_mask=mask):
            logits = model(tokens)
        audio_mass = session.audio_mass("max")
    """

    def __init__(self, target_layers: Iterable[int]) -> None:
        """Name the 0-based decoder layers whose mass is captured."""
        self.target_layers = tuple(sorted(target_layers))
        if not self.target_layers:
            raise ValueError("target_layers is empty: name at least one decoder layer (0-based)")
        if self.target_layers[0] < 0:
            raise ValueError(f"target_layers={list(self.target_layers)}: layers are numbered from 0")
        if len(set(self.target_layers)) != len(self.target_layers):
            raise ValueError(f"target_layers={list(self.target_layers)} names a layer twice")
        self._active = False
        self._audio_key_mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._read_at: Tensor | None = None
        self._deaf: Deafness | None = None
        self._masses: dict[int, Tensor] = {}

    @contextmanager
    def forward(
        self,
        *,
        audio_key_mask: Bool[Tensor, "batch time_k"] | None = None,
        positions: Int[Tensor, " time"] | None = None,
        read_at: Int[Tensor, " read"] | None = None,
        deaf: Deafness | None = None,
    ) -> Iterator[None]:
        """Describe one model forward, and discard the masses of the previous one.

        Args:
            audio_key_mask: True on audio keys; None captures nothing. With a KV cache it covers the whole cache.
            positions: position of each token of the row in its own sequence, if they are not 0, 1, 2, ...
            read_at: tokens of the row whose logits are needed; None means all.
            deaf: tokens that attend to no audio; its `audio_keys` must be set. Layers that activation recompute runs
                again in the backward pass would not know of it, so run such a model without gradient.

        Raises:
            RuntimeError: another forward of this session is still active. One that fails leaves no masses behind.
        """
        if self._active:
            raise RuntimeError("this session already has an active forward; forwards do not nest")
        self._masses = {}
        self._active, self._audio_key_mask = True, audio_key_mask
        self._positions, self._read_at, self._deaf = positions, read_at, deaf
        completed = False
        try:
            yield
            completed = True
        finally:
            self._active, self._audio_key_mask = False, None
            self._positions = self._read_at = self._deaf = None
            if not completed:
                self._masses = {}

    def placed(self, rotations: Float[Tensor, "time 1 1 dim"]) -> Float[Tensor, "placed 1 1 dim"]:
        """Rotations for the tokens of the active forward, picked from those of positions 0, 1, 2, ..."""
        return rotations if self._positions is None else rotations[self._positions]

    def read(self, hidden: Float[Tensor, "time batch hidden"]) -> Float[Tensor, "read batch hidden"]:
        """Hidden states of the tokens whose logits the active forward needs."""
        return hidden if self._read_at is None else hidden[self._read_at]

    def captures(self, layer: int) -> bool:
        """Whether the active forward, if any, captures the mass of 0-based `layer`."""
        return self._audio_key_mask is not None and layer in self.target_layers

    def audio_keys(self, time_k: int) -> Bool[Tensor, "batch time_k"]:
        """The audio-key mask of the active forward for its first `time_k` keys; ValueError if fewer are known."""
        assert self._audio_key_mask is not None, "asked for audio keys when nothing is captured"
        if self._audio_key_mask.shape[1] < time_k:
            raise ValueError(
                f"audio_key_mask covers {self._audio_key_mask.shape[1]} positions, attention has {time_k} keys"
            )
        return self._audio_key_mask[:, :time_k]

    def blocked(self, layer: int, time_k: int) -> Blocked | None:
        """The queries and audio keys that the active forward blocks in 0-based `layer`, if any.

        ValueError if fewer than `time_k` keys are known.
        """
        deaf = self._deaf
        if deaf is None or (deaf.layers is not None and layer not in deaf.layers):
            return None
        assert deaf.audio_keys is not None, "a forward with deaf tokens names the audio keys"
        if deaf.audio_keys.shape[1] < time_k:
            raise ValueError(f"deaf.audio_keys cover {deaf.audio_keys.shape[1]} positions, attention has {time_k} keys")
        return Blocked(deaf.queries, deaf.audio_keys[:, :time_k])

    def record(self, layer: int, mass: Float[Tensor, "batch head query"]) -> None:
        """Store the mass of 0-based `layer`; RuntimeError if it has already reported in this forward."""
        assert self.captures(layer), f"layer {layer} reported a mass that was not requested"
        if layer in self._masses:
            raise RuntimeError(f"layer {layer} ran twice in one forward; open one session.forward(...) per model call")
        self._masses[layer] = mass

    def layer_head_masses(self) -> dict[int, Float[Tensor, "batch head query"]]:
        """Mass of every target layer, by 0-based layer; RuntimeError if one of them did not report."""
        silent = [layer for layer in self.target_layers if layer not in self._masses]
        if silent:
            raise RuntimeError(
                f"no audio mass from layers {silent}: the last forward had no audio_key_mask, has not run, or failed"
            )
        return {layer: self._masses[layer] for layer in self.target_layers}

    def audio_mass(
        self, reduction: HeadReduction = "max", *, head_group: dist.ProcessGroup | None = None
    ) -> Float[Tensor, "batch query"]:
        """Mean over target layers of the max (or mean) over heads: the paper's a_t.

        `head_group` holds the ranks over which heads are sharded (tensor parallelism); the reduction spans them.
        RuntimeError if a target layer did not report, ValueError for an unknown reduction.
        """
        layers = torch.stack(list(self.layer_head_masses().values()))
        return over_heads(layers, reduction, head_group).mean(0)


def over_heads(
    masses: Float[Tensor, "layer batch head query"], reduction: HeadReduction, head_group: dist.ProcessGroup | None
) -> Float[Tensor, "layer batch query"]:
    """Reduce over all heads of a layer, including those on other ranks.

    `max` sends its gradient only to the first largest head, as in the paper's Eq. 13: under tensor parallelism only
    the rank that holds this head has a gradient. Every rank of the group must back-propagate the same loss.
    """
    if reduction == "max":
        largest = masses.max(dim=2).values
        return largest if head_group is None else _MaxOverRanks.apply(largest, head_group)  # type: ignore[no-untyped-call]
    if reduction == "mean":
        mean = masses.mean(dim=2)
        return mean if head_group is None else _MeanOverRanks.apply(mean, head_group)  # type: ignore[no-untyped-call]
    raise ValueError(f"reduction={reduction!r} is not one of 'max', 'mean'")


class _MaxOverRanks(torch.autograd.Function):
    """Maximum over ranks whose gradient goes to the first rank that holds it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        gathered = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(gathered, local.contiguous(), group=group)
        largest, winner = torch.stack(gathered).max(dim=0)
        ctx.save_for_backward(winner == group.rank())
        return largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (won,) = ctx.saved_tensors
        return grads[0] * won, None


class _MeanOverRanks(torch.autograd.Function):
    """Mean over ranks with equally many heads; each rank's heads get their share of the gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = group.size()
        total = local.clone()
        dist.all_reduce(total, group=group)
        mean: Tensor = total / ctx.size
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        share: Tensor = grads[0] / ctx.size
        return share, None
