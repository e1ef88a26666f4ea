"""Clips of any kind become mono waveforms of one rate, and questions become prompts."""

from functools import partial

import numpy as np
import pytest
import soundfile
import torch

from nemo_mapo.config.evaluation import EvaluationDataConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.evaluation.benchmarks.prompts import BenchmarkPrompts, shown_choices
from nemo_mapo.rollout.checks import refuse_long
from nemo_mapo.types import Wording
from support.tiny import tiny_tokenizer
from tests.unit.evaluation.benchmarks.published import loaded, mmau_pro_record, mmau_record

RATE = 8000
SAMPLES_PER_TOKEN = 800


def tone(path, *, seconds=1.0, rate=RATE, channels=1, hertz=200.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * hertz * time)
    soundfile.write(path, np.stack([wave * (channel + 1) / channels for channel in range(channels)], axis=1), rate)
    return wave


WORDING = Wording(instruction="first last")


def prompts(root, *, shuffle=None, **options):
    return BenchmarkPrompts(
        EvaluationDataConfig(tokenizer="unused", sample_rate=RATE, **options),
        audio_root=root,
        tokenizer=tiny_tokenizer(),
        audio_tokens=lambda samples: samples // SAMPLES_PER_TOKEN,
        wording=WORDING,
        shuffle=shuffle,
    )


def refuse(most):
    """The check of lengths for prompts of so many tokens at most."""
    return partial(refuse_long, sampling=SamplingConfig(max_new_tokens=20), max_positions=most + 20)


def items_of(tmp_path, *records, layout="mmau_pro"):
    return loaded(tmp_path / "items.json", layout, list(records)).items


def test_rows_are_the_prompts_of_the_examples(tmp_path):
    tone(tmp_path / "data" / "a.wav")
    tone(tmp_path / "data" / "b.wav", seconds=2.0)
    batch = prompts(tmp_path)(items_of(tmp_path, mmau_pro_record("a"), mmau_pro_record("b")))
    assert [[len(clip) for clip in problem.prompt.clips] for problem in batch] == [[RATE], [2 * RATE]]
    assert [problem.example.id for problem in batch] == ["a", "b"]
    for row, problem in enumerate(batch):
        expected = encode_prompt(problem.example, 10 * (row + 1), tiny_tokenizer(), WORDING)
        assert problem.prompt.token_ids.tolist() == expected


def test_channels_are_averaged(tmp_path):
    wave = tone(tmp_path / "data" / "a.wav", channels=2)
    batch = prompts(tmp_path)(items_of(tmp_path, mmau_pro_record("a")))
    assert torch.allclose(batch[0].prompt.clips[0], torch.tensor(0.75 * wave, dtype=torch.float32), atol=1e-4)


def test_another_rate_is_resampled(tmp_path):
    tone(tmp_path / "data" / "a.wav", rate=3 * RATE)
    wave = tone(tmp_path / "same.wav")
    batch = prompts(tmp_path)(items_of(tmp_path, mmau_pro_record("a")))
    assert len(batch[0].prompt.clips[0]) == RATE
    inside = slice(100, -100)
    assert torch.allclose(batch[0].prompt.clips[0][inside], torch.tensor(wave[inside], dtype=torch.float32), atol=5e-3)


def test_several_clips_are_joined_in_order_with_a_gap(tmp_path):
    low, high = tone(tmp_path / "1.wav", hertz=100.0), tone(tmp_path / "2.wav", hertz=300.0)
    record = mmau_pro_record("a", audio_path=["1.wav", "2.wav"])
    batch = prompts(tmp_path, clip_gap_seconds=0.25)(items_of(tmp_path, record))
    expected = np.concatenate([low, np.zeros(RATE // 4), high])
    assert torch.allclose(batch[0].prompt.clips[0], torch.tensor(expected, dtype=torch.float32), atol=1e-4)


def test_several_clips_are_given_one_by_one_unless_they_are_to_be_joined(tmp_path):
    waves = [tone(tmp_path / "1.wav", hertz=100.0), tone(tmp_path / "2.wav", seconds=0.5, hertz=300.0)]
    tone(tmp_path / "data" / "b.wav")
    items = items_of(tmp_path, mmau_pro_record("a", audio_path=["1.wav", "2.wav"]), mmau_pro_record("b"))
    batch = prompts(tmp_path)(items)
    assert [len(problem.prompt.clips) for problem in batch] == [2, 1]
    for wave, clip in zip(waves, batch[0].prompt.clips, strict=True):
        assert torch.allclose(clip, torch.tensor(wave, dtype=torch.float32), atol=1e-4)
    # Ten placeholders of the first clip, five of the second, each between markers of its own.
    marks = [
        token
        for token in tiny_tokenizer().convert_ids_to_tokens(batch[0].prompt.token_ids.tolist())
        if "audio" in token
    ]
    span = ["<|audio_start|>", "<|audio_end|>"]
    assert marks == [span[0], *["<|audio|>"] * 10, span[1], span[0], *["<|audio|>"] * 5, span[1]]
    assert prompts(tmp_path).check(items, refuse(len(batch[0].prompt))) == 0
    with pytest.raises(ValueError, match=r"the prompt of item a has"):
        prompts(tmp_path).check(items, refuse(len(batch[0].prompt) - 1))


def test_long_clips_are_cut_and_counted(tmp_path):
    wave = tone(tmp_path / "data" / "a.wav", seconds=2.0)
    tone(tmp_path / "data" / "b.wav", seconds=0.5)
    items = items_of(tmp_path, mmau_pro_record("a"), mmau_pro_record("b"))
    cutting = prompts(tmp_path, max_clip_seconds=1.0)
    assert cutting.check(items, refuse(100)) == 1
    batch = cutting(items)
    assert [len(problem.prompt.clips[0]) for problem in batch] == [RATE, RATE // 2]
    assert torch.allclose(batch[0].prompt.clips[0], torch.tensor(wave[:RATE], dtype=torch.float32), atol=1e-4)


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_generated(tmp_path):
    tone(tmp_path / "data" / "a.wav")
    tone(tmp_path / "data" / "b.wav", seconds=5.0)
    items = items_of(tmp_path, mmau_pro_record("a"), mmau_pro_record("b"))
    longest = [len(prompts(tmp_path)([item])[0].prompt) for item in items]
    assert prompts(tmp_path).check(items, refuse(longest[1])) == 0
    with pytest.raises(ValueError, match=rf"the prompt of item b has {longest[1]} tokens.*max_clip_seconds"):
        prompts(tmp_path).check(items, refuse(longest[1] - 1))


@pytest.mark.parametrize("content", [None, b"", b"no audio"])
def test_a_clip_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"item a: audio .*a\.wav cannot be read.*benchmark\.audio_root"):
        prompts(tmp_path).check(items_of(tmp_path, mmau_pro_record("a")), refuse(100))


def test_choices_are_shown_in_an_order_of_their_own_per_item_and_seed(tmp_path):
    items = items_of(tmp_path, *(mmau_record(str(number)) for number in range(40)), layout="mmau")
    assert all(shown_choices(item, None) == item.choices for item in items)
    orders = [shown_choices(item, 7) for item in items]
    assert all(sorted(order) == sorted(items[0].choices) for order in orders)
    assert len(set(orders)) > 10, "every item has its own order"
    assert orders == [shown_choices(item, 7) for item in items], "which does not change"
    assert orders != [shown_choices(item, 8) for item in items], "unless the seed does"
    assert prompts(tmp_path, shuffle=7).example(items[0]).choices == orders[0]
