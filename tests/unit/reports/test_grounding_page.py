"""The page of grounding analyses, made from files alone; figures of different questions never share one."""

import json
import os

import numpy as np
import pytest

from nemo_mapo.reports.analyses import newest_analysis, read_analysis
from nemo_mapo.reports.clips import write_clips
from nemo_mapo.reports.grounding_page import write_grounding_page

INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.75}
LOST = {**INTERVAL, "p_value": 0.04}
BLOCKED = ("deaf_late", "deaf_early", "deaf_completion", "deaf_target_layers", "only_late")
HEARD = ("full", "text_only", "silence", "exchanged")


SETTINGS = {"ratios": [0.1, 0.5], "seed": 0, "max_items": None, "bootstrap_samples": 50, "confidence": 0.95}


def results(**changes):
    """An analysis of two questions, as the command writes it."""
    curve = [0.6, 0.4, 0.2]
    made = {
        "run": "runs/a",
        "checkpoint": "step_000006",
        "split": "test",
        "items": 2,
        "items_in_split": 2,
        "ids": ["q0", "q1"],
        "chance": 0.25,
        "examples": [
            {
                "id": "q0",
                "question": "Which <sound>?",
                "choices": ["x", "y"],
                "answer": "x",
                "said": [{"heard": name, "text": "<think>", "correct": 1.0} for name in HEARD],
            }
        ],
        "scores": {name: [1.0, 0.0] for name in HEARD},
        "settings": SETTINGS,
        "accuracy": dict.fromkeys(HEARD, INTERVAL),
        "accuracy_lost": dict.fromkeys(HEARD[1:], LOST),
        "profile": {
            "position": [0.1, 0.5, 0.9],
            **dict.fromkeys(("audio_mass_max", "delta_h_nats", "policy_entropy_nats", "layer_1"), curve),
        },
        "heads": {"layers": [1], "audio_mass": [[0.3, 0.7]]},
        "collapse": {"mean_index": 0.5, "share": 0.25, "accuracy_collapsed": None, "accuracy_others": 0.5},
        "untagged_completions": 0,
        "parts_of_speech": [{"tag": "NOUN", "tokens": 9, "entropy_nats": 1.0, "delta_h_nats": 0.2}],
        "evidence": [
            {"ratio": ratio, "selection": selection, **INTERVAL, "drop": {**LOST, "mean": drop}}
            for ratio, drop in ((0.1, 0.125), (0.5, -0.375))
            for selection in ("top", "random", "low")
        ],
        "causal": {
            "without_late_part": 0,
            "accuracy": dict.fromkeys(BLOCKED, INTERVAL),
            "lost": dict.fromkeys(BLOCKED, LOST),
            "late_listening_used": LOST,
            "truth_questions": 2,
            "truth": dict.fromkeys((*BLOCKED, "full", "silence", "exchanged"), INTERVAL),
            "truth_lost": dict.fromkeys(BLOCKED, LOST),
        },
        "acs": [{"ratio": ratio, **LOST} for ratio in (0.1, 0.5)],
        "length": {
            "pearson": -0.25,
            "within_item": 0.5,
            "within_item_finished": None,
            "truncated": 3,
            "bins": [{"shortest": 4, "longest": 8, "completions": 6, "accuracy": 0.5}],
        },
    }
    return made | changes


@pytest.fixture
def write(tmp_path):
    """Write an analysis and read it back."""

    def write(label, **changes):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(results(**changes)))
        return read_analysis(path, label)

    return write


def test_the_page_is_made_again_from_the_file_to_the_last_byte(write, tmp_path):
    pages = [write_grounding_page([write("a")], tmp_path / name, title="Grounding") for name in ("1.html", "2.html")]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_page_says_which_checkpoint_answered_and_what_each_mask_cost(write, tmp_path):
    page = write_grounding_page([write("a<b")], tmp_path / "page.html", title="Grounding").read_text()
    assert "a&lt;b: checkpoint step_000006, test" in page and "a<b:" not in page
    assert "+12.5 [+25.0, +75.0]" in page and "-37.5 [+25.0, +75.0]" in page
    assert "aligned with their text" not in page


def test_the_page_says_how_many_questions_were_drawn_and_what_guessing_gives(write, tmp_path):
    page = write_grounding_page([write("a", items_in_split=600)], tmp_path / "page.html", title="Grounding").read_text()
    assert "2 of the split&#39;s 600 questions, drawn at random with seed 0 · chance 25.0 %" in page
    # Of what is heard, which tokens are deaf, which frames are silenced, and length.
    assert page.count('"text":"chance"') == 4


def test_what_was_said_can_be_read_and_heard(write, tmp_path):
    analysis = write("a")
    write_clips(analysis.run_dir, "q0", [np.zeros(100)], 16000)
    page = write_grounding_page([analysis], tmp_path / "page.html", title="Grounding").read_text()
    assert page.count('src="data:audio/flac;base64,') == 1
    assert "Which &lt;sound&gt;?" in page and "a, another clip: &lt;think&gt;" in page


def test_runs_are_compared_question_by_question(write, tmp_path):
    better = {name: [1.0, 0.0] for name in HEARD} | {"full": [1.0, 1.0]}
    page = write_grounding_page([write("a"), write("b", scores=better)], tmp_path / "page.html", title="Grounding")
    assert "minus a" in page.read_text()
    # One of two questions is right with b only; by hand the binomial p of 1 against 0 is 1.
    assert "+50.0 [-48.6, +90.5] (1)" in page.read_text()


def test_completions_without_parts_of_speech_are_told(write, tmp_path):
    page = write_grounding_page([write("a", untagged_completions=7)], tmp_path / "page.html", title="Grounding")
    assert "7 completions could not be aligned with their text" in page.read_text()


def test_as_many_other_questions_are_other_questions(write, tmp_path):
    analyses = [write("a"), write("b", ids=["q0", "q7"], split="validation")]
    with pytest.raises(ValueError, match=r"a has 2 questions, b has 2, and 1 of them are shared"):
        write_grounding_page(analyses, tmp_path / "page.html", title="Grounding")
    assert not (tmp_path / "page.html").exists()


def test_other_ratios_would_stand_in_the_wrong_columns(write, tmp_path):
    analyses = [write("a"), write("b", settings=SETTINGS | {"ratios": [0.2, 0.4], "max_items": 2})]
    with pytest.raises(ValueError, match=r"a and b differ in ratios \(\[0.1, 0.5\] and \[0.2, 0.4\]\)"):
        write_grounding_page(analyses, tmp_path / "page.html", title="Grounding")


def test_a_limit_that_left_the_questions_the_same_is_no_difference(write, tmp_path):
    analyses = [write("a"), write("b", settings=SETTINGS | {"max_items": 2})]
    assert write_grounding_page(analyses, tmp_path / "page.html", title="Grounding").is_file()


def test_a_file_that_lacks_something_is_refused_by_name(tmp_path):
    path = tmp_path / "old.json"
    old = results()
    del old["ids"]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"old\.json: ids missing; rerun examples/analyse\.py"):
        read_analysis(path, "a")


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_file_that_is_no_analysis_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        read_analysis(path, "a")


def test_the_newest_analysis_is_the_one_written_last(tmp_path):
    (tmp_path / "analysis").mkdir()
    for age, name in enumerate(("start-test.json", "step_000002-test.json")):
        path = tmp_path / "analysis" / name
        path.write_text("{}")
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_analysis(tmp_path).name == "start-test.json"


def test_a_run_without_analysis_gets_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"make one: python examples/analyse\.py"):
        newest_analysis(tmp_path)
