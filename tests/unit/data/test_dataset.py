import re

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.dataset.collation import collate_audio

from nemo_mapo.data.dataset import EpochSampler, PromptDataset, load_waveform
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.types import Wording

TOKENIZER = build_tokenizer()
SAMPLES_PER_TOKEN = 1280
RATE = 16000
WORDING = Wording(instruction="Think first.")


def cut_of(path, samples, *, name="clip", subtype=None, **custom):
    soundfile.write(path, samples, RATE, subtype=subtype)
    cut = Recording.from_file(path).to_cut()
    cut.id = name
    cut.custom = {"question": "how?", "choices": ["low", "high"], "answer": "high", "task": "t", **custom}
    return cut


def write(path, samples):
    soundfile.write(path, samples, RATE)
    return path


def noise(seconds, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE))


@pytest.fixture
def dataset():
    return PromptDataset(TOKENIZER, lambda samples: samples // SAMPLES_PER_TOKEN, WORDING)


def test_a_batch_holds_one_row_per_cut_in_their_order(dataset, tmp_path):
    cuts = [cut_of(tmp_path / f"{i}.flac", noise(1 + i / 2, i), name=f"c{i}") for i in range(3)]
    batch = dataset[CutSet.from_cuts(cuts)]
    assert [problem.example.id for problem in batch] == ["c0", "c1", "c2"]
    assert [[len(clip) for clip in problem.prompt.clips] for problem in batch] == [[16000], [24000], [32000]]
    for problem in batch:
        count = len(problem.prompt.clips[0]) // SAMPLES_PER_TOKEN
        assert problem.prompt.token_ids.tolist() == encode_prompt(problem.example, count, TOKENIZER, WORDING)


def test_a_cut_may_have_further_clips(dataset, tmp_path):
    second = Recording.from_file(write(tmp_path / "b.flac", noise(0.5, 7)))
    cuts = [
        cut_of(tmp_path / "a.flac", noise(1), name="two", audio_2=second),
        cut_of(tmp_path / "c.flac", noise(2), name="one"),
    ]
    batch = dataset[CutSet.from_cuts(cuts)]
    assert [[len(clip) for clip in problem.prompt.clips] for problem in batch] == [[16000, 8000], [32000]]
    assert torch.equal(batch[0].prompt.clips[1], load_waveform(second.to_cut()))
    for problem, counts in zip(batch, ([12, 6], [25]), strict=True):
        assert problem.prompt.token_ids.tolist() == encode_prompt(problem.example, counts, TOKENIZER, WORDING)
    with pytest.raises(ValueError, match="number the clips after the first audio_2, audio_3"):
        dataset[CutSet.from_cuts([cut_of(tmp_path / "d.flac", noise(1), audio_3=second)])]


def test_waveforms_are_those_of_lhotse(dataset, tmp_path):
    cuts = CutSet.from_cuts(cut_of(tmp_path / f"{i}.flac", noise(1 + i, i), name=f"c{i}") for i in range(2))
    batch = dataset[cuts]
    audio, lengths = collate_audio(cuts)
    for problem, waveform, length in zip(batch, audio, lengths.tolist(), strict=True):
        assert problem.prompt.clips[0].dtype == torch.float32
        assert torch.equal(problem.prompt.clips[0], waveform[:length])


def test_a_part_of_a_recording_is_read(tmp_path):
    samples = noise(2.0)
    part = cut_of(tmp_path / "a.flac", samples).truncate(offset=0.5, duration=1.0)
    assert np.allclose(load_waveform(part).numpy(), samples[8000:24000], atol=1e-4)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.97])
def test_a_truncated_flac_is_named(dataset, tmp_path, kept):
    path = tmp_path / "a.flac"
    cut = cut_of(path, noise(2.0), name="broken")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=rf"cut broken \({re.escape(str(path))}\): audio cannot be read"):
        dataset[CutSet.from_cuts([cut])]


def test_a_missing_file_is_named_when_read(tmp_path):
    path = tmp_path / "a.flac"
    cut = cut_of(path, noise(1.0), name="gone")
    path.unlink()
    with pytest.raises(ValueError, match=r"cut gone .*audio cannot be read"):
        load_waveform(cut)


def test_missing_audio_is_not_made_up(tmp_path):
    """Lhotse would fill up to half a second with mirrored samples."""
    path = tmp_path / "a.wav"
    cut = cut_of(path, noise(2.0), name="short")
    soundfile.write(path, noise(1.8), RATE)
    with pytest.raises(ValueError, match=r"cut short .*audio cannot be read"):
        load_waveform(cut)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_counted_and_placed(tmp_path, value):
    samples = noise(1.0)
    samples[[70, 90]] = value
    cut = cut_of(tmp_path / "a.wav", samples, name="hot", subtype="FLOAT")
    with pytest.raises(ValueError, match=r"cut hot .*2 samples are NaN or infinite, the first is number 70"):
        load_waveform(cut)


def test_integers_written_as_floating_point_are_refused(tmp_path):
    cut = cut_of(tmp_path / "a.wav", noise(1.0) * 32768, name="loud", subtype="FLOAT")
    with pytest.raises(ValueError, match=r"cut loud .*samples reach .* times full scale"):
        load_waveform(cut)


def test_a_clip_that_the_encoder_cannot_take_is_named_and_its_neighbours_are_read(tmp_path):
    def audio_tokens(samples):
        if samples < RATE:
            raise ValueError("too short for the encoder")
        return samples // SAMPLES_PER_TOKEN

    cuts = [cut_of(tmp_path / f"{i}.flac", noise(seconds, i), name=f"c{i}") for i, seconds in enumerate((1.0, 0.5))]
    with pytest.raises(ValueError, match="cut c1: too short for the encoder"):
        PromptDataset(TOKENIZER, audio_tokens, WORDING)[CutSet.from_cuts(cuts)]
    replacing = PromptDataset(TOKENIZER, audio_tokens, WORDING, replace_unreadable=True)
    assert [problem.example.id for problem in replacing[CutSet.from_cuts(cuts)]] == ["c0", "c0"]
    assert replacing.unreadable == {"c1"}
    with pytest.raises(ValueError, match="cut c: too short for the encoder"):
        replacing.encode(replacing[CutSet.from_cuts([cuts[0].with_id("c")])][0].example, [100])


def test_stereo_is_refused(tmp_path):
    cut = cut_of(tmp_path / "a.wav", np.stack([noise(1.0)] * 2, axis=1), name="wide")
    with pytest.raises(ValueError, match=r"cut wide .*2 channels"):
        load_waveform(cut)


def test_a_cut_without_answer_is_refused(dataset, tmp_path):
    cut = cut_of(tmp_path / "a.flac", noise(1.0), name="mute", answer=None)
    with pytest.raises(ValueError, match=r"cut mute: field 'answer' is None"):
        dataset[CutSet.from_cuts([cut])]


def test_only_the_next_pass_skips():
    sampler = EpochSampler(lambda epoch: [f"{epoch}.{i}" for i in range(3)])
    sampler.set_epoch(4, skip=2)
    assert list(sampler) == ["4.2"]
    assert list(sampler) == ["4.0", "4.1", "4.2"]
    assert sampler.count_batches() == 3
    with pytest.raises(ValueError, match="must not be negative"):
        sampler.set_epoch(-1)
