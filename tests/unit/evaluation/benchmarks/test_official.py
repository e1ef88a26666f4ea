"""The official scorers' rule, the official files, and what is said of a data set's version."""

import json

import pytest

from nemo_mapo.config.evaluation import StatisticsConfig
from nemo_mapo.evaluation.benchmarks.items import load_benchmark
from nemo_mapo.evaluation.benchmarks.layouts import LAYOUTS
from nemo_mapo.evaluation.benchmarks.official import official_string_match
from nemo_mapo.evaluation.benchmarks.predictions import Prediction, read_predictions
from nemo_mapo.evaluation.benchmarks.scoring import Scorer
from nemo_mapo.evaluation.benchmarks.tables import build_results

CHOICES = ("Man", "Woman", "A young man", "Robot")


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Man", "Man", True),
        ("it is a man.", "Man", False),  # "a" is a word of a wrong choice only
        ("it is the MAN", "Man", True),
        ("not the man", "Man", True),
        ("A", "Man", False),
        ("man or woman", "Man", False),
        ("young man", "Man", False),
        ("A young man", "A young man", True),
        ("the man was a young robot", "A young man", False),
        ("", "Man", False),
        ("?!", "Man", False),
    ],
)
def test_the_official_rule_by_hand(prediction: str, answer: str, right: bool) -> None:
    assert official_string_match(prediction, answer, CHOICES) is right


def mmar_file(tmp_path, *choices):
    records = [
        {"id": f"q{row}", "audio_path": "./a.wav", "question": "Who?", "choices": list(texts), "answer": "Man",
         "modality": "speech", "category": "Signal Layer", "sub-category": "x"}
        for row, texts in enumerate(choices)
    ]  # fmt: skip
    path = tmp_path / "MMAR-meta.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_an_empty_choice_as_published_is_left_out_and_counted(tmp_path) -> None:
    benchmark = load_benchmark(mmar_file(tmp_path, ("Man", "Woman"), ("Woman", "", "Man")), LAYOUTS["mmar"])
    assert benchmark.items[1].slots == ("Woman", None, "Man") and benchmark.items[1].choices == ("Woman", "Man")
    assert benchmark.with_empty_choices == ("q1",)
    scores = Scorer(benchmark, template="none")({"q1": Prediction(id="q1", completion="C")})
    assert [score.value for score in scores] == [0.0, 1.0]
    notes = build_results(benchmark, scores, StatisticsConfig(bootstrap_samples=10)).notes
    assert any("an empty choice" in note and "1 (q1)" in note for note in notes)


def test_both_rules_are_shown_with_one_denominator(tmp_path) -> None:
    benchmark = load_benchmark(mmar_file(tmp_path, *[("Man", "Woman")] * 4), LAYOUTS["mmar"])
    said = {"q0": "Man", "q1": "A", "q2": "not the man"}
    scores = Scorer(benchmark, template="none")(
        {name: Prediction(id=name, completion=text) for name, text in said.items()}
    )
    assert [score.value for score in scores] == [1.0, 1.0, 0.0, 0.0]
    assert [score.official for score in scores] == [True, False, True, False]
    results = build_results(benchmark, scores, StatisticsConfig(bootstrap_samples=10))
    assert results.official_string_match == 0.5 == results.overall.score
    assert "official_string_match: 50.00 %" in results.markdown() and "differ on 2 of 4" in results.markdown()


def test_the_version_of_a_data_set_is_its_contents(tmp_path) -> None:
    path = mmar_file(tmp_path, ("Man", "Woman"))
    unknown = load_benchmark(path, LAYOUTS["mmar"])
    assert unknown.version.startswith("not a known publication (SHA-256 ")
    known = LAYOUTS["mmar"].__class__(**{**vars(LAYOUTS["mmar"]), "versions": {unknown.digest: "of 2026-02-16"}})
    assert load_benchmark(path, known).version == "of 2026-02-16"
    assert all(len(digest) == 64 for layout in (LAYOUTS["mmar"], LAYOUTS["mmau"]) for digest in layout.versions)


@pytest.mark.parametrize("key", ["answer_prediction", "model_prediction"])
def test_predictions_are_read_under_the_official_keys(tmp_path, key: str) -> None:
    benchmark = load_benchmark(mmar_file(tmp_path, ("Man", "Woman")), LAYOUTS["mmar"])
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps([{"id": "q0", key: "Man"}]))
    assert read_predictions(path, benchmark)["q0"].completion == "Man"


def test_two_official_keys_in_one_file_are_refused(tmp_path) -> None:
    benchmark = load_benchmark(mmar_file(tmp_path, ("Man", "Woman")), LAYOUTS["mmar"])
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps([{"id": "q0", "answer_prediction": "Man", "model_prediction": "Woman"}]))
    with pytest.raises(ValueError, match="both 'answer_prediction' and 'model_prediction'"):
        read_predictions(path, benchmark)
