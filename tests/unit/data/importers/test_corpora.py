"""Every importer on its corpus's layout: what is asked, what is left out, and that the dataloading takes the result."""

import pytest

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.dataset import PromptDataset, build_dataloader
from nemo_mapo.data.importers.base import Source
from nemo_mapo.data.importers.registry import IMPORTERS
from nemo_mapo.data.manifests import validate_manifest
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.types import Wording
from tests.unit.data.importers.corpora import BUILDERS, cuts_of

COUNTS = {
    "avqa": {"train": 3, "validation": 1},
    "audioset": {"train": 2, "test": 1},
    "tacos": {"train": 4, "test": 2},
    "libritts_r": {"train": 5, "validation": 5, "test": 5},
    "iemocap": {"train": 6, "validation": 2, "test": 2},
    "musiccaps": {"train": 3, "test": 2},
    "cochlscene": {"train": 5, "validation": 2, "test": 1},
    "audioskills": {"train": 2},
    "multiple_choice": {"train": 2, "test": 2},
    "hf_folder": {"train": 1, "validation": 1, "test": 1},
    "nemo": {"train": 2},
    "shar": {"train": 3, "test": 3},
}
DROPS = {
    "iemocap": {"no agreed emotion": 5},
    "audioskills": {"not multiple choice": 1, "several audio clips": 1},
    "nemo": {"marked _skipme": 1},
}


