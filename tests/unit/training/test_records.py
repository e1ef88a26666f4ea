"""Append-only files after an interruption."""

import json

import pytest

from nemo_mapo.training.records import JsonLines, JsonLinesLogger, LivePage


def test_a_resumed_run_forgets_later_steps_and_a_line_that_was_cut(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": step} for step in (0, 1, 2, 3))
    with file.path.open("a") as handle:
        handle.write('{"step": 4, "tr')
    file.forget_after(2)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [0, 1, 2]


def test_forgetting_before_the_file_exists_does_nothing(tmp_path):
    JsonLines(tmp_path / "none.jsonl").forget_after(3)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_figure_that_is_not_a_number_is_an_error_not_a_gap(tmp_path):
    logger = JsonLinesLogger(JsonLines(tmp_path / "metrics.jsonl"))
    with pytest.raises(ValueError, match="step 1: train/loss is not a finite number"):
        logger.log_metrics({"train/loss": float("nan")}, step=1)


@pytest.mark.parametrize(("name", "written"), [("val/accuracy", True), ("val/loss", True), ("train/loss", False)])
def test_the_page_is_written_at_every_validation_whatever_is_validated(tmp_path, name, written):
    logger = JsonLinesLogger(JsonLines(tmp_path / "metrics.jsonl"))
    logger.log_metrics({name: 0.5}, step=1)
    LivePage(tmp_path).log_metrics({name: 0.5}, step=1)
    assert (tmp_path / "report.html").exists() == written
