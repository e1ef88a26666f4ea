"""The synthetic corpus written as the files that users bring reads back as the same questions."""

import pytest

from nemo_mapo.data.importers.base import Source
from nemo_mapo.data.importers.prepare import PrepareOptions, prepare
from nemo_mapo.data.importers.registry import IMPORTERS
from nemo_mapo.data.manifests import example_from_cut, load_cuts
from nemo_mapo.data.synthetic import SPLITS, SyntheticCorpusConfig, manifest_path, write_corpus
from nemo_mapo.data.synthetic_export import BENCHMARK_FILE, export_questions
from nemo_mapo.evaluation.benchmarks.items import load_benchmark
from nemo_mapo.evaluation.benchmarks.mmau import LAYOUT


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "corpus"
    write_corpus(SyntheticCorpusConfig(train=8, validation=4, test=4), directory, progress=False)
    return directory


def test_what_is_exported_is_imported_as_the_same_questions(corpus, tmp_path):
    export_questions(corpus, tmp_path / "questions")
    source = Source(path=tmp_path / "questions")
    prepare(IMPORTERS["multiple_choice"], source, tmp_path / "prepared", PrepareOptions(), progress=False)
    for split in SPLITS:
        before = sorted(map(example_from_cut, load_cuts(manifest_path(corpus, split))), key=by_id)
        after = sorted(map(example_from_cut, load_cuts(manifest_path(tmp_path / "prepared", split))), key=by_id)
        assert after == before


def test_the_benchmark_asks_the_questions_of_the_test_split(corpus, tmp_path):
    export_questions(corpus, tmp_path)
    benchmark = load_benchmark(tmp_path / BENCHMARK_FILE, LAYOUT)
    asked = {item.id: (item.question, item.choices, item.answer) for item in benchmark.items}
    examples = map(example_from_cut, load_cuts(manifest_path(corpus, "test")))
    assert asked == {example.id: (example.question, example.choices, example.answer) for example in examples}


def by_id(example):
    return example.id
