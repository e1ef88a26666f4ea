"""Line charts that plotly.js draws in the page: curves over steps, stacked times, profiles over the completion.

A chart is data: traces and layout as plotly.js reads them, and the same in words. A colour is written `light|dark`; the
page's script takes the one of the reader's scheme.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from nemo_mapo.reports.loading import Series
from nemo_mapo.reports.theme import CARD, GRID, INK, MUTED, Colour, channels

HEIGHT_PIXELS = 270

SMOOTHING_SHARE = 1 / 15
"""Window of the moving mean as a share of the curve: wide enough to calm rollout noise, narrow enough to keep bends."""

FAINT = 0.3
"""Opacity of single noisy steps behind their moving mean."""

STACK_CUT = 3.0
"""Stacks above this many times the median are clipped, so that one slow validation does not flatten all other steps."""

HEADROOM = 1.05
"""Free space above the highest stack."""

BAND_OPACITY = 0.18

DASHES = ("dot", "dashdot", "longdash", "longdashdot")
"""Line styles of overlaid runs, in order."""

DIGITS = 5
"""Significant digits of values in the page."""

Trace = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Traces and layout of one chart."""

    traces: list[Trace]
    layout: dict[str, Any]
    words: str
    """Description for screen readers and browsers without scripts."""
    height: int = HEIGHT_PIXELS
    """Pixels."""

    @property
    def json(self) -> Markup:
        """Traces and layout as JSON that is safe inside a script element."""
        text = json.dumps({"data": self.traces, "layout": self.layout}, allow_nan=False, separators=(",", ":"))
        # A "</script>" in it would end the element.
        return Markup(text.replace("<", "\\u003c"))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    colour: Colour
    series: Series
    ends: Float[NDArray[np.float64], "end step"] | None = None
    """Lower and upper ends of its values' intervals."""
    style: Literal["noisy", "measured"] = "noisy"
    """`noisy`: single steps faint, their moving mean strong. `measured`: a marker at each measured step."""
    dashed: bool = False
    overlay: str = ""
    """Name of the overlaid run that it belongs to; empty for the page's own run."""
    dash: str = ""
    """One of `DASHES` for an overlaid run."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal reference line."""

    label: str
    value: float
    below: bool = False
    """Put the label below the line, if curves run above it."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The value axis of a chart."""

    label: str
    """Quantity and unit."""
    kind: Literal["linear", "log", "percent"] = "linear"
    bottom: float | None = None
    top: float | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A signal over the relative position in a completion."""

    label: str
    colour: Colour
    position: Float[NDArray[np.float64], " bin"]
    """Bin centres, 0 the first and 1 the last token."""
    values: Float[NDArray[np.float64], " bin"]
    dashed: bool = False
    hidden: bool = False
    """Hidden until its legend entry is clicked."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """The curves of one variant's seeds on common steps."""

    label: str
    colour: Colour
    steps: Int[NDArray[np.int64], " step"]
    values: Float[NDArray[np.float64], "seed step"]


@cache
def plotly_js() -> Markup:
    """Source of plotly.js, for a script element."""
    return Markup(get_plotlyjs())


def curves(lines: Sequence[Line], scale: Scale, levels: Sequence[Level] = ()) -> Chart:
    """Curves over training steps.

    Raises:
        ValueError: no line has a value.
    """
    drawn = [line for line in lines if len(line.series)]
    if not drawn:
        raise ValueError("there is nothing to draw")
    layout = layout_for(scale, levels, x_title="training step") | {"showlegend": len(drawn) > 1}
    words = "; ".join(_in_words(line) for line in drawn)
    entries: set[str] = set()
    traces = []
    for line in drawn:
        traces += _line_traces(line, scale, first=line.overlay not in entries)
        entries.add(line.overlay)
    return Chart(traces=traces, layout=layout, words=words)


