"""The evidence page: paired differences, what they exclude, admission, and no run that goes missing."""

import json

import pytest

from nemo_mapo.reports.evidence import EvidenceRun, admission, evidence_markdown
from nemo_mapo.reports.markdown import fill


def record(right: int, deaf: int, *, items: int = 20, usual: float | None = 0.0) -> dict[str, object]:
    """A checkpoint that has so many questions right, and so many with late tokens deaf."""
    correct = {"full": right, "deaf_late": deaf, "only_late": deaf, "silence": 5}
    return {
        "chance": 0.25,
        "correct": {name: [1.0] * count + [0.0] * (items - count) for name, count in correct.items()},
        "truth": {name: [count / items] * (items - 1) + [None] for name, count in correct.items()},
        "usual": [usual] * items,
        "contradicts": [None if usual is None else True] * items,
        "late_mass": [0.25] * items,
        "tokens": [50] * items,
    }


@pytest.fixture
def runs(tmp_path):
    """Two seeds of GRPO and MAPO, MAPO one and two questions better; a third seed that was not finished."""

    def run(variant: str, seed: int, right: int | None) -> EvidenceRun:
        path = None
        if right is not None:
            path = tmp_path / f"{variant}-{seed}.json"
            path.write_text(json.dumps(record(right, 8)))
        return EvidenceRun(task="a task", variant=variant, seed=seed, measured=path)

    return [run("grpo", 1, 10), run("mapo", 1, 11), run("grpo", 2, 10), run("mapo", 2, 12), run("mapo", 3, None)]


def test_differences_are_paired_by_seed_with_their_interval(runs) -> None:
    table = evidence_markdown(runs, {})
    row = next(line for line in table.splitlines() if line.startswith("| mapo | 2 | +"))
    assert row.split("|")[3].strip().startswith("+7.5 [")
    assert "mapo, accuracy against GRPO: not settled; excluded are a loss of more than" in table
    assert "mapo, probability of the truth against GRPO" in table


def test_the_training_is_shown_by_its_first_and_last_quarter(tmp_path) -> None:
    found = []
    for variant, late in (("grpo", -0.02), ("mapo", 0.02)):
        run_dir = tmp_path / variant
        run_dir.mkdir()
        steps = [
            {"step": step, "rollout/accuracy": 0.25 + 0.05 * step, "mapo/audio_mass_late": 0.3 + late * step}
            for step in range(1, 9)
        ]
        (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
        path = tmp_path / f"{variant}.json"
        path.write_text(json.dumps(record(10, 8)))
        found.append(EvidenceRun(task="a task", variant=variant, seed=1, measured=path, run_dir=run_dir))
    trained = evidence_markdown(found, {}).partition("While they were trained:")[2]
    assert "| mapo | 1 | 32.5 | 62.5 | 0.330 | 0.450 |" in trained
    assert "| mapo | 1 | +0.0 | +0.0 | +0.060 | +0.300 |" in trained and "tokens" not in trained


def test_a_run_that_was_not_finished_is_named(runs) -> None:
    assert "Started and not finished: mapo seed 3." in evidence_markdown(runs, {})


def test_a_measure_that_a_task_does_not_have_is_left_out(tmp_path) -> None:
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(record(10, 8, usual=None)))
    table = evidence_markdown([EvidenceRun(task="plain", variant="grpo", seed=1, measured=path)], {})
    assert "usual word said" not in table and "late listening used, points" in table


def test_the_start_says_whether_the_task_can_test_late_listening() -> None:
    assert "the task can test it" in admission(record(18, 4))
    assert "cannot test whether promoting it helps" in admission(record(10, 10))


def test_only_the_text_between_the_markers_is_replaced(tmp_path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- evidence -->", "<!-- /evidence -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    fill(page, "evidence", "new")
    assert page.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="to fill"):
        fill(page, "evidence", "new")
