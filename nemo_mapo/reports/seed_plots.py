"""Charts over the seeds of several variants: points with intervals, curves with bands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nemo_mapo.reports.estimates import Estimate
from nemo_mapo.reports.plots import (
    FIGURE_SIZE_INCHES,
    NICE_STEPS,
    SVG_RC,
    Level,
    Scale,
    draw_levels,
    new_chart,
    percent_tick,
    scale_steps,
    scale_values,
    to_svg,
)
from nemo_mapo.reports.theme import GRID, INK

ROW_INCHES = 0.42
"""Height of a variant's row in a chart of points."""

FRAME_INCHES = 0.7
"""Height of what surrounds the rows: axis, its label, margins."""

SPREAD = 0.22
"""Seeds are drawn up to this far above and below their row's middle, so that equal values stay visible."""

BAND_OPACITY = 0.15


@dataclass(frozen=True, kw_only=True)
class Group:
    """The seeds of one variant."""

    label: str
    colour: str
    values: Mapping[int, float]
    """By seed."""
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Band:
    """The curves of one variant's seeds on common steps."""

    label: str
    colour: str
    steps: Int[NDArray[np.int64], " step"]
    values: Float[NDArray[np.float64], "seed step"]


def groups_svg(name: str, groups: Sequence[Group], scale: Scale, levels: Sequence[Level] = ()) -> str:
    """One row a variant: a dot for each seed, a bar at the mean, a line over its interval."""
    height = FRAME_INCHES + ROW_INCHES * len(groups)
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name, "axes.grid.axis": "x"}):
        figure, axes = new_chart((FIGURE_SIZE_INCHES[0], height))
        rows = _seed_rows(groups)
        _thread_seeds(axes, groups, rows)
        for row, group in enumerate(groups):
            found = group.estimate
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [row, row], color=group.colour, linewidth=1.2)
            axes.plot([found.mean, found.mean], [row - SPREAD, row + SPREAD], color=group.colour, linewidth=3)
            for seed, value in group.values.items():
                axes.plot(value, row + rows[seed], "o", color=group.colour, markersize=5, markeredgecolor="white")
        for level in levels:
            axes.axvline(level.value, color=INK, linewidth=1, linestyle=(0, (1.5, 2.5)))
        axes.set_yticks(range(len(groups)), [group.label for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel(scale.label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=NICE_STEPS))
        if scale.kind == "percent":
            axes.xaxis.set_major_formatter(percent_tick())
        words = "; ".join(f"{group.label} {group.estimate.mean:.3g} over {len(group.values)} seeds" for group in groups)
        return to_svg(figure, name, words)


def bands_svg(name: str, bands: Sequence[Band], scale: Scale, levels: Sequence[Level] = ()) -> str:
    """One curve a variant: the mean over its seeds, in a band from the lowest to the highest.

    There is no legend: the page has one key for all charts.
    """
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name}):
        figure, axes = new_chart()
        for band in bands:
            mean = band.values.mean(axis=0)
            low, high = band.values.min(axis=0), band.values.max(axis=0)
            axes.fill_between(band.steps, low, high, color=band.colour, alpha=BAND_OPACITY, linewidth=0)
            axes.plot(band.steps, mean, color=band.colour, marker="o" if len(mean) == 1 else "")
        draw_levels(axes, levels)
        scale_steps(axes)
        scale_values(axes, scale)
        words = "; ".join(f"{band.label} ends at {band.values[:, -1].mean():.3g}" for band in bands)
        return to_svg(figure, name, words)


def _seed_rows(groups: Sequence[Group]) -> dict[int, float]:
    """Vertical place of each seed within a row, the same in every row."""
    seeds = sorted({seed for group in groups for seed in group.values})
    places = np.linspace(-SPREAD, SPREAD, len(seeds)) if len(seeds) > 1 else np.zeros(len(seeds))
    return {seed: float(place) for seed, place in zip(seeds, places, strict=True)}


def _thread_seeds(axes: Axes, groups: Sequence[Group], rows: Mapping[int, float]) -> None:
    for seed, place in rows.items():
        points = [(group.values[seed], row + place) for row, group in enumerate(groups) if seed in group.values]
        axes.plot([x for x, _ in points], [y for _, y in points], color=GRID, linewidth=1, zorder=0)