def stacked(parts: Sequence[Line], total: Series, scale: Scale) -> Chart:
    """Parts of a whole over training steps, stacked; `total` is drawn over them.

    A part counts as zero at steps without a value (validation does not run at every step).

    Raises:
        ValueError: no part has a value.
    """
    drawn = [part for part in parts if len(part.series)]
    if not drawn:
        raise ValueError("there is nothing to draw")
    steps = np.unique(np.concatenate([part.series.steps for part in drawn]))
    heights = np.stack([_on_grid(part.series, steps) for part in drawn])
    traces: list[Trace] = [
        {"type": "bar", "name": part.label, "x": numbers(steps), "y": numbers(height),
         "marker": {"color": both(part.colour), "line": {"width": 0}}, "hovertemplate": "%{y:.3g}"}
        for part, height in zip(drawn, heights, strict=True)
    ]  # fmt: skip
    if len(total):
        traces.append(_trace("whole step", total.steps, total.values, INK, scale, width=1.0, shape="hvh"))
    tops = heights.sum(axis=0)
    top = HEADROOM * min(float(tops.max()), STACK_CUT * float(np.median(tops)))
    words = "; ".join(f"{part.label} {part.series.values.mean():.3g} on average" for part in drawn)
    fitted = Scale(label=scale.label, kind=scale.kind, bottom=0.0, top=top)
    layout = layout_for(fitted, x_title="training step") | {"barmode": "stack", "bargap": 0}
    return Chart(traces=traces, layout=layout, words=words)


def profiles(items: Sequence[Profile], scale: Scale, levels: Sequence[Level] = ()) -> Chart:
    """Signals over the relative position in a completion.

    Raises:
        ValueError: no profile is given.
    """
    if not items:
        raise ValueError("there is nothing to draw")
    layout = layout_for(scale, levels, x_title="position in the completion")
    layout["xaxis"] |= {"range": [0, 1], "tickformat": ".1~%"}
    traces = [
        _trace(item.label, item.position, item.values, item.colour, scale, dash="dash" if item.dashed else "solid")
        | ({"visible": "legendonly"} if item.hidden else {})
        for item in items
    ]
    words = "; ".join(f"{item.label} from {item.values[0]:.3g} to {item.values[-1]:.3g}" for item in items)
    return Chart(traces=traces, layout=layout, words=words)


def bands(items: Sequence[Band], scale: Scale, levels: Sequence[Level] = ()) -> Chart:
    """One curve per variant: the mean over its seeds, in a band from the lowest to the highest seed."""
    traces: list[Trace] = []
    for item in items:
        group = {"legendgroup": item.label}
        edges = (item.values.min(axis=0), item.values.max(axis=0))
        for fill, edge in zip((None, "tonexty"), edges, strict=True):
            traces.append(
                _trace(item.label, item.steps, edge, item.colour, scale, width=0.0, silent=True)
                | group
                | ({"fill": fill, "fillcolor": both(item.colour, BAND_OPACITY)} if fill else {})
            )
        mean = item.values.mean(axis=0)
        traces.append(_trace(item.label, item.steps, mean, item.colour, scale, markers=len(mean) == 1) | group)
    words = "; ".join(f"{item.label} ends at {item.values[:, -1].mean():.3g}" for item in items)
    return Chart(traces=traces, layout=layout_for(scale, levels, x_title="training step"), words=words)


def moving_mean(values: Float[NDArray[np.float64], " step"], window: int) -> Float[NDArray[np.float64], " step"]:
    """Centred moving mean; near the ends, over the part of the window that is on the curve."""
    ones = np.ones(min(window, len(values)))
    sums = np.convolve(values, ones, mode="same")
    counts = np.convolve(np.ones(len(values)), ones, mode="same")
    return np.asarray(sums / counts, dtype=np.float64)


def both(colour: Colour, opacity: float = 1.0) -> str:
    """A colour of both schemes, as the page's script reads it."""
    if opacity == 1:
        return f"{colour.light}|{colour.dark}"
    return "|".join(f"rgba({','.join(map(str, channels(one)))},{opacity})" for one in colour)


def error_bars(values: Any, low: Any, high: Any, colour: Colour) -> dict[str, Any]:
    """Intervals around values."""
    return {"type": "data", "symmetric": False, "array": numbers(high - values), "arrayminus": numbers(values - low),
            "color": both(colour), "thickness": 1.4, "width": 0}  # fmt: skip


def numbers(values: Any) -> list[float | None]:
    """Values for JSON: rounded, and None if not finite."""
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in np.asarray(values).tolist()]


def layout_for(scale: Scale, levels: Sequence[Level] = (), *, x_title: str) -> dict[str, Any]:
    """The layout of a chart with values on the vertical axis."""
    layout: dict[str, Any] = {
        "hovermode": "x unified",
        "xaxis": {**AXIS, "title": {"text": x_title, "standoff": 6}, "showgrid": False},
        "yaxis": value_axis(scale),
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level.value, "y1": level.value, "line": DOTTED}
            for level in levels
        ],
        "annotations": [
            {"text": level.label, "xref": "paper", "x": 1, "y": level.value, "showarrow": False, "xanchor": "right",
             "yanchor": "top" if level.below else "bottom", "font": {"size": 11, "color": both(MUTED)}}
            for level in levels
        ],
    }  # fmt: skip
    return BASE | layout


