"""Signals along completions of unequal length, by relative position (the curves of the paper's Fig. 2)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.objective.temporal import part_of_token

NUM_BINS = 20
"""Enough to see where attention falls off, few enough to be smooth on a few hundred completions."""
_DIGITS = 5


class PositionProfile:
    """Token-weighted means of named signals in `NUM_BINS` bins of relative position t / T."""

    def __init__(self) -> None:
        self.count = torch.zeros(NUM_BINS, dtype=torch.float64)
        self.sums: dict[str, Tensor] = {}
        self.third_counts = torch.zeros(3, dtype=torch.float64)
        self.third_mass = torch.zeros(3, dtype=torch.float64)

    def add(self, signals: Mapping[str, Float[Tensor, "_"]]) -> None:
        """Count the tokens of a completion, by the signals of each of them."""
        written = torch.ones_like(signals["audio_mass_max"], dtype=torch.bool)
        bins, thirds = (part_of_token(written, parts) for parts in (NUM_BINS, 3))
        self.third_counts.index_add_(0, thirds, torch.ones_like(thirds, dtype=torch.float64))
        self.third_mass.index_add_(0, thirds, signals["audio_mass_max"].double())
        self.count.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
        for name, values in signals.items():
            total = self.sums.setdefault(name, torch.zeros(NUM_BINS, dtype=torch.float64))
            total.index_add_(0, bins, values.double())

    @classmethod
    def merged(cls, parts: Iterable["PositionProfile"]) -> "PositionProfile":
        """The profile of all tokens that the parts have counted."""
        whole = cls()
        for part in parts:
            whole.count += part.count
            whole.third_counts += part.third_counts
            whole.third_mass += part.third_mass
            for name, values in part.sums.items():
                whole.sums[name] = whole.sums.get(name, torch.zeros(NUM_BINS, dtype=torch.float64)) + values
        return whole

    def mean(self, name: str) -> Float[Tensor, " bins"]:
        """Mean of a signal per bin; bins without a token are NaN."""
        return self.sums[name] / self.count

    def thirds(self) -> dict[str, float]:
        """Audio mass over all tokens, in the first and in the last third; a third without tokens is left out."""
        names = ("audio_mass_early", None, "audio_mass_late")
        found = zip(names, self.third_mass.tolist(), self.third_counts.tolist(), strict=True)
        return {
            "audio_mass": float(self.third_mass.sum() / self.third_counts.sum()),
            "delta_h_nats": float(self.sums["delta_h_nats"].sum() / self.count.sum()),
            **{name: mass / count for name, mass, count in found if name is not None and count > 0},
        }

    def record(self, step: int, label: str) -> dict[str, Any]:
        """One line of profiles.jsonl: the bins that hold tokens."""
        kept = self.count > 0
        centres = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS
        curves = {name: _rounded(self.mean(name)[kept]) for name in self.sums}
        return {"step": step, "label": label, "position": _rounded(centres[kept]), **curves,
                "count": self.count[kept].int().tolist()}  # fmt: skip


def _rounded(values: Float[Tensor, " bins"]) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
