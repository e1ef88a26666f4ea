"""Every way in which a corpus can be broken ends in one ValueError that names file, line, cut and field."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.manifests import example_from_cut, load_cuts, validate_manifest

SHIPPED = Path(__file__).parents[3] / "data" / "lhotse_manifests"


@pytest.fixture
def corpus(tmp_path):
    """A copy of the shipped sample that a test may break."""
    return shutil.copytree(SHIPPED, tmp_path / "corpus")


def lhotse(corpus, **options):
    item = {"type": "lhotse", "cuts_path": str(corpus / "cuts_train.jsonl.gz")}
    return DatasetConfig(input_cfg=(item,), **options)


def nemo(corpus, **options):
    return DatasetConfig(input_cfg=({"type": "nemo", "manifest_filepath": str(corpus / "nemo_train.json")},), **options)


def read_lines(path):
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def edit_cuts(corpus, change):
    """Rewrite the training manifest with `change` applied to its second line."""
    path = corpus / "cuts_train.jsonl.gz"
    records = read_lines(path)
    change(records[1])
    with gzip.open(path, "wt") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)
    return records[1]["id"]


def edit_nemo(corpus, change):
    path = corpus / "nemo_train.json"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def refusal(config):
    with pytest.raises(ValueError) as caught:
        validate_manifest(config)
    return str(caught.value)


def test_the_shipped_manifests_are_sound():
    assert validate_manifest(lhotse(SHIPPED)).used == 4
    assert validate_manifest(nemo(SHIPPED)).used == 4
    assert validate_manifest(lhotse(SHIPPED, max_samples=3)).used == 3


def test_the_shipped_sample_is_small_and_its_nemo_manifest_restates_the_cuts():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 300_000
    restated = [json.loads(line) for line in (SHIPPED / "nemo_train.json").read_text().splitlines()]
    cuts = {cut.id: cut for cut in load_cuts(SHIPPED / "cuts_train.jsonl.gz")}
    assert [line["id"] for line in restated] == list(cuts)
    for line in restated:
        custom = cuts[line["id"]].custom
        assert all(line[name] == custom[name] for name in ("question", "choices", "answer", "task", "reasoning"))
        assert cuts[line["id"]].recording.sources[0].source == str((SHIPPED / line["audio_filepath"]).resolve())


def test_relative_audio_paths_work_from_any_directory(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert validate_manifest(lhotse(Path("corpus"))).used == 4
    monkeypatch.chdir(corpus)
    assert validate_manifest(lhotse(Path("../corpus"))).used == 4
    assert all(cut.load_audio().shape == (1, 32000) for cut in load_cuts("../corpus/cuts_train.jsonl.gz"))


def test_an_example_is_read_from_a_cut_of_the_sample():
    cut = next(iter(load_cuts(SHIPPED / "cuts_validation.jsonl.gz")))
    example = example_from_cut(cut)
    assert (example.id, example.answer) == (cut.id, cut.custom["answer"])
    assert example.choices == tuple(cut.custom["choices"])


def test_a_missing_audio_file_is_named(corpus):
    victim = next((corpus / "audio" / "train").iterdir())
    victim.unlink()
    message = refusal(lhotse(corpus))
    assert re.search(
        rf"cuts_train\.jsonl\.gz:\d: cut {victim.stem}: no audio file at .*{victim.name}: restore", message
    )
    assert f"nemo_train.json:{message.split(':')[1]}: cut {victim.stem}: no audio file" in refusal(nemo(corpus))


def test_an_audio_file_without_readable_header_is_named(corpus):
    victim = next((corpus / "audio" / "train").iterdir())
    victim.write_bytes(b"")
    assert f"{victim} is not a readable audio file" in refusal(lhotse(corpus))


def test_half_a_line_is_named_by_its_number(corpus):
    path = corpus / "nemo_train.json"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, second[: len(second) // 2], *rest]))
    assert f"{path}:2: not a JSON line (cut in half?)" in refusal(nemo(corpus))


def test_a_compressed_manifest_that_breaks_off_is_refused(corpus):
    path = corpus / "cuts_train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-200])
    assert re.search(rf"{path}(:\d+: not a JSON line|: unreadable after line \d)", refusal(lhotse(corpus)))


@pytest.mark.parametrize("damage", [b"plain text", b"\x1f\x8b\x08broken"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(corpus, damage):
    path = corpus / "cuts_train.jsonl.gz"
    path.write_bytes(damage)
    assert f"{path}: unreadable after line 0" in refusal(lhotse(corpus))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer", None, r"field 'answer' is None: give a non-empty text"),
        ("answer", "middling", r"field 'answer' is 'middling', which is not among the choices \["),
        ("question", "  ", r"field 'question' is '  '"),
        ("choices", "a, b", r"field 'choices' is 'a, b': give a list"),
        ("choices", ["a"], r"field 'choices' is \['a'\]: give a list of at least two"),
        ("choices", ["a", "a"], r"field 'choices' is \['a', 'a'\]: give distinct"),
        ("choices", ["a", 3], r"field 'choices' is \['a', 3\]: give distinct, non-empty texts"),
        ("reasoning", 7, r"field 'reasoning' is 7"),
    ],
)
def test_a_bad_field_is_named_with_line_cut_and_value(corpus, field, value, message):
    cut = edit_cuts(corpus, lambda record: record["custom"].update({field: value}))
    assert re.search(rf"cuts_train\.jsonl\.gz:2: cut {cut}: {message}", refusal(lhotse(corpus)))


@pytest.mark.parametrize("field", ["question", "answer", "task"])
def test_a_missing_field_is_named(corpus, field):
    cut = edit_cuts(corpus, lambda record: record["custom"].pop(field))
    assert f":2: cut {cut}: field '{field}' is missing" in refusal(lhotse(corpus))


def test_a_tag_may_supply_the_task_of_a_whole_manifest(corpus):
    edit_cuts(corpus, lambda record: record["custom"].pop("task"))
    item = {"type": "lhotse", "cuts_path": str(corpus / "cuts_train.jsonl.gz"), "tags": {"task": "music"}}
    assert validate_manifest(DatasetConfig(input_cfg=(item,))).used == 4


def test_an_id_used_twice_is_named_with_both_places(corpus):
    first = read_lines(corpus / "cuts_train.jsonl.gz")[0]["id"]
    edit_cuts(corpus, lambda record: record.update(id=first))
    message = refusal(lhotse(corpus))
    assert ":2: cut" in message and f"id '{first}' was already used at" in message and ":1: cut" in message


def test_a_manifest_listed_twice_is_a_duplicate_too(corpus):
    item = {"type": "lhotse", "cuts_path": str(corpus / "cuts_train.jsonl.gz")}
    assert "was already used at" in refusal(DatasetConfig(input_cfg=(item, item)))


def test_two_nemo_lines_about_one_clip_need_ids(corpus):
    def strip(records):
        records[1] = {**records[0], "question": "another one?"}
        for record in records:
            del record["id"]

    edit_nemo(corpus, strip)
    assert "NeMo manifests: add an 'id' to each line" in refusal(nemo(corpus))


def test_lines_that_nemo_skips_are_not_counted(corpus):
    edit_nemo(corpus, lambda records: records[0].update(_skipme=True))
    assert validate_manifest(nemo(corpus)).used == 3


def test_another_sample_rate_is_refused_in_manifest_and_file(corpus):
    assert re.search(
        r":1: cut .*: field 'sampling_rate' is 16000, but .* sample_rate=8000",
        refusal(lhotse(corpus, sample_rate=8000)),
    )
    victim = next((corpus / "audio" / "train").iterdir())
    soundfile.write(victim, np.zeros(16000), 8000)
    assert f"{victim} has 8000 Hz, not sample_rate=16000" in refusal(lhotse(corpus))


def test_stereo_is_refused(corpus):
    victim = next((corpus / "audio" / "train").iterdir())
    soundfile.write(victim, np.zeros((32000, 2)), 16000)
    assert f"{victim} has 2 channels, the manifest says 1" in refusal(nemo(corpus))


def test_a_file_shorter_than_its_cut_is_refused(corpus):
    victim = next((corpus / "audio" / "train").iterdir())
    soundfile.write(victim, np.zeros(30000), 16000)
    assert f"the cut ends at 2.0 s but {victim} lasts 1.875 s" in refusal(lhotse(corpus))


@pytest.mark.parametrize("duration", [None, -1.0, "long"])
def test_a_duration_that_is_no_length_is_refused(corpus, duration):
    edit_nemo(corpus, lambda records: records[1].update(duration=duration))
    assert re.search(r"nemo_train\.json:2: cut .*: field 'duration' is .*: give seconds", refusal(nemo(corpus)))


def test_a_number_that_json_does_not_have_is_refused(corpus):
    edit_nemo(corpus, lambda records: records[1].update(duration=float("nan")))
    assert re.search(r"nemo_train\.json:2: .*NaN is not a JSON number", refusal(nemo(corpus)))


def test_a_cut_without_recording_is_refused(corpus):
    cut = edit_cuts(corpus, lambda record: record.pop("recording"))
    assert f":2: cut {cut}: type 'MonoCut' with channel 0 is not a cut of one channel" in refusal(lhotse(corpus))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "Which?"}, "field 'question' does not exist in a Lhotse cut .*move it into custom"),
        ({"num_features": 3}, "field 'num_features' does not exist in a Lhotse cut"),
        ({"type": None}, "type None with channel 0 is not a cut of one channel"),
        ({"type": "MixedCut"}, "type 'MixedCut' with channel 0 is not a cut of one channel"),
        ({"supervisions": None}, "Lhotse cannot read it"),
        ({"supervisions": [{"id": "a", "start": 0.0, "duration": 1.0}]}, "Lhotse cannot read it .*recording_id"),
        ({"features": {}}, "Lhotse cannot read it"),
    ],
)
def test_a_cut_that_lhotse_would_stumble_over_is_named(corpus, change, message):
    cut = edit_cuts(corpus, lambda record: record.update(change))
    assert re.search(rf":2: cut {cut}: .*{message}", refusal(lhotse(corpus)))


def test_further_clips_are_checked_like_the_first(corpus):
    def add(record):
        record["custom"]["audio_2"] = json.loads(json.dumps(record["recording"]))

    def break_path(record):
        record["custom"]["audio_2"]["sources"][0]["source"] = "absent.flac"

    def by_command(record):
        record["custom"]["audio_2"]["sources"][0] |= {"type": "command", "source": "touch /tmp/never"}

    name = edit_cuts(corpus, add)
    assert validate_manifest(lhotse(corpus)).used == 4
    edit_cuts(corpus, break_path)
    assert re.search(
        rf"cuts_train.jsonl.gz:2: cut {name}: audio_2: no audio file at .*absent.flac", refusal(lhotse(corpus))
    )
    edit_cuts(corpus, by_command)
    assert "audio source of type 'command': only file is read here" in refusal(lhotse(corpus))
    edit_nemo(corpus, lambda records: records[0].update(audio_2="b.wav"))
    assert "several clips need a Lhotse manifest" in refusal(nemo(corpus))


def test_an_empty_split_is_refused_with_the_reason(corpus):
    assert "of the 4 cuts" in refusal(lhotse(corpus, min_duration=5.0))
    (corpus / "nemo_train.json").write_text("")
    assert "empty split: of the 0 cuts" in refusal(nemo(corpus))
    (corpus / "nemo_train.json").write_text("\n\n")
    assert "nemo_train.json:1: a blank line" in refusal(nemo(corpus))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"type": "lhotse", "cuts_path": "/nowhere/cuts.jsonl"},
            "no manifest at /nowhere/cuts.jsonl: correct cuts_path",
        ),
        ({"type": "lhotse_shar", "shar_path": "/nowhere"}, "no manifest at /nowhere: correct shar_path"),
    ],
)
def test_a_manifest_that_is_not_there_is_named(item, message):
    assert message in refusal(DatasetConfig(input_cfg=(item,)))


def test_load_cuts_names_a_missing_manifest():
    with pytest.raises(ValueError, match=r"no manifest at /nowhere\.jsonl"):
        load_cuts("/nowhere.jsonl")


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_blank_line_is_named_by_file_and_line(corpus, place):
    path = corpus / "nemo_train.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:place], "", *lines[place:]]) + "\n")
    assert f"{path}:{place + 1}: a blank line" in refusal(nemo(corpus))


def test_a_file_that_is_longer_than_its_recording_is_found_before_it_is_read(corpus):
    def shorten(record):
        record["duration"] = 1.0
        record["recording"] |= {"num_samples": 16000, "duration": 1.0}

    cut = edit_cuts(corpus, shorten)
    assert re.search(rf":2: cut {cut}: .* lasts 2\.0 s, the manifest's recording 1\.0 s", refusal(lhotse(corpus)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_rate": True}, "field 'sampling_rate' is True: give Hz"),
        ({"num_samples": 5}, "field 'num_samples' is 5, which at 16000 Hz is not the recording's duration"),
        ({"duration": True}, "field 'duration' is True: give seconds"),
        ({"id": 3}, "field 'id' of the recording is 3"),
        ({"sources": [{"type": "file", "source": "x.flac", "channels": [1]}]}, "with the cut's channel 0"),
        ({"sources": [{"type": "file", "source": "x.flac"}]}, "field 'channels' is None"),
        ({"sources": [{"type": [], "source": "x.flac", "channels": [0]}]}, "audio source of type "),
        ({"transforms": [{"name": "Volume", "kwargs": {"factor": 2}}]}, "changes the audio when it is read"),
        ({"speaker": "x"}, "Lhotse cannot read it .*speaker"),
    ],
)
def test_a_bad_field_of_a_recording_is_named(corpus, change, message):
    cut = edit_cuts(corpus, lambda record: record["recording"].update(change))
    assert re.search(rf":2: cut {cut}: .*{message}", refusal(lhotse(corpus)))
