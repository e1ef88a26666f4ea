"""Charts hold what was measured, in a form that plotly.js understands, and smooth without shifting."""

import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from nemo_mapo.reports.charts import Band, Level, Line, Profile, Scale, bands, curves, moving_mean, profiles, stacked
from nemo_mapo.reports.estimate_charts import Bars, Group, Point, Points, bars, groups, heads, points
from nemo_mapo.reports.loading import Series
from nemo_mapo.reports.theme import AUDIO, LENGTH, SILENT, Colour, mixed, tints
from nemo_mapo.statistics import Estimate

SCALE = Scale(label="reward, points")
SHARE = Scale(label="share", kind="percent", bottom=0.0, top=1.0)


def line(values, label="reward", **fields):
    steps = np.arange(len(values), dtype=np.int64)
    found = Series(steps=steps, values=np.array(values, dtype=np.float64))
    return Line(label=label, colour=AUDIO, series=found, **fields)


def profile():
    return Profile(label="after", colour=SILENT, position=np.array([0.2, 0.8]), values=np.array([0.5, np.nan]))


ESTIMATE = Estimate(mean=0.5, deviation=None, low=0.25, high=0.75, count=2)
CHARTS = {
    "curves": curves([line([1, 2, 3])], SCALE, [Level(label="cap", value=2.0)]),
    "noisy curves": curves([line(np.arange(60.0))], SHARE),
    "overlaid curves": curves([line([1, 2]), line([2, 3], overlay="other", dash="dot")], SCALE),
    "logarithmic curves": curves([line([0.1, 10])], Scale(label="size", kind="log")),
    "stacked": stacked([line([1, 2]), line([3, 4])], line([4, 6]).series, SCALE),
    "profiles": profiles([profile()], Scale(label="share", bottom=0.0)),
    "bands": bands(
        [Band(label="a", colour=LENGTH, steps=np.array([1, 2]), values=np.array([[1.0, 2.0], [3.0, 4.0]]))], SCALE
    ),
    "groups": groups([Group(label="a", colour=LENGTH, values={1: 0.4, 2: 0.6}, estimate=ESTIMATE)], SHARE),
    "points": points(
        [Points(label="a", colour=LENGTH, points=[Point(x=0.1, y=0.5, low=0.4, high=0.7), Point(x=0.2, y=0.6)])],
        SHARE,
        x_label="silenced",
        x_percent=True,
    ),
    "bars": bars(["NOUN"], [Bars(label="entropy", colour=LENGTH, values=[0.5])], SCALE),
    "heads": heads([3, 4], [[0.1, 0.9], [0.2, 0.3]]),
}


@pytest.mark.parametrize("scheme", [r"\1", r"\2"], ids=["light", "dark"])
@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_is_a_valid_plotly_figure_in_both_schemes(name, scheme):
    # As the page's script reads it; the library's own schema refuses unknown properties and values.
    text = re.sub(r"(#\w{6}|rgba\([^)]*\))\|(#\w{6}|rgba\([^)]*\))", scheme, CHARTS[name].json)
    assert "|#" not in text and "|rgba" not in text
    go.Figure(json.loads(text))


def test_nothing_in_a_chart_can_end_its_script_element():
    assert "<" not in curves([line([1, 2], label="</script><script>alert(1)</script>")], SCALE).json


def test_a_band_lets_the_curves_below_it_be_seen():
    (filled,) = (trace for trace in CHARTS["bands"].traces if "fill" in trace)
    light, dark = filled["fillcolor"].split("|")
    assert light.startswith("rgba(0,158,115,0.") and dark.startswith("rgba(60,199,156,0.")


def test_what_is_not_finite_is_a_gap():
    (trace,) = profiles([profile()], SCALE).traces
    assert trace["y"] == [0.5, None]


def test_the_pointer_shows_the_measured_value_of_a_smoothed_curve():
    values = np.arange(60.0)
    faint, mean = curves([line(values)], SCALE).traces
    assert faint["hoverinfo"] == "skip" and mean["customdata"] == values.tolist()


def test_a_run_laid_over_has_one_entry_in_the_legend():
    chart = curves([line([1, 2]), *(line([2, 3], label, overlay="other", dash="dot") for label in "ab")], SCALE)
    assert [trace["name"] for trace in chart.traces if trace["showlegend"]] == ["reward", "other"]


def test_stacks_hold_zero_where_a_part_was_not_measured():
    late = Line(label="b", colour=AUDIO, series=Series(steps=np.array([1]), values=np.array([5.0])))
    first, second, _ = stacked([line([1, 2]), late], line([1, 7]).series, SCALE).traces
    assert first["y"] == [1, 2] and second["y"] == [0, 5]


def test_intervals_reach_from_their_lower_to_their_upper_end():
    (trace,) = CHARTS["points"].traces
    assert trace["error_y"]["array"] == pytest.approx([0.2, 0.0])
    assert trace["error_y"]["arrayminus"] == pytest.approx([0.1, 0.0])


def test_measured_accuracies_have_their_intervals():
    drawn = line([0.0, 0.5], style="measured", ends=np.array([[0.0, 0.4], [0.1, 0.6]]))
    (trace,) = curves([drawn], SHARE).traces
    assert trace["error_y"]["array"] == pytest.approx([0.1, 0.1])
    assert trace["error_y"]["arrayminus"] == pytest.approx([0.0, 0.1])


def test_the_moving_mean_keeps_a_constant_and_averages_only_what_is_there():
    assert moving_mean(np.full(7, 3.0), 5) == pytest.approx(np.full(7, 3.0))
    assert moving_mean(np.array([0.0, 3.0, 6.0]), 3) == pytest.approx([1.5, 3.0, 4.5])


def test_the_moving_mean_of_a_curve_shorter_than_its_window_has_its_length():
    assert len(moving_mean(np.array([1.0, 2.0]), 9)) == 2


def test_a_chart_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to draw"):
        curves([line([])], SCALE)
    with pytest.raises(ValueError, match="nothing to draw"):
        stacked([line([])], line([]).series, SCALE)


def test_colours_mix_and_the_last_tint_is_the_whole_colour():
    assert mixed("#000000", "#ff8040", 0.5) == "#804020"
    assert tints(Colour("#102030", "#405060"), 3)[-1] == Colour("#102030", "#405060")
