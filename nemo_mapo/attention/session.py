"""What the core-attention modules of one model share about the forward pass in progress."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HeadReduction = Literal["max", "mean"]


@dataclass(frozen=True, kw_only=True)
class ForwardInputs:
    """Masks of one forward pass, in key positions (with a KV cache: of the whole cache, not of the new tokens)."""

    segment_ids: Int[Tensor, "batch time_k"] | None
    """Packed-sample ids, 0 on padding; None when causality alone is enough (one right-padded sample a row)."""
    audio_key_mask: Bool[Tensor, "batch time_k"] | None
    """True on audio positions; None captures nothing."""

    def up_to(self, time_k: int) -> "ForwardInputs":
        """Keep the first `time_k` positions; ValueError where fewer are known."""
        return ForwardInputs(
            segment_ids=_first_positions("segment_ids", self.segment_ids, time_k),
            audio_key_mask=_first_positions("audio_key_mask", self.audio_key_mask, time_k),
        )


class AttentionSession:
    """Carries masks to the core-attention modules of one model and audio masses back, for one forward at a time.

    Every core attention of the model holds the same session; nothing is global. The masses of a forward stay
    readable until the next one begins, and they are part of the autograd graph.

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
        self._inputs: ForwardInputs | None = None
        self._masses: dict[int, Tensor] = {}

    @contextmanager
    def forward(
        self,
        *,
        segment_ids: Int[Tensor, "batch time_k"] | None = None,
        audio_key_mask: Bool[Tensor, "batch time_k"] | None = None,
    ) -> Iterator[None]:
        """Set the masks of one model forward, and forget the masses of the forward before.

        With a KV cache and no `audio_key_mask` one block may span all decoding steps. RuntimeError when another forward
        of this session is still active; a forward that fails leaves no masses behind.
        """
        if self._inputs is not None:
            raise RuntimeError("this session already has an active forward; forwards do not nest")
        self._masses = {}
        self._inputs = ForwardInputs(segment_ids=segment_ids, audio_key_mask=audio_key_mask)
        completed = False
        try:
            yield
            completed = True
        finally:
            self._inputs = None
            if not completed:
                self._masses = {}

    @property
    def inputs(self) -> ForwardInputs:
        """Masks of the active forward; RuntimeError when there is none."""
        if self._inputs is None:
            raise RuntimeError("attention ran outside AttentionSession.forward(...), which says what it may see")
        return self._inputs

    def captures(self, layer: int) -> bool:
        """Whether the active forward wants the mass of 0-based `layer`."""
        return self.inputs.audio_key_mask is not None and layer in self.target_layers

    def record(self, layer: int, mass: Float[Tensor, "batch head query"]) -> None:
        """Store the mass of 0-based `layer`; RuntimeError when it reported before in this forward."""
        assert self.captures(layer), f"layer {layer} reported a mass that nobody asked for"
        if layer in self._masses:
            raise RuntimeError(f"layer {layer} ran twice in one forward; open one session.forward(...) per model call")
        self._masses[layer] = mass

    def layer_head_masses(self) -> dict[int, Float[Tensor, "batch head query"]]:
        """Mass of every target layer, by 0-based layer; RuntimeError when one of them did not report."""
        silent = [layer for layer in self.target_layers if layer not in self._masses]
        if silent:
            raise RuntimeError(
                f"no audio mass from layers {silent}: the last forward had no audio_key_mask, has not run, or failed"
            )
        return {layer: self._masses[layer] for layer in self.target_layers}

    def audio_mass(self, reduction: HeadReduction = "max") -> Float[Tensor, "batch query"]:
        """Mean over target layers of the max (or mean) over heads: the paper's a_t.

        RuntimeError when a target layer did not report, ValueError for an unknown reduction.
        """
        layers = [_over_heads(mass, reduction) for mass in self.layer_head_masses().values()]
        return torch.stack(layers).mean(0)


def _over_heads(mass: Tensor, reduction: HeadReduction) -> Tensor:
    """Reduce `[batch, head, query]` over all heads of a layer.

    The one place where heads meet. Under tensor parallelism a rank holds a share of the heads, and the reduction
    has to span ranks; the core attention refuses that layout until it does. `max` sends its gradient to
    the first largest head alone, as in the paper's Eq. 13.
    """
    if reduction == "max":
        return mass.max(dim=1).values
    if reduction == "mean":
        return mass.mean(dim=1)
    raise ValueError(f"reduction={reduction!r} is not one of 'max', 'mean'")


def _first_positions(name: str, mask: Tensor | None, time_k: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape[1] < time_k:
        raise ValueError(f"{name} covers {mask.shape[1]} positions, attention has {time_k} keys")
    return mask[:, :time_k]
