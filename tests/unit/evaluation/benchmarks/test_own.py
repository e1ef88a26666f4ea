"""Own questions as a benchmark: every form in which they lie, chance, and nothing left out of the denominator."""

import csv
import gzip
import json

import numpy as np
import pytest
import soundfile

from nemo_mapo.config.evaluation import BenchmarkConfig, EvaluationDataConfig, StatisticsConfig
from nemo_mapo.data.importers.base import Source
from nemo_mapo.data.importers.multiple_choice import IMPORTER
from nemo_mapo.data.importers.prepare import PrepareOptions, prepare
from nemo_mapo.data.splits import manifest_path
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.evaluation.benchmarks.assemble import read_benchmark
from nemo_mapo.evaluation.benchmarks.predictions import Prediction
from nemo_mapo.evaluation.benchmarks.prompts import BenchmarkPrompts
from nemo_mapo.evaluation.benchmarks.scoring import Scorer
from nemo_mapo.evaluation.benchmarks.tables import build_results
from nemo_mapo.types import Wording

RATE = 16000
WORDS = ("zero", "one", "two", "three")


def record(number, **fields):
    return {"id": f"q{number}", "audio": f"{number}.wav", "question": "which?", "choices": list(WORDS),
            "answer": WORDS[number % 4], "speaker": "ab"[number % 2], **fields}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        samples = np.full(RATE * (number + 1), 0.1 * (number + 1))
        soundfile.write(tmp_path / f"{number}.wav", samples, RATE, subtype="FLOAT")
    return tmp_path


def write_lines(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def read(path, **options):
    return read_benchmark(BenchmarkConfig(name="multiple_choice", items_path=str(path), **options))


def write_csv(folder):
    path = folder / "questions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, list(record(0)))
        rows.writeheader()
        rows.writerows({**record(n), "choices": " | ".join(WORDS)} for n in range(4))
    return path


def write_json(folder):
    path = folder / "all.json"
    path.write_text(json.dumps([record(n) for n in range(4)]), encoding="utf-8")
    return path


def write_nemo(folder):
    lines = [{**record(n), "audio_filepath": f"{n}.wav", "duration": n + 1.0, "offset": 0.0} for n in range(4)]
    return write_lines(folder / "nemo.json", [{k: v for k, v in one.items() if k != "audio"} for one in lines])


def write_manifest(folder):
    source = write_lines(folder / "all.jsonl", [record(n, split="test") for n in range(4)])
    prepare(IMPORTER, Source(path=source), folder / "prepared", PrepareOptions(), progress=False)
    return manifest_path(folder / "prepared", "test")


@pytest.mark.parametrize("write", [write_csv, write_json, write_nemo, write_manifest])
def test_every_form_gives_the_same_items(folder, write):
    benchmark = read(write(folder), fields={"speaker": "speaker"})
    found = {item.id: item for item in benchmark.items}
    assert sorted(found) == ["q0", "q1", "q2", "q3"]
    item = found["q3"]
    assert (item.choices, item.answer, item.audio) == (WORDS, "three", (str(folder / "3.wav"),))
    assert item.groups == {"task": ("audio_qa",), "speaker": ("b",)}
    assert benchmark.layout.tables == (("task",), ("speaker",))


def test_scores_have_chance_wilson_intervals_and_every_item(folder):
    benchmark = read(write_csv(folder), fields={"speaker": "speaker"})
    said = {"q0": "zero", "q1": "two", "q2": "nothing of these"}
    predictions = {
        name: Prediction(id=name, completion=text, finished=True, shown_choices=None) for name, text in said.items()
    }
    results = build_results(benchmark, Scorer(benchmark, template="none")(predictions), StatisticsConfig())
    assert (results.overall.items, results.overall.score, results.chance) == (4, 0.25, 0.25)
    assert (results.overall.missing, results.overall.unparsable) == (1, 1)
    # Wilson's 95 % interval of 1 in 4.
    assert (results.overall.low, results.overall.high) == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert [(row.group, row.items) for row in results.tables[1].rows] == [(("a",), 2), (("b",), 2)]
    assert "chance is 25.00 % over the 4 items" in results.markdown() and "not a published" not in results.markdown()


def test_fields_of_other_names_are_mapped(folder):
    records = [{**record(n), "label": record(n)["answer"]} for n in range(4)]
    path = write_lines(folder / "own.jsonl", [{k: v for k, v in one.items() if k != "answer"} for one in records])
    assert read(path, fields={"answer": "label", "task": None}).items[1].answer == "one"
    assert read(path, fields={"answer": "label", "task": None}).layout.tables == ()
    with pytest.raises(ValueError, match=r"own.jsonl:1: no field 'labels', which benchmark.fields names"):
        read(path, fields={"answer": "labels"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": "four"}, r"own.jsonl:2: field 'answer' is 'four', which names none of the choices"),
        ({"id": "q0"}, r"own.jsonl:2: id 'q0' is that of .*own.jsonl:1 already"),
        ({"choices": ["one", "one"]}, r"own.jsonl:2: "),
        ({"audio": None}, r"own.jsonl:2: field 'audio' is None"),
        ({"recording": {"sources": [{"type": "command", "source": "touch x"}]}, "type": "MonoCut"}, "must be one file"),
    ],
)
def test_a_line_that_cannot_be_asked_ends_the_evaluation_by_place(folder, changes, said):
    path = write_lines(folder / "own.jsonl", [record(0), {**record(1), **changes}])
    with pytest.raises(ValueError, match=said):
        read(path)


def test_files_that_are_none_are_refused(folder):
    (folder / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}')[:-6])
    (folder / "empty.jsonl").write_text("")
    for name, said in (("broken.jsonl.gz", "damaged"), ("empty.jsonl", "no question"), ("no.csv", "no such file")):
        with pytest.raises(ValueError, match=said):
            read(folder / name)
    with pytest.raises(ValueError, match="keep_defective"):
        read(folder / "empty.jsonl", keep_defective=True)


def test_only_the_stretch_that_is_asked_about_is_read(folder):
    path = write_lines(folder / "own.jsonl", [record(3, offset=1.0, duration=0.5), record(2, offset=2.5, duration=2.0)])
    first, second = read(path).items
    prompts = BenchmarkPrompts(
        EvaluationDataConfig(tokenizer="unused"),
        audio_root=folder,
        tokenizer=build_tokenizer(),
        audio_tokens=lambda samples: samples // 1600,
        wording=Wording(),
    )
    assert [len(clip) for clip in prompts([first])[0].prompt.clips] == [RATE // 2]
    with pytest.raises(ValueError, match=r"item q2: .*2.5 s to 4.5 s are asked of 3 s"):
        prompts.check([second], lambda prompt, tokens: None)
