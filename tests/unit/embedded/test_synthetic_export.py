"""The synthetic corpus written as the files that users bring reads back as the same questions."""

import pytest

from nemo_mapo.data.importers.base import Source
from nemo_mapo.data.importers.prepare import PrepareOptions, prepare
from nemo_mapo.data.importers.registry import IMPORTERS
from nemo_mapo.data.manifests import example_from_cut, load_cuts
from nemo_mapo.data.splits import SPLITS, manifest_path
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.embedded.synthetic_export import BENCHMARK_FILE, export_questions
from nemo_mapo.embedded.synthetic_text import TASKS
from nemo_mapo.evaluation.benchmarks.items import load_benchmark
from nemo_mapo.evaluation.benchmarks.layouts import LAYOUTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "corpus"
    write_corpus(SyntheticCorpusConfig(train=16, validation=8, test=8), directory, progress=False)
    return directory


@pytest.mark.parametrize("task", TASKS)
def test_what_is_exported_is_imported_as_the_same_questions(corpus, tmp_path, task):
    export_questions(corpus, tmp_path / "questions")
    source = Source(path=tmp_path / "questions" / task)
    prepare(IMPORTERS["multiple_choice"], source, tmp_path / "prepared", PrepareOptions(), progress=False)
    for split in SPLITS:
        before = [example for example in examples(manifest_path(corpus, split)) if example.task == task]
        assert before and examples(manifest_path(tmp_path / "prepared", split)) == before


def test_the_benchmark_asks_the_questions_of_the_test_split(corpus, tmp_path):
    export_questions(corpus, tmp_path)
    benchmark = load_benchmark(tmp_path / BENCHMARK_FILE, LAYOUTS["mmau"])
    asked = {item.id: (item.question, item.choices, item.answer) for item in benchmark.items}
    expected = examples(manifest_path(corpus, "test"))
    assert asked == {example.id: (example.question, example.choices, example.answer) for example in expected}


def examples(manifest):
    return sorted(map(example_from_cut, load_cuts(manifest)), key=lambda example: example.id)
