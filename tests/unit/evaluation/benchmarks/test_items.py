"""Published files become items; what is wrong with them is named by file, item and field."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from nemo_mapo.evaluation.benchmarks.items import NO_GROUP, load_benchmark
from nemo_mapo.evaluation.benchmarks.layouts import LAYOUTS
from tests.unit.evaluation.benchmarks.published import (
    instruction_record,
    loaded,
    mmar_record,
    mmau_pro_record,
    mmau_record,
    mmsu_record,
    open_record,
    write_json,
)


def test_mmau_records_become_items(tmp_path):
    benchmark = loaded(tmp_path / "mmau.json", "mmau", [mmau_record("a"), mmau_record("b", task="music")])
    first, second = benchmark.items
    assert first.id == "a" and first.question == "What barks?" and first.part == "closed"
    assert first.choices == ("Dog", "Cat", "Cow", "Owl") and first.answer == "Dog"
    assert first.audio == ("./test-mini-audios/a.wav",)
    assert second.groups["task"] == ("music",) and second.groups["difficulty"] == ("easy",)
    assert not benchmark.is_withheld and benchmark.defective == ()


def test_an_empty_choice_of_mmsu_keeps_its_place(tmp_path):
    benchmark = loaded(tmp_path / "mmsu.json", "mmsu", [mmsu_record("a"), mmsu_record("b", choice_a="None")])
    assert benchmark.items[0].slots == (None, "male", None, "female")
    assert benchmark.items[0].choices == ("male", "female") and benchmark.items[0].answer == "female"
    assert benchmark.items[1].choices == ("None", "male", "female"), "the word None is a choice"


def test_the_three_parts_of_mmau_pro_are_distinguished(tmp_path):
    benchmark = loaded(
        tmp_path / "pro.json",
        "mmau_pro",
        [
            mmau_pro_record("closed", audio_path=["data/1.wav", "data/2.wav"]),
            instruction_record("follow", "Number Words (at most)", {"N": 5}),
            open_record("open"),
        ],
    )
    closed, instruction, question = benchmark.items
    assert closed.part == "closed" and closed.audio == ("data/1.wav", "data/2.wav")
    assert closed.groups["perceptual_skills"] == ("Source", "Texture")
    assert closed.groups["reasoning_skills"] == (NO_GROUP,)
    assert instruction.rule == "Number Words (at most)" and instruction.arguments == {"N": 5}
    assert instruction.answer is None and instruction.groups["part"] == ("instruction",)
    assert question.part == "open" and question.answer == "Somebody makes tea." and question.choices == ()


def test_json_lines_and_parquet_give_the_same_items_as_json(tmp_path):
    records = [
        mmau_pro_record("a"),
        instruction_record("b", "Keyword Frequency", {"keyword": "tea", "N": 2}),
        instruction_record("c", "No Commas", {}),
    ]
    expected = loaded(tmp_path / "pro.json", "mmau_pro", records).items
    (tmp_path / "pro.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # As in the published table, the clips may be embedded, and each row has the arguments of all rules.
    rows = [{**record, "audio": {"bytes": b"RIFF", "path": None}} for record in records]
    table = pyarrow.Table.from_pylist(
        [{**row, "kwargs": {"keyword": None, "N": None, **(row["kwargs"] or {})}} for row in rows]
    )
    parquet.write_table(table, tmp_path / "pro.parquet")
    for name in ("pro.jsonl", "pro.parquet"):
        assert load_benchmark(tmp_path / name, LAYOUTS["mmau_pro"]).items == expected


def test_a_whole_number_that_parquet_made_a_fraction_of_is_a_whole_number(tmp_path):
    benchmark = loaded(tmp_path / "pro.json", "mmau_pro", [instruction_record("a", "Number Bullets", {"N": 3.0})])
    assert benchmark.items[0].arguments == {"N": 3}


def test_letters_that_belong_to_the_choices_are_taken_off(tmp_path):
    record = mmau_record("a", choices=["(A) Dog", "(B) Cat"], answer="(B) Cat")
    (item,) = loaded(tmp_path / "mmau.json", "mmau", [record]).items
    assert item.choices == ("Dog", "Cat") and item.answer == "Cat"
    kept = mmau_record("a", choices=["A. Dog", "C. Cat"], answer="C. Cat")
    (item,) = loaded(tmp_path / "mmau.json", "mmau", [kept]).items
    assert item.choices == ("A. Dog", "C. Cat")


def test_an_answer_written_a_little_differently_is_the_choice_it_means(tmp_path):
    (item,) = loaded(tmp_path / "mmar.json", "mmar", [mmar_record("a", answer="at  sea.")]).items
    assert item.answer == "At sea" and not item.is_defective


def test_withheld_answers_are_recognised(tmp_path):
    records = [mmau_record(name, answer="") for name in "ab"]
    assert loaded(tmp_path / "test.json", "mmau", records).is_withheld


def test_answers_outside_the_choices_are_refused_or_counted(tmp_path):
    records = [mmar_record("a"), mmar_record("b", answer="At sea\nOn a train"), mmar_record("c", choices=["At sea"])]
    with pytest.raises(ValueError, match=r"item 2 \(id 'b'\): field 'answer' is .*keep_defective"):
        loaded(tmp_path / "mmar.json", "mmar", records)
    benchmark = loaded(tmp_path / "mmar.json", "mmar", records, keep_defective=True)
    assert len(benchmark.items) == 3 and benchmark.defective == ("b", "c")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": None}, "field 'id' is None"),
        ({"id": 1.5}, "field 'id' is 1.5"),
        ({"id": "a"}, "field 'id' is 'a', which item 1 has already"),
        ({"question": ""}, "(id 'b'): field 'question' is '': it must be a non-empty text"),
        ({"question": 7}, "(id 'b'): field 'question' is 7"),
        ({"audio_id": []}, "(id 'b'): field 'audio_id' is []: it must be a path"),
        ({"choices": "Dog, Cat"}, "(id 'b'): field 'choices' is 'Dog, Cat': it must be a list of texts"),
        ({"choices": ["Dog", 3]}, "(id 'b'): field 'choices' is ['Dog', 3]"),
        (
            {"choices": ["Dog", " "]},
            "(id 'b'): field 'answer' is 'Dog', which is not among two or more choices ['Dog']",
        ),
        ({"answer": ["Dog"]}, "(id 'b'): field 'answer' is ['Dog']"),
        ({"answer": None}, "(id 'b'): field 'answer' is empty, though other items have an answer"),
        ({"task": {"a": 1}}, "(id 'b'): field 'task' is {'a': 1}"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_item(tmp_path, changes, said):
    path = tmp_path / "mmau.json"
    with pytest.raises(ValueError) as refused:
        loaded(path, "mmau", [mmau_record("a"), mmau_record("b", **changes)])
    assert f"{path}: item 2" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "arguments", "said"),
    [
        ("Sing it", {}, "unknown instruction 'Sing it'"),
        ("Number Bullets", {}, "has N=None: it must be an integer"),
        ("Number Bullets", {"N": "3"}, "has N='3': it must be an integer"),
        ("Number Bullets", {"N": 2.5}, "has N=2.5: it must be an integer"),
        ("Start Checker", {"start_phrase": ""}, "has start_phrase='': it must be a non-empty text"),
        ("Number Bullets", ["N"], "field 'kwargs' is ['N']: it must be an object or null"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_refused(tmp_path, rule, arguments, said):
    with pytest.raises(ValueError) as refused:
        loaded(tmp_path / "pro.json", "mmau_pro", [instruction_record("a", rule, arguments)])
    assert "item 1 (id 'a')" in str(refused.value) and said in str(refused.value)


def test_a_missing_field_can_be_mapped_or_its_tables_left_out(tmp_path):
    record = mmar_record("a")
    record["kind"] = record.pop("modality")
    record["file"] = record.pop("audio_path")
    path = write_json(tmp_path / "mmar.json", [record])
    with pytest.raises(ValueError, match=r"no item has the field 'modality'.*modality=NAME"):
        load_benchmark(path, LAYOUTS["mmar"])
    with pytest.raises(ValueError, match=r"field 'audio_path' is missing.*audio=NAME"):
        load_benchmark(path, LAYOUTS["mmar"].with_fields({"modality": "kind"}))
    layout = LAYOUTS["mmar"].with_fields({"modality": "kind", "audio": "file", "sub-category": None})
    (item,) = load_benchmark(path, layout).items
    assert item.groups == {"modality": ("mix-sound-speech",), "category": ("Semantic Layer",)}
    assert layout.tables == (("modality",), ("category",))


@pytest.mark.parametrize(
    ("fields", "said"), [({"genre": "x"}, "genre unknown"), ({"answer": None}, "answer cannot be left out")]
)
def test_a_field_mapping_that_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        LAYOUTS["mmau"].with_fields(fields)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "{", "not a JSON file"),
        ("x.json", "{}", "holds dict, not a list"),
        ("x.json", "[]", "holds no item"),
        ("x.json", "[3]", "item 1: not a JSON object but 3"),
        ("x.jsonl", '{"id": "a"\n', "x.jsonl:1: not a JSON line"),
        ("x.csv", "id", "must end in .json, .jsonl or .parquet"),
        ("x.parquet", "id", "not a Parquet file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        load_benchmark(tmp_path / name, LAYOUTS["mmau"])


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        load_benchmark(tmp_path / "none.json", LAYOUTS["mmau"])
