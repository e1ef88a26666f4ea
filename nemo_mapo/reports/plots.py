"""Charts as compact inline SVG: curves over steps, stacked times, profiles over the completion, points per seed."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from nemo_mapo.reports.loading import Series
from nemo_mapo.reports.theme import GRID, INK, MUTED

FIGURE_SIZE_INCHES = (4.5, 2.85)
"""Two such charts fit a laptop page side by side and one fits a phone without its text becoming too small."""

SMOOTHING_SHARE = 1 / 15
"""Window of the moving mean as a share of the curve: wide enough to calm rollout noise, narrow enough to keep bends."""

FAINT = 0.28
"""Opacity of single noisy steps behind their moving mean."""

HEADROOM = 1.12
"""Free space above the highest stack, so that the legend does not lie on the data."""

STACK_CUT = 3.0
"""Stacks above this many times the median are cut off: one slow validation must not flatten every other step."""

LEGEND_CHARACTERS = 58
"""Width of a chart's legend row, in characters of its labels."""

LEGEND_HANDLE_CHARACTERS = 6
"""Width of a legend handle and the gaps around it, in the same unit."""

NICE_STEPS = [1, 2, 2.5, 5, 10]
"""Distances of tick labels, times a power of ten, that are easy to read off."""

SVG_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": "#b8bcc2",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.3,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

_COORDINATES = re.compile(r'( (?:d|x|y|transform|points|width|height|viewBox)=")([^"]*)(")')
_LONG_FRACTION = re.compile(r"(\d+\.\d{2})\d+")
_NOISE = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_FONT_FAMILY = re.compile(r"font-family: [^;\"]*;? ?|font: ([\d.]+px)[^;\"]*")
_ID = re.compile(r'\bid="([^"]+)"')


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    colour: str
    series: Series
    style: Literal["noisy", "measured"] = "noisy"
    """`noisy`: single steps faint, their moving mean strong. `measured`: a marker at each measured step."""
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The vertical axis of a chart."""

    label: str
    """What is shown and its unit."""
    kind: Literal["linear", "log", "percent"] = "linear"
    bottom: float | None = None
    top: float | None = None


def curves_svg(name: str, lines: Sequence[Line], scale: Scale, levels: Sequence[Level] = ()) -> str:
    """Curves over training steps; `name` makes the ids of this chart unique in its page.

    Raises:
        ValueError: no line has a value.
    """
    drawn = [line for line in lines if len(line.series)]
    if not drawn:
        raise ValueError(f"chart {name} has nothing to draw")
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name}):
        figure, axes = new_chart()
        for line in drawn:
            _draw_line(axes, line)
        draw_levels(axes, levels)
        scale_steps(axes)
        scale_values(axes, scale)
        legend(axes)
        return to_svg(figure, name, "; ".join(_in_words(line) for line in drawn))


def stacked_svg(name: str, parts: Sequence[Line], total: Series, scale: Scale) -> str:
    """Parts of a whole over training steps, stacked; `total` is drawn over them.

    A part is taken as zero at steps where it is missing (validation runs only at some).

    Raises:
        ValueError: no part has a value.
    """
    drawn = [part for part in parts if len(part.series)]
    if not drawn:
        raise ValueError(f"chart {name} has nothing to draw")
    steps = np.unique(np.concatenate([part.series.steps for part in drawn]))
    heights = np.stack([_on_grid(part.series, steps) for part in drawn])
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name}):
        figure, axes = new_chart()
        bottom = np.zeros(len(steps))
        for part, height in zip(drawn, heights, strict=True):
            axes.fill_between(
                steps, bottom, bottom + height, step="mid", color=part.colour, linewidth=0, label=part.label
            )
            bottom = bottom + height
        if len(total):
            axes.step(total.steps, total.values, where="mid", color=INK, linewidth=0.9, label="whole step")
        scale_steps(axes)
        scale_values(axes, scale)
        axes.set_ylim(0, HEADROOM * min(float(bottom.max()), STACK_CUT * float(np.median(bottom))))
        legend(axes)
        means = "; ".join(f"{part.label} {part.series.values.mean():.3g} on average" for part in drawn)
        return to_svg(figure, name, means)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A signal over the relative position in a completion."""

    label: str
    colour: str
    position: Float[NDArray[np.float64], " bin"]
    """Bin centres, 0 the first and 1 the last token."""
    values: Float[NDArray[np.float64], " bin"]
    dashed: bool = False


def profiles_svg(name: str, profiles: Sequence[Profile], scale: Scale, levels: Sequence[Level] = ()) -> str:
    """Signals over the relative position in a completion.

    Raises:
        ValueError: no profile is given.
    """
    if not profiles:
        raise ValueError(f"chart {name} has nothing to draw")
    with matplotlib.rc_context({**SVG_RC, "svg.hashsalt": name}):
        figure, axes = new_chart()
        for level in levels:
            axes.axhline(level.value, color=MUTED, linewidth=0.8)
        for profile in profiles:
            axes.plot(
                profile.position,
                profile.values,
                color=profile.colour,
                label=profile.label,
                linestyle=(0, (4, 2)) if profile.dashed else "-",
            )
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(percent_tick())
        axes.set_xlabel("position in the completion")
        scale_values(axes, scale)
        legend(axes)
        words = "; ".join(f"{item.label} from {item.values[0]:.3g} to {item.values[-1]:.3g}" for item in profiles)
        return to_svg(figure, name, words)


