"""Five lines, whatever was measured."""

import pytest

from nemo_mapo.reports.loading import load_run
from nemo_mapo.reports.outcome import DEFAULT_CHANCE, chance_accuracy, outcome
from nemo_mapo.reports.summary import duration, summary_lines
from nemo_mapo.reports.theme import MISSING
from nemo_mapo.statistics import share_interval


def test_a_tested_run_is_summed_up_from_its_test_split(make_run, tmp_path):
    run = make_run()
    run.run["test"] |= {"accuracy_silent": 0.262, "audio_mass_late": 0.63, "completion_tokens": 55.2}
    run.run["seconds_total"] = 431.7
    assert summary_lines(run.write(tmp_path)) == [
        "accuracy      43.0 % → 64.0 % on the test split (chance 25.0 %; +21.0 points [+18.6, +23.6])",
        "silent audio  26.2 % with the audio replaced by silence (chance 25.0 %)",
        "late mass     0.43 → 0.63 of attention on the audio in the last third (test split)",
        "length        58 → 55 tokens per completion, 47 → 45 words of reasoning",
        "time          7 min 12 s, peak memory 2.4 GB",
    ]


def test_without_a_test_split_validation_stands_in(make_run, tmp_path):
    run = make_run()
    del run.run["test"]
    run.metrics[0]["val/accuracy"], run.metrics[-1]["val/accuracy"] = 0.4, 0.7
    assert "40.0 % → 70.0 % on the held-out validation split" in summary_lines(run.write(tmp_path))[0]


def test_without_any_evaluation_mass_and_length_come_from_training_and_accuracy_is_not_claimed(make_run, tmp_path):
    run = make_run()
    run.drop("val/")
    run.run = None
    lines = summary_lines(run.write(tmp_path))
    assert lines[0].endswith("not measured")
    assert lines[1].endswith("not measured")
    assert "training rollouts" in lines[2]


def test_an_empty_run_still_has_five_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    lines = summary_lines(tmp_path)
    assert len(lines) == 5
    assert all(line.endswith("not measured") for line in lines)


def test_the_accuracy_has_an_interval_over_the_questions_that_it_is_of(make_run, tmp_path):
    run = make_run()
    tested = outcome(load_run(run.write(tmp_path / "tested")))
    assert tested.questions == 1000 and tested.accuracy_interval == share_interval(640, 1000)
    del run.run["test"]
    run.metrics[-1] |= {"val/questions": 40.0, "val/accuracy": 0.0}
    validated = outcome(load_run(run.write(tmp_path / "validated")))
    assert validated.questions == 40 and validated.accuracy_interval == share_interval(0, 40)
    assert validated.accuracy_interval.high > 0.08


def test_one_validation_before_training_is_a_start_and_one_after_is_an_end(make_run, tmp_path):
    run = make_run()
    run.run = None
    only_start = [run.metrics[0], *({"step": step} for step in range(1, 9))]
    only_end = [{"step": 0}, {"step": 8, "val/accuracy": 0.6}]
    run.metrics = only_start
    start = outcome(load_run(run.write(tmp_path / "start"))).accuracy
    run.metrics = only_end
    end = outcome(load_run(run.write(tmp_path / "end"))).accuracy
    assert start.start == only_start[0]["val/accuracy"] and start.end is None
    assert end.start is None and end.end == 0.6


def test_chance_follows_the_number_of_choices():
    assert chance_accuracy([{"choices": ["a", "b"]}, {"choices": ["a", "b", "c", "d"]}]) == pytest.approx(0.375)
    assert chance_accuracy([{"choices": []}]) == DEFAULT_CHANCE


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (431.7, "7 min 12 s"), (None, MISSING)]
)
def test_durations_are_rounded_to_seconds(seconds, text):
    assert duration(seconds) == text
