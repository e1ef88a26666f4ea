"""MMAR-Rubrics: wrong answers are 0 unasked, right ones the mean of the middle three of five ratings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_mapo.evaluation.benchmarks.rubrics import (
    RATERS,
    Reasoned,
    RubricJudge,
    RubricPrompt,
    middle_mean,
    points_share,
    read_reasoned,
    read_rubric_items,
    summary,
)
from nemo_mapo.rewards.judge import JudgeError, OpenAIClient
from tests.chat_server import chat_reply, serve

__all__ = ["serve"]

PROMPT = """You judge.
===
Q: {question} A: {answer} Ideal: {ideal_reasoning}
{#criteria}* {name}: {scoring_point} of {choices}{comma}
{/criteria}
He thought: {reasoning} He said: {prediction}"""
RUBRIC = [
    {"name": "cue", "scoring_point": "hears {the} bark", "note": "", "choices": [0, 1]},
    {"name": "link", "scoring_point": "links it to a dog", "note": "", "choices": [0, 1, 3]},
]


def record(name: str = "q1", **changes: object) -> dict[str, object]:
    return {"id": name, "question": "which?", "choices": ["dog", "cat"], "answer": "dog",
            "thinking": "a bark is a dog's", "modality": "sound", "category": "Signal Layer",
            "rubric": RUBRIC, **changes}  # fmt: skip


def written(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


@pytest.fixture
def items_file(tmp_path: Path) -> Path:
    return written(tmp_path / "meta.jsonl", record("q1"), record("q2"), record("q3", modality="music"), record("q4"))


@pytest.fixture
def prompt(tmp_path: Path) -> RubricPrompt:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    return RubricPrompt(tmp_path / "prompt.txt")


def points(*given: object) -> str:
    return "Here: " + json.dumps([{"name": str(place), "score": one} for place, one in enumerate(given)])


@pytest.mark.parametrize(
    ("reply", "share"),
    [(points(1, 3), 1.0), (points(0, 1), 0.25), (points(0, 0), 0.0), (points(1), None), (points(1, 2), None),
     (points(1, "3"), None), (points(True, 3), None), ("I think 4 of 4", None), ("[{" * 50_000, None),
     ("[1, 2]", None), ("", None)],
)  # fmt: skip
def test_points_over_the_points_to_be_had(items_file: Path, reply: str, share: float | None) -> None:
    assert points_share(reply, read_rubric_items(items_file)[0].rubric) == share


def test_the_lowest_and_the_highest_of_five_do_not_count() -> None:
    assert middle_mean([0.0, 1.0, 0.25, 0.5, 0.75]) == 0.5
    assert middle_mean([1.0, 1.0, 1.0, 0.0, 0.0]) == pytest.approx(2 / 3)


def test_the_prompt_is_filled_in_one_pass(items_file: Path, prompt: RubricPrompt) -> None:
    said = Reasoned(reasoning="{answer} {#criteria}", answer="{question}")
    filled = prompt.filled(read_rubric_items(items_file)[0], said)
    assert prompt.system == "You judge."
    assert filled == (
        "Q: which? A: dog Ideal: a bark is a dog's\n* cue: hears {the} bark of [0, 1],\n"
        "* link: links it to a dog of [0, 1, 3]\n\nHe thought: {answer} {#criteria} He said: {question}"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [(PROMPT.replace("{reasoning}", ""), "lacks {reasoning}"), (PROMPT.replace("{name}", ""), "lacks {name}"),
     (PROMPT.replace("===", "="), "a line ==="), (PROMPT + "{cue}", "unknown field {cue}")],
)  # fmt: skip
def test_an_incomplete_prompt_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(ValueError, match=said.replace("{", r"\{")):
        RubricPrompt(tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"rubric": None}, "gives no points"), ({"thinking": None}, "'thinking' is None"),
     ({"rubric": [{"name": "a", "scoring_point": "b", "choices": []}]}, "list of"),
     ({"rubric": [{"scoring_point": "b", "choices": [1]}]}, "without name")],
)  # fmt: skip
def test_an_item_that_cannot_be_scored_by_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=rf"meta\.jsonl: item 1 \(id 'q1'\): .*{said}"):
        read_rubric_items(written(tmp_path / "meta.jsonl", record(**changes)))


def prediction(name: str, answer: str | None, thinking: str | None = "it barks") -> dict[str, object]:
    return {"id": name, "thinking_prediction": thinking, "answer_prediction": answer}


def test_all_items_count_and_only_right_answers_are_asked_about(serve, items_file, prompt, tmp_path) -> None:
    replies = iter([points(0, 0), points(1, 3), points(0, 1), points(1, 1), points(0, 3)])
    server = serve(lambda path, body: chat_reply(next(replies)))
    items = read_rubric_items(items_file)
    said = read_reasoned(
        written(tmp_path / "p.jsonl", prediction("q1", "a dog"), prediction("q2", "cat"), prediction("q4", None, None)),
        items,
    )
    judge = RubricJudge(
        OpenAIClient(server.config()), prompt, file=tmp_path / "ratings.jsonl", attempts=1, concurrency=1
    )
    scores = judge(items, said)
    # Shares 0, 1, 0.25, 0.5, 0.75: the middle three have mean 0.5; three other items are 0.
    assert [(score.value, score.correct) for score in scores] == [(0.5, True), (0, False), (0, False), (0, False)]
    found = summary(items, scores)
    assert (found["score"], found["accuracy"], found["of_right"]) == (0.125, 0.25, 0.5)
    assert found["by_group"]["modality"] == {"sound": {"items": 3, "score": 0.5 / 3}, "music": {"items": 1, "score": 0}}
    assert len(server.requests) == RATERS
    again = RubricJudge(
        OpenAIClient(server.config()), prompt, file=tmp_path / "ratings.jsonl", attempts=1, concurrency=1
    )
    assert again(items, said) == scores and len(server.requests) == RATERS, "ratings are kept"


def test_a_rating_that_cannot_be_had_is_never_made_up(serve, items_file, prompt) -> None:
    server = serve(lambda path, body: chat_reply("no idea"))
    items = read_rubric_items(items_file)
    judge = RubricJudge(OpenAIClient(server.config()), prompt, file=None, attempts=2, concurrency=1)
    with pytest.raises(JudgeError, match="item q1: 2 replies of the judge score no rubric, the last: 'no idea'"):
        judge(items, {"q1": Reasoned(reasoning="it barks", answer="dog")})


@pytest.mark.parametrize(
    ("line", "said"),
    [(prediction("q9", "dog"), "not an item of the benchmark"), (prediction("q1", None), "'answer_prediction' is None"),
     (prediction("q1", None, None), "no record has")],
)  # fmt: skip
def test_predictions_that_cannot_be_scored_are_refused(items_file, tmp_path, line, said) -> None:
    with pytest.raises(ValueError, match=said):
        read_reasoned(written(tmp_path / "p.jsonl", line), read_rubric_items(items_file))


def test_the_command_prints_the_score_and_keeps_everything(serve, items_file, prompt, tmp_path) -> None:
    server = serve(lambda path, body: chat_reply(points(1, 1)))
    predictions = written(tmp_path / "p.jsonl", prediction("q1", "dog"), prediction("q3", "dog"))
    script = Path(__file__).parents[3] / "examples" / "score_rubrics.py"
    asked = {"--items": items_file, "--predictions": predictions, "--prompt": tmp_path / "prompt.txt",
             "--judge-url": server.base_url, "--judge-model": "judge", "--output": tmp_path / "out"}  # fmt: skip
    words = [str(word) for pair in asked.items() for word in pair]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MMAR-Rubrics: 25.0 %" in done.stdout and "over all 4 items (2 without a prediction)" in done.stdout
    assert json.loads((tmp_path / "out" / "rubrics.json").read_text())["of_right"] == 0.5
    assert len((tmp_path / "out" / "ratings.jsonl").read_text().splitlines()) == 2 * RATERS