def value_axis(scale: Scale) -> dict[str, Any]:
    """plotly.js's settings of a value axis."""
    axis = {**AXIS, "title": {"text": scale.label, "standoff": 8}}
    if scale.kind == "log":
        return {**axis, "type": "log", "dtick": 1}
    if scale.kind == "percent":
        axis["tickformat"] = ".1~%"
    if scale.bottom is not None and scale.top is not None:
        axis["range"] = [scale.bottom, scale.top]
    elif scale.bottom is not None:
        axis |= {"autorangeoptions": {"include": scale.bottom, "minallowed": scale.bottom}}
    elif scale.top is not None:
        axis |= {"autorangeoptions": {"include": scale.top, "maxallowed": scale.top}}
    return axis


AXIS: dict[str, Any] = {
    "gridcolor": both(GRID),
    "linecolor": both(GRID),
    "zeroline": False,
    "automargin": True,
    "exponentformat": "power",
    "tickfont": {"color": both(MUTED)},
}
DOTTED = {"dash": "dot", "width": 1.3, "color": both(MUTED)}
BASE: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"size": 12, "color": both(INK), "family": "system-ui, DejaVu Sans, sans-serif"},
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "tracegroupgap": 0},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": both(GRID), "activecolor": both(MUTED)},
    "hoverlabel": {"bgcolor": both(CARD), "bordercolor": both(GRID), "font": {"color": both(INK)}},
}


def _line_traces(line: Line, scale: Scale, *, first: bool) -> list[Trace]:
    steps, values = line.series.steps, line.series.values
    dash = line.dash or ("dash" if line.dashed else "solid")
    label = f"{line.label}, {line.overlay}" if line.overlay else line.label
    other = {"legendgroup": line.overlay, "showlegend": first, "name": line.overlay} if line.overlay else {}
    if line.style == "measured" or len(steps) == 1:
        ends = (
            {}
            if line.ends is None or line.overlay
            else {"error_y": error_bars(values, line.ends[0], line.ends[1], line.colour)}
        )
        return [_trace(label, steps, values, line.colour, scale, dash=dash, markers=True) | ends | other]
    window = max(1, round(SMOOTHING_SHARE * len(steps)))
    if window == 1:
        return [_trace(label, steps, values, line.colour, scale, dash=dash) | other]
    mean = _trace(label, steps, moving_mean(values, window), line.colour, scale, dash=dash) | other
    mean |= {
        "customdata": numbers(values),
        "hovertemplate": f"%{{customdata:{_digits(scale)}}} (mean %{{y:{_digits(scale)}}})",
    }
    faint = _trace(label, steps, values, line.colour, scale, width=1.0, silent=True) | {"opacity": FAINT}
    return [mean] if line.overlay else [faint, mean]


def _trace(
    label: str,
    x: Any,
    y: Any,
    colour: Colour,
    scale: Scale,
    *,
    dash: str = "solid",
    width: float = 2.2,
    markers: bool = False,
    silent: bool = False,
    shape: str = "linear",
    **more: Any,
) -> Trace:
    """A scatter trace; a silent one has neither a legend entry nor hover text."""
    hover: Trace = {"hoverinfo": "skip", "showlegend": False} if silent else {}
    if not silent:
        hover = {"hovertemplate": f"%{{y:{_digits(scale)}}}", "showlegend": True}
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "cliponaxis": not markers,
        "name": label,
        "x": numbers(x),
        "y": numbers(y),
        "line": {"color": both(colour), "width": width, "dash": dash, "shape": shape},
        **hover,
        **more,
    }


def _digits(scale: Scale) -> str:
    return ".1%" if scale.kind == "percent" else ".3g"


def _on_grid(curve: Series, steps: Int[NDArray[np.int64], " step"]) -> Float[NDArray[np.float64], " step"]:
    values = np.zeros(len(steps))
    values[np.searchsorted(steps, curve.steps)] = curve.values
    return values


def _in_words(line: Line) -> str:
    steps, values = line.series.steps, line.series.values
    name = f"{line.label} of {line.overlay}" if line.overlay else line.label
    return f"{name} from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}"
