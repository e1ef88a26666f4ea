"""What holds for every corpus: splits without shared audio, errors that name the line, whole output or none."""

import json

import numpy as np
import pytest
import soundfile

from nemo_mapo.data.importers.base import Source, split_of_name
from nemo_mapo.data.importers.prepare import REPORT_NAME, PrepareOptions
from nemo_mapo.data.manifests import clips_of, load_cuts
from nemo_mapo.data.splits import manifest_path
from nemo_mapo.evaluation.benchmarks.own import load_own_benchmark
from tests.unit.data.importers.corpora import clip, cuts_of, write_lines


def line(number, **fields):
    return {
        "id": f"q{number}",
        "audio": f"{number}.wav",
        "question": "?",
        "choices": ["a", "b"],
        "answer": "a",
        **fields,
    }


@pytest.fixture
def source(tmp_path):
    """Forty questions about twenty clips, in a file whose name spells no split."""
    write_lines(tmp_path / "all.jsonl", [line(i, audio=f"{i // 2}.wav") for i in range(40)])
    for number in range(20):
        clip(tmp_path / f"{number}.wav")
    return Source(path=tmp_path / "all.jsonl")


def one_line(tmp_path, *records):
    write_lines(tmp_path / "all.jsonl", records)
    return Source(path=tmp_path / "all.jsonl")


def refusal(run, source, **options):
    with pytest.raises(ValueError) as caught:
        run("multiple_choice", source, **options)
    return str(caught.value)


def audio_of(output, split):
    return {cut.recording.sources[0].source for cut in cuts_of(output, split).values()}


def test_a_corpus_without_splits_is_split_by_audio(source, run):
    report, output = run("multiple_choice", source, shares=(0.5, 0.25, 0.25))
    audio = [audio_of(output, split) for split in report.splits]
    assert len(audio) == 3 and sum(map(len, audio)) == 20 == len(set().union(*audio))
    assert report.as_plain()["splits"]["train"]["questions"] == 2 * len(audio[0])


def test_the_same_corpus_and_seed_give_the_same_bytes(source, run):
    _, first = run("multiple_choice", source, output="first")
    _, second = run("multiple_choice", source, output="second")
    for path in sorted(first.rglob("*")):
        assert path.is_dir() or path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_everything_can_go_into_one_split(source, run):
    report, _ = run("multiple_choice", source, split="train")
    assert list(report.splits) == ["train"]


def test_audio_that_a_corpus_has_in_two_splits_stays_in_the_later_one_and_is_reported(tmp_path, run):
    clip(tmp_path / "1.wav", seed=1)
    clip(tmp_path / "copy.wav", seed=1)
    clip(tmp_path / "2.wav", seed=2)
    source = one_line(tmp_path, line(1, split="train"), line(2, split="train"), line(3, audio="copy.wav", split="test"))
    report, output = run("multiple_choice", source)
    assert list(cuts_of(output, "train")) == ["q2"] and list(cuts_of(output, "test")) == ["q3"]
    assert dict(report.dropped) == {"audio also in test": 1}
    plain = json.loads((output / REPORT_NAME).read_text())
    assert plain["audio_in_several_splits"]["files"] == 1
    assert plain["audio_in_several_splits"]["examples"][0]["test"].endswith("all.jsonl:3")


def test_the_report_has_counts_durations_and_answer_places(tmp_path, run):
    clip(tmp_path / "1.wav", seconds=0.5)
    clip(tmp_path / "2.wav", seconds=1.5)
    source = one_line(tmp_path, line(1), line(2, answer="b", task="x"))
    report, output = run("multiple_choice", source, split="train")
    plain = json.loads((output / REPORT_NAME).read_text())
    assert plain["splits"]["train"] == {
        "questions": 2,
        "audio_files": 2,
        "audio_hours": round(2 / 3600, 6),
        "tasks": {"audio_qa": 1, "x": 1},
        "answers": {"a": 1, "b": 1},
        "answer_places": {"0": 1, "1": 1},
        "duration_histogram": [1, 1, 0, 0, 0, 0, 0, 0, 0],
    }
    assert report.table().splitlines() == [
        "multiple_choice",
        "                       train",
        "questions                  2",
        "audio files                2",
        "hours of audio          0.00",
        "  0-1 s                    1",
        "  1-2 s                    1",
        "audio in several splits: 0 files",
        "dropped: 0",
    ]


