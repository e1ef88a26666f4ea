"""Samples: chosen from both ends of the run, coloured by value, readable, and never trusted as HTML."""

import base64
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_mapo.reports.clips import CLIPS, write_clips
from nemo_mapo.reports.pages import TEMPLATES
from nemo_mapo.reports.samples import (
    LEVELS,
    VIEWS,
    contrast,
    is_right,
    level_colours,
    pick_samples,
    readable_token,
    samples_view,
)
from nemo_mapo.reports.theme import CARD

NOWHERE = Path("no such directory")
CLIP = 0.5 * np.sin(np.arange(800))


def samples_html(samples):
    """The part of the page that shows samples, as templates/report.html includes it."""
    return TEMPLATES.get_template("samples.html").module.samples(samples_view(samples, NOWHERE))


def sample(**changes):
    tokens = ["<think>", " a", " b", "</think>", "x"]
    record = {
        "step": 1,
        "split": "train",
        "id": "clip",
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": "x",
        "task": "kind",
        "text": "<think> a b</think>x",
        "reward": {"total": 4.0, "accuracy": 1.0},
        "tokens": tokens,
        "omega": [0.0, 1.0, 5.0, 1.0, 1.0],
    }
    return record | changes


def test_early_and_late_right_and_wrong_are_all_shown(make_run):
    chosen = pick_samples(make_run().rollouts, NOWHERE)
    cells = {(record["step"] < 20, is_right(record)) for record in chosen}
    assert cells == {(True, True), (True, False), (False, True), (False, False)}
    assert len(chosen) == 8
    assert all("tokens" in record for record in chosen)


def test_a_run_of_one_step_shows_each_sample_once(make_run):
    rollouts = [record for record in make_run().rollouts if record["step"] == 0]
    chosen = pick_samples(rollouts, NOWHERE)
    assert len(chosen) == 4
    assert len({record["id"] for record in chosen}) == 4


def test_a_sample_is_heard_beside_its_text_if_its_clips_were_kept(tmp_path):
    write_clips(tmp_path, "../clip", [CLIP, CLIP[:400]], 16000)
    view = samples_view([sample(id="../clip"), sample(id="other")], tmp_path)
    page = TEMPLATES.get_template("samples.html").module.samples(view)
    players = re.findall(r'<audio controls preload="none" src="data:audio/flac;base64,([^"]+)">', page)
    played = [soundfile.read(io.BytesIO(base64.b64decode(content))) for content in players]
    assert [(len(samples), rate) for samples, rate in played] == [(800, 16000), (400, 16000)]
    np.testing.assert_allclose(played[0][0], CLIP, atol=1e-4)
    # Whatever an id holds, its clips stay in their directory.
    assert {path.parent for path in tmp_path.rglob("*.flac")} == {tmp_path / CLIPS}


def test_samples_with_a_clip_are_preferred(make_run, tmp_path):
    rollouts = [record | {"split": "validation"} for record in make_run().rollouts if "tokens" in record]
    write_clips(tmp_path, "clip-0002", [CLIP], 16000)
    right = [record for record in pick_samples(rollouts, tmp_path) if is_right(record)]
    assert [record["id"] for record in right].count("clip-0002") == 4


def test_no_rollouts_no_samples():
    assert pick_samples([], NOWHERE) == []


def test_the_largest_weight_gets_the_darkest_level_and_zero_the_lightest():
    page = samples_html([sample()])
    assert f'<i class="o{LEVELS - 1}" title="relevance weight ω̃ 5.00"> b</i>' in page
    assert '<i class="o0 special" title="relevance weight ω̃ 0.00">&lt;think&gt;</i>' in page


def test_a_flat_mask_is_not_stretched_to_look_peaked():
    page = samples_html([sample(omega=[1.0, 1.0, 1.01, 1.0, 1.0])])
    assert f'class="o{LEVELS - 1}" title' not in page


def test_only_views_with_values_are_offered():
    page = samples_html([sample()])
    assert page.count('type="radio"') == 1
    assert "audio mass" not in page


@pytest.mark.parametrize("field", ["text", "question", "task", "split", "answer"])
def test_text_of_a_run_is_never_markup(field):
    attack = "<script>alert('&')</script>"
    record = sample(tokens=None, omega=None) | {field: attack}
    record["choices"] = [attack, "y"]
    assert "<script" not in samples_html([record])


def test_tokens_are_never_markup():
    page = samples_html([sample(tokens=["<img src=x>", '"', "&amp;", "'", "<b>"])])
    assert "<img" not in page
    assert "<b>" not in page
    assert "&amp;amp;" in page


def test_signals_that_do_not_fit_the_tokens_are_ignored():
    page = samples_html([sample(omega=[1.0])])
    assert 'class="o' not in page
    assert '<i class="special" title="">&lt;think&gt;</i> a b' in page


def test_missing_values_inside_a_signal_leave_the_token_uncoloured():
    page = samples_html([sample(omega=[1.0, None, 5.0, 1.0, 1.0])])
    assert '<i class="" title=""> a</i>' in page


@pytest.mark.parametrize(
    ("token", "shown"),
    [("Ġthe", " the"), ("▁the", " the"), ("Ċ", "↵\n"), ("\n", "↵\n"), ("", "∅"), ("\x00", "\\x00"), ("a", "a")],
)
def test_tokens_read_as_text(token, shown):
    assert readable_token(token) == shown


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.field)
def test_text_is_readable_on_every_level_and_levels_leave_the_card_evenly(view):
    levels = level_colours(view)
    assert len(levels) == LEVELS
    for scheme, card in (("light", CARD.light), ("dark", CARD.dark)):
        paints = [getattr(level, scheme) for level in levels]
        assert all(contrast(paint.background, paint.text) >= 4.5 for paint in paints)  # WCAG AA
        from_card = [contrast(paint.background, card) for paint in paints]
        assert all(weaker < stronger for weaker, stronger in itertools.pairwise(from_card))


def test_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#777777") == pytest.approx(1)
