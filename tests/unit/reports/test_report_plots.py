"""Charts are compact, unique in their page, and smooth without shifting."""

import re

import numpy as np
import pytest

from nemo_mapo.reports.loading import Series
from nemo_mapo.reports.plots import Level, Line, Scale, curves_svg, moving_mean, stacked_svg


def line(values, label="reward"):
    steps = np.arange(len(values), dtype=np.int64)
    return Line(label=label, colour="#0072b2", series=Series(steps=steps, values=np.array(values, dtype=np.float64)))


def test_the_moving_mean_keeps_a_constant_and_averages_only_what_is_there():
    assert moving_mean(np.full(7, 3.0), 5) == pytest.approx(np.full(7, 3.0))
    assert moving_mean(np.array([0.0, 3.0, 6.0]), 3) == pytest.approx([1.5, 3.0, 4.5])


def test_the_moving_mean_of_a_curve_shorter_than_its_window_has_its_length():
    assert len(moving_mean(np.array([1.0, 2.0]), 9)) == 2


def test_text_stays_text_and_fractions_are_short():
    svg = curves_svg("a", [line(np.random.default_rng(0).normal(size=200))], Scale(label="reward, points"))
    assert ">reward, points</text>" in svg
    assert not re.search(r'd="[^"]*\d\.\d{3}', svg)
    assert len(svg) < 40_000


def test_tick_labels_keep_their_digits():
    svg = curves_svg("a", [line([0.001, 0.002, 0.003])], Scale(label="share"))
    assert ">0.0010</text>" in svg or ">0.001</text>" in svg


def test_two_charts_of_a_page_share_no_ids():
    first = curves_svg("first", [line([1, 2, 3])], Scale(label="x"))
    second = curves_svg("second", [line([1, 2, 3])], Scale(label="x"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r"#([\w-]+)\)", svg)) <= own


def test_a_single_step_and_a_level_can_be_drawn():
    svg = curves_svg("a", [line([0.5])], Scale(label="x", kind="percent"), [Level(label="chance", value=0.25)])
    assert ">chance</text>" in svg


def test_a_chart_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to draw"):
        curves_svg("a", [line([])], Scale(label="x"))
    with pytest.raises(ValueError, match="nothing to draw"):
        stacked_svg("a", [line([])], line([]).series, Scale(label="x"))


def test_labels_are_escaped_in_the_words_for_screen_readers():
    svg = curves_svg("a", [line([1, 2], label='"<b>')], Scale(label="x"))
    assert 'aria-label="&quot;&lt;b&gt; from 1 at step 0 to 2 at step 1"' in svg