def test_a_question_about_two_clips_keeps_both_in_order_and_out_of_other_splits(tmp_path, run):
    for number in (1, 2, 3):
        clip(tmp_path / f"{number}.wav", seed=number, rate=8000)
    source = one_line(
        tmp_path,
        line(1, audio=["1.wav", "2.wav"], split="train"),
        line(2, audio=["3.wav", "1.wav"], split="test"),
        line(3, audio=["2.wav", "2.wav"], split="train"),
    )
    report, output = run("multiple_choice", source, sample_rate=16000, resample=True)
    assert dict(report.dropped) == {"audio also in test": 1}
    manifest = manifest_path(output, "test")
    (cut,) = load_cuts(manifest)
    heard = [one.load_audio()[0] for one in clips_of(cut)]
    assert [len(one) for one in heard] == [cut.num_samples] * 2 and not np.array_equal(*heard)
    (item,) = load_own_benchmark(manifest, {}, audio_root=None).items
    assert [str(one.recording.sources[0].source) for one in clips_of(cut)] == list(item.audio)
    assert list(cuts_of(output, "train")) == ["q3"]


@pytest.mark.parametrize(
    ("change", "message", "reason"),
    [
        ({"audio": "gone.wav"}, r"all.jsonl:2: no audio file at .*gone.wav", "audio file missing"),
        ({"audio": "text.wav"}, r"all.jsonl:2: .*text.wav is not a readable audio file", "audio unreadable"),
        ({"audio": "empty.wav"}, r"all.jsonl:2: .*empty.wav holds no samples", "audio empty"),
        ({"answer": None}, r"all.jsonl:2: field 'answer' is None", "question without answer"),
        ({"answer": "c"}, r"all.jsonl:2: field 'answer' is 'c', which names none", "answer not among the choices"),
        ({"answer": 2}, r"all.jsonl:2: field 'answer' is 2, which names none", "answer not among the choices"),
        ({"choices": None}, r"all.jsonl:2: field 'choices' is None", "no choices"),
        (
            {"choices": "a and b"},
            r"all.jsonl:2: field 'choices' is 'a and b'",
            "field 'choices' unusable",
        ),
        ({"choices": ["a", "a"]}, r"all.jsonl:2: field 'answer'.*or several", "answer not among the choices"),
        ({"choices": ["a", "b", "b"]}, r"all.jsonl:2: field 'choices'.*distinct", "question or choices unusable"),
        ({"question": " "}, r"all.jsonl:2: field 'question' is ' '", "field 'question' unusable"),
        ({"id": "q1"}, r"all.jsonl:2: id 'q1' was already used at .*all.jsonl:1", "id used twice"),
        ({"split": "night"}, r"all.jsonl:2: field 'split' is 'night'", "field 'split' unusable"),
        ({"audio": ["1.wav", "gone.wav"]}, r"all.jsonl:2: no audio file at .*gone.wav", "audio file missing"),
        ({"audio": ["1.wav", None]}, r"all.jsonl:2: field 'audio' is .*: give the path", "no audio named"),
    ],
)
def test_a_wrong_line_is_an_error_with_file_line_and_field_or_a_counted_drop(change, message, reason, tmp_path, run):
    for number in (1, 2, 3):
        clip(tmp_path / f"{number}.wav")
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    source = one_line(tmp_path, line(1), line(2, **change), line(3))
    with pytest.raises(ValueError, match=message):
        run("multiple_choice", source, split="train")
    report, output = run("multiple_choice", source, split="train", skip_invalid=True)
    assert dict(report.dropped) == {reason: 1}
    assert list(cuts_of(output, "train")) == ["q1", "q3"]


def test_half_a_line_is_an_error_or_a_drop(tmp_path, run):
    clip(tmp_path / "1.wav")
    source = one_line(tmp_path, line(1))
    source.path.write_text(source.path.read_text() + '{"id": "q2", "aud\n')
    assert "all.jsonl:2: not a JSON line" in refusal(run, source)
    report, _ = run("multiple_choice", source, skip_invalid=True)
    assert dict(report.dropped) == {"not JSON": 1}


