"""Charts of the grounding analysis: measured points with intervals, bars by part of speech, a map of heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from nemo_mapo.reports.plots import (
    FIGURE_SIZE_INCHES,
    NICE_STEPS,
    SVG_RC,
    Level,
    Scale,
    draw_levels,
    legend,
    new_chart,
    percent_tick,
    scale_values,
    to_svg,
)
from nemo_mapo.reports.theme import INK

BAR_INCHES = 0.34
"""Height of a row of bars."""
FRAME_INCHES = 0.95
"""Height of what surrounds the rows."""
DODGE = 0.012
"""Points of several series at one place are drawn this far apart, as a share of the axis."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured value with its interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Points:
    """One series."""

    label: str
    colour: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One value for each row of a bar chart, NaN where there is none."""

    label: str
    colour: str
    values: Sequence[float]


def points_svg(
    name: str,
    series: Sequence[Points],
    scale: Scale,
    *,
    x_label: str,
    x_percent: bool = False,
    levels: Sequence[Level] = (),
) -> str:
    """Series of points joined by lines, with their intervals."""
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name}):
        figure, axes = new_chart()
        width = max(point.x for item in series for point in item.points)
        for number, item in enumerate(series):
            shift = (number - (len(series) - 1) / 2) * DODGE * width
            x = np.array([point.x for point in item.points]) + shift
            axes.plot(x, [point.y for point in item.points], "o-", color=item.colour, label=item.label, markersize=4)
            for place, point in zip(x, item.points, strict=True):
                if point.low is not None and point.high is not None:
                    axes.plot([place, place], [point.low, point.high], color=item.colour, linewidth=1)
        draw_levels(axes, levels)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=NICE_STEPS))
        if x_percent:
            axes.xaxis.set_major_formatter(percent_tick())
        scale_values(axes, scale)
        legend(axes)
        words = "; ".join(f"{item.label} from {item.points[0].y:.3g} to {item.points[-1].y:.3g}" for item in series)
        return to_svg(figure, name, words)


def bars_svg(name: str, rows: Sequence[str], bars: Sequence[Bars], scale: Scale) -> str:
    """Horizontal bars, several in a row."""
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name, "axes.grid.axis": "x"}):
        figure, axes = new_chart((FIGURE_SIZE_INCHES[0], FRAME_INCHES + BAR_INCHES * len(rows)))
        height = 0.8 / len(bars)
        for number, item in enumerate(bars):
            places = np.arange(len(rows)) + (number - (len(bars) - 1) / 2) * height
            axes.barh(places, item.values, height=height, color=item.colour, label=item.label)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel(scale.label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=NICE_STEPS))
        legend(axes)
        words = "; ".join(
            f"{row}: {', '.join(f'{item.label} {item.values[number]:.3g}' for item in bars)}"
            for number, row in enumerate(rows)
        )
        return to_svg(figure, name, words)


def heads_svg(name: str, layers: Sequence[int], mass: Sequence[Sequence[float]]) -> str:
    """A cell for each layer and head, darker where more attention falls on the audio, with its value in it."""
    values = np.asarray(mass)
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name, "axes.grid": False}):
        figure, axes = new_chart((FIGURE_SIZE_INCHES[0], FRAME_INCHES + 0.42 * len(layers)))
        # Cells as vectors: an image inside the SVG would blur and could not be read aloud.
        axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5,
                      color="white" if value > 0.55 else INK)  # fmt: skip
        axes.set_yticks(np.arange(len(layers)) + 0.5, [f"layer {layer}" for layer in layers])
        axes.set_xticks(np.arange(values.shape[1]) + 0.5, [str(head) for head in range(values.shape[1])])
        axes.invert_yaxis()
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("head; % of its attention on the audio")
        words = "; ".join(
            f"layer {layer}: {', '.join(f'{value:.2f}' for value in row)}"
            for layer, row in zip(layers, mass, strict=True)
        )
        return to_svg(figure, name, words)