def moving_mean(values: Float[NDArray[np.float64], " step"], window: int) -> Float[NDArray[np.float64], " step"]:
    """Centred moving mean; near the ends over the part of the window that lies on the curve."""
    ones = np.ones(min(window, len(values)))
    sums = np.convolve(values, ones, mode="same")
    counts = np.convolve(np.ones(len(values)), ones, mode="same")
    return np.asarray(sums / counts, dtype=np.float64)


def to_svg(figure: Figure, name: str, words: str) -> str:
    """Render to one `<svg>` element without header, metadata or long fractions; `words` is its text for screen
    readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = _NOISE.sub("", buffer.getvalue()).strip()
    svg = _COORDINATES.sub(lambda found: found[1] + _LONG_FRACTION.sub(r"\1", found[2]) + found[3], svg)
    svg = _FONT_FAMILY.sub(lambda found: f"font-size: {found[1]}" if found[1] else "", svg)
    for old in set(_ID.findall(svg)):
        if f"#{old}" in svg:
            svg = re.sub(rf'(id="|#){re.escape(old)}(?=["\)])', rf"\g<1>{name}-{old}", svg)
        else:
            svg = svg.replace(f' id="{old}"', "")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    head = f'<svg {view_box[0]} role="img" aria-label="{escape(words, quote=True)}">'
    return head + re.sub(r"^<svg[^>]*>", "", svg)


def new_figure(size_inches: tuple[float, float] = FIGURE_SIZE_INCHES) -> Figure:
    """An empty figure that belongs to no window system and no global state."""
    figure = Figure(figsize=size_inches, layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    return figure


def new_chart(size_inches: tuple[float, float] = FIGURE_SIZE_INCHES) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes; call it inside the style context."""
    figure = new_figure(size_inches)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _draw_line(axes: Axes, line: Line) -> None:
    steps, values = line.series.steps, line.series.values
    dash: Any = (0, (4, 2)) if line.dashed else "-"
    if line.style == "measured" or len(steps) == 1:
        axes.plot(steps, values, color=line.colour, label=line.label, linestyle=dash, marker="o", markersize=3.6)
        return
    window = max(1, round(SMOOTHING_SHARE * len(steps)))
    if window > 1:
        axes.plot(steps, values, color=line.colour, alpha=FAINT, linewidth=0.8)
    axes.plot(steps, moving_mean(values, window), color=line.colour, label=line.label, linestyle=dash)


def scale_steps(axes: Axes) -> None:
    """The horizontal axis of a curve over training steps."""
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=NICE_STEPS))
    axes.margins(x=0.015)


def scale_values(axes: Axes, scale: Scale) -> None:
    """The vertical axis as `scale` says; call it after drawing."""
    axes.set_ylabel(scale.label)
    if scale.kind == "log":
        axes.set_yscale("log")
        return
    if scale.kind == "percent":
        axes.yaxis.set_major_formatter(percent_tick())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=NICE_STEPS))
    if scale.bottom is not None:
        axes.set_ylim(bottom=scale.bottom)
    if scale.top is not None:
        axes.set_ylim(top=scale.top)


def legend(axes: Axes) -> None:
    """A legend above the axes, in as few rows as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    fitting = [columns for columns in range(1, len(labels) + 1) if _legend_width(labels, columns) <= LEGEND_CHARACTERS]
    columns = max(fitting, default=1)
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _legend_width(labels: Sequence[str], columns: int) -> int:
    # matplotlib fills column by column, as evenly as it goes, and makes each as wide as its longest label.
    longest = [int(part.max()) for part in np.array_split([len(label) for label in labels], columns)]
    return sum(longest) + LEGEND_HANDLE_CHARACTERS * len(longest)


def _on_grid(curve: Series, steps: Int[NDArray[np.int64], " step"]) -> Float[NDArray[np.float64], " step"]:
    values = np.zeros(len(steps))
    values[np.searchsorted(steps, curve.steps)] = curve.values
    return values


def percent_tick() -> FuncFormatter:
    """Tick labels of a share 0..1 as percentages, with as many decimals as the tick distance needs."""
    return FuncFormatter(lambda share, _: f"{100 * share:.4g} %")


def draw_levels(axes: Axes, levels: Sequence[Level]) -> None:
    """Dotted horizontal lines to compare with."""
    for level in levels:
        axes.axhline(level.value, color=MUTED, linewidth=1.1, linestyle=(0, (1.5, 2.5)), label=level.label)


def _in_words(line: Line) -> str:
    steps, values = line.series.steps, line.series.values
    return f"{line.label} from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}"
