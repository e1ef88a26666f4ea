"""Prediction files: ours and those of others, and what is refused in them."""

import json

import pytest

from nemo_mapo.evaluation.benchmarks.predictions import Prediction, read_predictions, submission
from tests.unit.evaluation.benchmarks.published import loaded, mmau_record, write_json


@pytest.fixture
def benchmark(tmp_path):
    return loaded(tmp_path / "mmau.json", "mmau", [mmau_record(name) for name in "abc"])


def test_the_published_file_with_predictions_added_is_read(tmp_path, benchmark):
    records = [
        mmau_record("a", model_prediction="Dog"),
        mmau_record("b", model_prediction=None),
        mmau_record("c", model_prediction=""),
    ]
    found = read_predictions(write_json(tmp_path / "theirs.json", records), benchmark)
    assert found == {"a": Prediction(id="a", completion="Dog"), "c": Prediction(id="c", completion="")}


def test_our_own_lines_are_read_back(tmp_path, benchmark):
    ours = [
        Prediction(id="a", completion="<think>x</think>B", shown_choices=("Owl", "Dog", "Cat", "Cow")),
        Prediction(id="b", completion="<think>x", finished=False),
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(one.record()) + "\n" for one in ours))
    assert read_predictions(path, benchmark, field="completion") == {one.id: one for one in ours}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"id": "x", "model_prediction": "Dog"}, "item 2 (id 'x'): field 'id' is 'x', which is not an item of"),
        ({"id": "a", "model_prediction": "Dog"}, "item 2: field 'id' is 'a', which item 1 has already"),
        ({"id": "b", "model_prediction": 3}, "item 2 (id 'b'): field 'model_prediction' is 3"),
        ({"id": "b", "model_prediction": "B", "finished": "yes"}, "item 2 (id 'b'): field 'finished' is 'yes'"),
        ({"id": "b", "model_prediction": "B", "shown_choices": ["Dog"]}, "it must be an order of ['Dog', 'Cat'"),
        ({"id": "b", "model_prediction": "B", "shown_choices": "Dog"}, "item 2 (id 'b'): field 'shown_choices'"),
        ({"model_prediction": "B"}, "item 2: field 'id' is None"),
    ],
)
def test_what_is_wrong_is_named_by_file_item_and_field(tmp_path, benchmark, record, said):
    path = write_json(tmp_path / "theirs.json", [{"id": "a", "model_prediction": "Dog"}, record])
    with pytest.raises(ValueError) as refused:
        read_predictions(path, benchmark)
    assert str(path) in str(refused.value) and said in str(refused.value)


def test_a_file_without_the_field_is_refused_rather_than_all_missing(tmp_path, benchmark):
    path = write_json(tmp_path / "theirs.json", [{"id": "a", "output": "Dog"}])
    with pytest.raises(ValueError, match="no item has the field 'model_output'"):
        read_predictions(path, benchmark)
    assert set(read_predictions(path, benchmark, field="output")) == {"a"}


def test_a_submission_is_the_published_file_with_predictions(tmp_path, benchmark):
    records = [mmau_record(name, answer="") for name in "ab"]
    made = submission(records, benchmark, {"a": "Dog"})
    keys = ("model_output", "model_prediction")
    assert made == [records[0] | dict.fromkeys(keys, "Dog"), records[1] | dict.fromkeys(keys, "")]