def test_every_importer_has_a_corpus_here():
    assert set(BUILDERS) == set(IMPORTERS) == set(COUNTS)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_corpus_gives_its_questions_in_its_splits_and_loads(name, corpus, run):
    source = corpus(name)
    before = sorted(source.path.rglob("*"))
    report, output = run(name, source)
    assert sorted(source.path.rglob("*")) == before
    assert {split: len(cuts_of(output, split)) for split in report.splits} == COUNTS[name]
    assert dict(report.dropped) == DROPS.get(name, {})
    assert report.shared_audio == []
    dataset = PromptDataset(build_tokenizer(), lambda samples: samples // 1280, Wording())
    for split, count in COUNTS[name].items():
        manifest = str(output / f"cuts_{split}.jsonl.gz")
        config = DatasetConfig(input_cfg=({"type": "lhotse", "cuts_path": manifest},), batch_size=4)
        assert validate_manifest(config).used == count
        batches = list(build_dataloader(config, prompt_dataset=dataset))
        examples = [problem.example for batch in batches for problem in batch]
        assert len(examples) == count and all(example.answer in example.choices for example in examples)
        assert all(len(problem.prompt.clips[0]) > 0 for batch in batches for problem in batch)


@pytest.mark.parametrize("name", BUILDERS)
def test_an_empty_directory_is_refused_by_name(name, tmp_path, run):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing"):
        run(name, Source(path=tmp_path / "nothing"))
    assert [path.name for path in tmp_path.iterdir()] == ["nothing"]


def custom(output, split, name):
    return cuts_of(output, split)[name].custom


def test_avqa_asks_about_the_audio_and_takes_the_answer_by_index(corpus, run):
    _, output = run("avqa", corpus("avqa"))
    assert custom(output, "train", "avqa-train-2") == {
        "question": "What happened in the audio?",
        "choices": ["motorboat", "sawing wood", "rain", "a choir sings"],
        "answer": "motorboat",
        "task": "Happening",
    }


def test_audioset_asks_for_the_most_specific_class_and_offers_no_class_that_may_be_true(corpus, run):
    _, output = run("audioset", corpus("audioset"))
    dog = custom(output, "train", "audioset---dog")
    assert dog["answer"] == "Bark" and set(dog["choices"]) <= {"Bark", "Cat", "Rain", "Engine", "Violin, fiddle"}
    strings = custom(output, "test", "audioset-strings")
    assert strings["answer"] in ("Violin, fiddle", "Engine")
    assert not {"Violin, fiddle", "Engine"} <= set(strings["choices"])


def test_an_unknown_audioset_label_is_an_error_with_its_line(corpus, run):
    source = corpus("audioset")
    path = source.path / "eval_segments.csv"
    path.write_text(path.read_text().replace("/m/violin", "/m/lute"))
    with pytest.raises(ValueError, match=r"eval_segments.csv:4: \['/m/lute'\]"):
        run("audioset", source)


def test_tacos_offers_other_times_of_the_clip_but_nothing_that_overlaps(corpus, run):
    _, output = run("tacos", corpus("tacos"))
    first = custom(output, "train", "tacos-1-1")
    assert first["question"] == "What is heard between 0.0 and 0.2 seconds?"
    assert set(first["choices"]) == {"A dog barks.", "A door is shut.", "Rain falls on a roof."}
    assert first["caption"] == "All of Animals."


def test_libritts_r_offers_sentences_of_similar_length_and_reports_missing_audio(corpus, run):
    source = corpus("libritts_r")
    (source.path / "dev-clean" / "85" / "121123" / "85_121123_000000_000002.wav").unlink()
    with pytest.raises(ValueError, match=r"85_121123.trans.tsv:3: Lhotse's recipe has no recording"):
        run("libritts_r", source)
    report, output = run("libritts_r", source, skip_invalid=True)
    assert dict(report.dropped) == {"audio file missing": 1}
    cut = custom(output, "test", "libritts_r-86_121123_000000_000001")
    assert cut["answer"] == "Sentence number 1." and len(set(cut["choices"])) == 4


def test_iemocap_never_offers_happiness_against_excitement(corpus, run):
    _, output = run("iemocap", corpus("iemocap"))
    excited = [cut.custom for cut in cuts_of(output, "train").values() if cut.custom["answer"] == "excitement"]
    assert len(excited) == 3 and all("happiness" not in cut["choices"] for cut in excited)
    assert sorted(cuts_of(output, "test")) == ["iemocap-Ses05F_impro01_F000", "iemocap-Ses05F_impro01_F001"]


def test_musiccaps_offers_no_caption_that_shares_an_aspect(corpus, run):
    _, output = run("musiccaps", corpus("musiccaps"))
    piano = custom(output, "train", "musiccaps--0Gj8")
    assert set(piano["choices"]) == {"Someone plays the piano.", "A rock band with drums."}


def test_cochlscene_reads_scenes_from_folders(corpus, run):
    _, output = run("cochlscene", corpus("cochlscene"))
    (station,) = cuts_of(output, "test").values()
    assert station.custom["answer"] == "subway station" and len(station.custom["choices"]) == 4


def test_audioskills_takes_question_and_choices_out_of_the_prompt(corpus, run):
    _, output = run("audioskills", corpus("audioskills"))
    first = custom(output, "train", "audioskills-counting_train-a")
    assert (first["question"], first["choices"]) == ("How many taps are heard?", ["one", "two", "three"])
    assert custom(output, "train", "audioskills-counting_train-b")["answer"] == "C"


def test_messages_and_plain_fields_are_both_understood(corpus, run):
    _, output = run("multiple_choice", corpus("multiple_choice"))
    assert custom(output, "train", "train-1") == {
        "question": "What barks?",
        "choices": ["a cat", "a dog", "a [toy] dog"],
        "answer": "a dog",
        "task": "audio_qa",
    }
    key = custom(output, "train", "train-2")
    assert (key["question"], key["choices"], key["answer"]) == ("Which key?", ["C", "C#"], "C#")
    assert custom(output, "test", "t1")["reasoning"].startswith("<think>")
    assert custom(output, "test", "t2")["answer"] == "10"


def test_audio_inside_tables_becomes_flac_files(corpus, run):
    _, output = run("hf_folder", corpus("hf_folder"))
    (cut,) = cuts_of(output, "train").values()
    assert cut.custom["answer"] == "One" and cut.recording.sources[0].source.startswith("audio/")
    (kept,) = cuts_of(output, "test").values()
    assert kept.recording.sources[0].source.endswith("corpus/test/3.wav")


def test_a_damaged_parquet_file_is_one_error(corpus, run):
    source = corpus("hf_folder")
    (path,) = source.path.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet: not a Parquet file"):
        run("hf_folder", source)


def test_a_nemo_line_keeps_its_offset(corpus, run):
    _, output = run("nemo", corpus("nemo"))
    cuts = cuts_of(output, "train")
    assert {name: (cut.start, cut.duration) for name, cut in cuts.items()} == {
        "one": (0.1, 0.4),
        "manifest_train-2": (0.5, 0.5),
    }


def test_a_damaged_shar_archive_is_one_error(corpus, run):
    source = corpus("shar")
    archive = source.path / "train" / "recording.000000.tar"
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(ValueError, match="train: a Shar archive is damaged"):
        run("shar", source)