def test_a_file_that_is_no_text_is_one_error(tmp_path, run):
    (tmp_path / "all.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "all.jsonl: not UTF-8 text" in refusal(run, Source(path=tmp_path / "all.jsonl"))


def test_a_stretch_beyond_its_file_is_an_error(tmp_path, run):
    clip(tmp_path / "1.wav", seconds=0.5)
    write_lines(tmp_path / "m.json", [line(1, audio_filepath="1.wav", duration=0.4, offset=0.3)])
    with pytest.raises(ValueError, match=r"m.json:1: asks about 0.3 s to 0.7 s of a file that lasts 0.5 s"):
        run("nemo", Source(path=tmp_path / "m.json"))


@pytest.mark.parametrize(("rate", "channels"), [(24000, 1), (16000, 2), (44100, 2)])
def test_other_rates_and_channels_are_refused_unless_copies_are_asked_for(rate, channels, tmp_path, run):
    clip(tmp_path / "1.wav", rate=rate, channels=channels)
    source = one_line(tmp_path, line(1))
    message = refusal(run, source, skip_invalid=True)
    assert f"has {rate} Hz and {channels} channels" in message and "--resample 16000" in message
    _, output = run("multiple_choice", source, split="train", resample=True)
    (cut,) = cuts_of(output, "train").values()
    samples, found = soundfile.read(output / cut.recording.sources[0].source, always_2d=True)
    assert (found, samples.shape) == (16000, (6400, 1))
    assert cut.recording.num_samples == 6400


def test_a_copy_keeps_the_sound(tmp_path, run):
    time = np.arange(24000) / 24000
    soundfile.write(tmp_path / "1.wav", 0.5 * np.sin(2 * np.pi * 440 * time), 24000)
    _, output = run("multiple_choice", one_line(tmp_path, line(1)), split="train", resample=True)
    (path,) = (output / "audio").rglob("*.flac")
    samples, _ = soundfile.read(path)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    middle = slice(1000, 15000)
    np.testing.assert_allclose(samples[middle], expected[middle], atol=2e-3)


@pytest.mark.parametrize("peak", [1.5, 32768.0])
def test_a_copy_of_what_exceeds_full_scale_is_quieter_and_not_clipped(tmp_path, run, peak):
    sine = np.sin(2 * np.pi * 440 * np.arange(24000) / 24000)
    soundfile.write(tmp_path / "1.wav", peak * sine, 24000, subtype="FLOAT")
    report, output = run("multiple_choice", one_line(tmp_path, line(1)), split="train", resample=True)
    (path,) = (output / "audio").rglob("*.flac")
    samples, _ = soundfile.read(path)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    middle = slice(1000, 15000)
    np.testing.assert_allclose(samples[middle] / np.abs(samples[middle]).max(), expected[middle], atol=5e-3)
    assert report.as_plain()["turned_down"]["files"] == 1
    assert "over full scale, copied with a lower gain: 1 files" in report.table()


def test_audio_that_fits_is_left_in_place_under_its_absolute_path(source, run):
    _, output = run("multiple_choice", source, split="train", resample=True)
    assert not (output / "audio").exists()
    assert all(path.startswith("/") for path in audio_of(output, "train"))


def test_output_appears_whole_or_not_at_all(tmp_path, run):
    clip(tmp_path / "1.wav", rate=24000)
    source = one_line(tmp_path, line(1), line(2))
    before = sorted(tmp_path.iterdir())
    refusal(run, source, resample=True)
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_is_there_is_not_touched(source, tmp_path, run):
    (tmp_path / "prepared").mkdir()
    assert "prepared already exists" in refusal(run, source)


def test_a_corpus_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path, run):
    message = refusal(run, one_line(tmp_path, line(1)), skip_invalid=True)
    assert "no question is left" in message and "1 audio file missing" in message


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1.2, -0.2, 0.0)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="add up to 1"):
        PrepareOptions(shares=shares)


@pytest.mark.parametrize(
    ("name", "split"),
    [("val_qa", "validation"), ("dev-clean", "validation"), ("Test", "test"), ("train-00000-of-00002", "train"),
     ("questions", None), ("train_test", None)],
)  # fmt: skip
def test_names_spell_splits(name, split):
    assert split_of_name(name) == split
