"""Run files are read back whole, and what is broken is named."""

import json

import pytest

from nemo_mapo.reports.loading import RunFileError, load_run, series


def test_a_complete_run_is_read_without_notes(run_dir):
    files = load_run(run_dir)
    assert [record["step"] for record in files.metrics] == list(range(41))
    assert files.notes == ()
    assert files.config["objective"]["mask"] == "relevance"


def test_a_step_written_twice_counts_once_and_the_later_record_wins(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "train/loss": 123.0}) + "\n")
    files = load_run(run_dir)
    assert [record["step"] for record in files.metrics] == list(range(41))
    assert files.metrics[7] == {"step": 7, "train/loss": 123.0}


@pytest.mark.parametrize("kept_bytes", [1, 9, 60])
def test_a_truncated_last_line_is_left_out_and_noted(run_dir, kept_bytes):
    line = json.dumps({"step": 41, "train/loss": 0.5, "note/é": 1.0, "rollout/reward_mean": 2.0}, ensure_ascii=False)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(line.encode()[:kept_bytes])
    files = load_run(run_dir)
    assert files.metrics[-1]["step"] == 40
    assert files.notes == ("metrics.jsonl line 42 is incomplete and left out: its writer was interrupted.",)


def test_a_last_line_truncated_inside_a_character_is_left_out_too(run_dir):
    with (run_dir / "rollouts.jsonl").open("ab") as file:
        file.write('{"step": 41, "text": "ω'.encode()[:-1])
    assert "rollouts.jsonl line" in load_run(run_dir).notes[0]


def test_a_whole_last_line_without_newline_is_kept(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train/loss": 0.25}')
    files = load_run(run_dir)
    assert files.metrics[-1] == {"step": 41, "train/loss": 0.25}
    assert files.notes == ()


@pytest.mark.parametrize("name", ["metrics.jsonl", "profiles.jsonl", "rollouts.jsonl"])
def test_a_broken_line_in_the_middle_is_an_error_with_file_and_line(run_dir, name):
    lines = (run_dir / name).read_text().splitlines()
    lines[1] = lines[1][: len(lines[1]) // 2]
    (run_dir / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFileError, match=rf"{name} line 2 is not valid JSON"):
        load_run(run_dir)


def test_a_broken_last_line_that_ends_in_a_newline_is_an_error(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train/\n')
    with pytest.raises(RunFileError, match=r"metrics.jsonl line 42"):
        load_run(run_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", r"line 42 should be a JSON object, found list"),
        ('{"train/loss": 1.0}', r"line 42 has no whole-number 'step', found None"),
        ('{"step": 41, "train/loss": "high"}', r"step 41: train/loss should be a number, found 'high'"),
    ],
)
def test_a_line_that_is_no_metric_record_is_an_error(run_dir, line, message):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunFileError, match=message):
        load_run(run_dir)


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(RunFileError, match=r"holds no metrics\.jsonl"):
        load_run(tmp_path)
    with pytest.raises(RunFileError, match="is not a directory"):
        load_run(tmp_path / "nowhere")


def test_broken_run_and_config_files_are_named(run_dir):
    (run_dir / "run.json").write_text('{"title": ')
    with pytest.raises(RunFileError, match=r"run\.json line 1"):
        load_run(run_dir)
    (run_dir / "config.yaml").write_text("a: [1")
    with pytest.raises(RunFileError, match=r"config\.yaml:1: not YAML"):
        load_run(run_dir)


def test_a_series_leaves_out_missing_null_and_infinite_values():
    records = [{"step": 0}, {"step": 1, "x": 2.0}, {"step": 2, "x": None}, {"step": 3, "x": float("nan")}]
    found = series([*records, {"step": 4, "x": float("inf")}, {"step": 5, "x": 3}], "x")
    assert found.steps.tolist() == [1, 5]
    assert found.values.tolist() == [2.0, 3.0]
