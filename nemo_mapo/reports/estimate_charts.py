"""Charts of estimates: points with intervals, bars by part of speech, a map of attention heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np

from nemo_mapo.reports.charts import (
    AXIS,
    BASE,
    DOTTED,
    Chart,
    Level,
    Scale,
    both,
    error_bars,
    layout_for,
    numbers,
    value_axis,
)
from nemo_mapo.reports.theme import CARD, INK, MASS, MUTED, Colour
from nemo_mapo.statistics import Estimate

ROW_PIXELS = 38
"""Height of a row of a horizontal chart."""

FRAME_PIXELS = 90
"""Height around the rows, for axis, axis label and legend."""

LABEL_CHARACTERS = 22
"""Longer row names are wrapped: on a phone they would leave no room for the chart."""

SPREAD = 0.22
"""Seeds are drawn up to this far above and below the middle of their row, so that equal values stay visible."""

DODGE = 0.012
"""Horizontal distance between coinciding points of several series, as a share of the axis."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A row of a chart: an estimate, and the values per seed behind it."""

    label: str
    colour: Colour
    values: Mapping[int, float]
    """By seed."""
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured value, with its interval if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Points:
    """One series."""

    label: str
    colour: Colour
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One value for each row of a bar chart; NaN for a row without one."""

    label: str
    colour: Colour
    values: Sequence[float]


def groups(items: Sequence[Group], scale: Scale, levels: Sequence[Level] = ()) -> Chart:
    """One row per group: a dot for each seed, a diamond at the mean, a line for its interval."""
    seeds = sorted({seed for item in items for seed in item.values})
    places = dict(zip(seeds, np.linspace(-SPREAD, SPREAD, len(seeds)) if len(seeds) > 1 else [0.0], strict=False))
    digits = ".1%" if scale.kind == "percent" else ".4g"
    traces = [
        {"type": "scatter", "mode": "markers", "name": item.label, "showlegend": False,
         "x": numbers(list(item.values.values())), "y": [row + float(places[seed]) for seed in item.values],
         "text": [f"seed {seed}" for seed in item.values],
         "hovertemplate": f"{item.label}, %{{text}}: %{{x:{digits}}}<extra></extra>",
         "marker": {"color": both(item.colour), "size": 8, "opacity": 0.55}}
        for row, item in enumerate(items) if item.values
    ]  # fmt: skip
    traces += [_estimate_trace(row, item, digits) for row, item in enumerate(items)]
    layout = _rows_layout([item.label for item in items], scale)
    layout["shapes"] = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": level.value, "x1": level.value, "line": DOTTED}
        for level in levels
    ]
    layout["annotations"] = [
        {"text": level.label, "yref": "paper", "y": 1, "x": level.value, "showarrow": False, "xanchor": "left",
         "yanchor": "bottom", "font": {"size": 11, "color": both(MUTED)}}
        for level in levels
    ]  # fmt: skip
    layout["margin"] = {**BASE["margin"], "t": 22}
    words = "; ".join(f"{item.label} {item.estimate.mean:.3g}" for item in items)
    return Chart(traces=traces, layout=layout, words=words, height=FRAME_PIXELS + ROW_PIXELS * len(items))


def points(
    series: Sequence[Points], scale: Scale, *, x_label: str, x_percent: bool = False, levels: Sequence[Level] = ()
) -> Chart:
    """Series of points with intervals, joined by lines."""
    width = max(point.x for item in series for point in item.points)
    layout = layout_for(scale, levels, x_title=x_label)
    layout["hovermode"] = "closest"
    if x_percent:
        layout["xaxis"]["tickformat"] = ".1~%"
    digits = ".1%" if scale.kind == "percent" else ".3g"
    traces = []
    for number, item in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * DODGE * width
        y, low, high = (np.array([_or_y(point, name) for point in item.points]) for name in ("y", "low", "high"))
        traces.append(
            {"type": "scatter", "mode": "lines+markers", "name": item.label, "showlegend": True,
             "x": numbers([point.x + shift for point in item.points]), "y": numbers(y),
             "line": {"color": both(item.colour), "width": 2}, "marker": {"size": 7, "color": both(item.colour)},
             "error_y": error_bars(y, low, high, item.colour),
             "customdata": [[*pair] for pair in zip(numbers(low), numbers(high), strict=True)],
             "hovertemplate": f"{item.label}: %{{y:{digits}}}"
             f" [%{{customdata[0]:{digits}}}, %{{customdata[1]:{digits}}}]<extra></extra>"}
        )  # fmt: skip
    words = "; ".join(f"{item.label} from {item.points[0].y:.3g} to {item.points[-1].y:.3g}" for item in series)
    return Chart(traces=traces, layout=layout, words=words)


def bars(rows: Sequence[str], items: Sequence[Bars], scale: Scale) -> Chart:
    """Horizontal bars, one per series in each row."""
    traces = [
        {"type": "bar", "orientation": "h", "name": item.label, "x": numbers(item.values), "y": list(range(len(rows))),
         "marker": {"color": both(item.colour)}, "hovertemplate": f"{item.label} %{{x:.3g}}<extra></extra>"}
        for item in items
    ]  # fmt: skip
    words = "; ".join(
        f"{row}: {', '.join(f'{item.label} {item.values[number]:.3g}' for item in items)}"
        for number, row in enumerate(rows)
    )
    layout = _rows_layout(rows, scale) | {"barmode": "group", "bargap": 0.25}
    return Chart(traces=traces, layout=layout, words=words, height=FRAME_PIXELS + ROW_PIXELS * len(rows))


def heads(layers: Sequence[int], mass: Sequence[Sequence[float]]) -> Chart:
    """A heat map of the attention to the audio by layer and head, with the values in its cells."""
    scale = [[0.0, both(CARD)], [1.0, both(MASS)]]
    trace = {"type": "heatmap", "z": [numbers(row) for row in mass], "zmin": 0, "zmax": 1, "colorscale": scale,
             "showscale": False, "xgap": 2, "ygap": 2, "texttemplate": "%{z:.0%}",
             "hovertemplate": "%{y}, head %{x}: %{z:.1%}<extra></extra>",
             "x": [str(head) for head in range(len(mass[0]))],
             "y": [f"layer {layer}" for layer in layers]}  # fmt: skip
    layout = BASE | {
        "xaxis": {**AXIS, "type": "category", "title": {"text": "head; % of its attention on the audio"}},
        "yaxis": {**AXIS, "type": "category", "autorange": "reversed", "showgrid": False},
    }
    words = "; ".join(
        f"layer {layer}: {', '.join(f'{value:.2f}' for value in row)}" for layer, row in zip(layers, mass, strict=True)
    )
    return Chart(traces=[trace], layout=layout, words=words, height=FRAME_PIXELS + ROW_PIXELS * len(layers))


def _estimate_trace(row: int, item: Group, digits: str) -> dict[str, Any]:
    found = item.estimate
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "name": item.label, "showlegend": False, "x": numbers([found.mean]),
        "y": [row], "marker": {"color": both(item.colour), "size": 11, "symbol": "diamond"},
        "hovertemplate": f"{item.label}: %{{x:{digits}}}<extra></extra>",
    }  # fmt: skip
    if found.low is not None and found.high is not None:
        trace |= {
            "error_x": error_bars(found.mean, np.array([found.low]), np.array([found.high]), item.colour),
            "customdata": [numbers([found.low, found.high])],
            "hovertemplate": f"{item.label}: %{{x:{digits}}} "
            f"[%{{customdata[0]:{digits}}}, %{{customdata[1]:{digits}}}]<extra></extra>",
        }
    return trace


def _rows_layout(rows: Sequence[str], scale: Scale) -> dict[str, Any]:
    texts = ["<br>".join(wrap(row, LABEL_CHARACTERS)) for row in rows]
    ticks = {"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": texts}
    return BASE | {
        "hovermode": "closest",
        "xaxis": value_axis(scale),
        "yaxis": {**AXIS, **ticks, "range": [len(rows) - 0.5, -0.5], "showgrid": False,
                  "tickfont": {"color": both(INK)}},
    }  # fmt: skip


def _or_y(point: Point, name: str) -> float:
    value = {"y": point.y, "low": point.low, "high": point.high}[name]
    return point.y if value is None else value
