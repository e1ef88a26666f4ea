"""The page of samples: what is on it, and that a spectrogram shows the frequency that sounds."""

import base64
import io
import re

import numpy as np
import pytest
import soundfile

from nemo_mapo.reports.data_page import ClipSample, spectrogram_db, write_data_page

RATE = 16000
TONE = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)


def sample(**fields):
    given = {"id": "<one>", "split": "train", "task": "tone", "question": "High & low?", "choices": ("<low>", "high"),
             "answer": "high", "samples": TONE, "sample_rate": RATE, **fields}  # fmt: skip
    return ClipSample(**given)


@pytest.fixture
def page(tmp_path):
    write_data_page(tmp_path / "page.html", title="A & B", facts=[("Questions", "1,234")], samples=[sample()])
    return (tmp_path / "page.html").read_text()


def test_the_page_has_a_player_that_plays_the_clip(page):
    (content,) = re.findall(r'<audio controls preload="none" src="data:audio/flac;base64,([^"]+)">', page)
    played, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert rate == RATE
    np.testing.assert_allclose(played, TONE, atol=1e-4)


def test_the_page_has_the_picture_the_question_and_the_right_choice(page):
    (content,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(content).startswith(b"\x89PNG")
    assert "High &amp; low?" in page and '<li class="right">high</li>' in page and "&lt;low&gt;" in page
    assert "1,234" in page and "A &amp; B" in page


def test_a_prompt_is_shown_as_the_model_reads_it(tmp_path):
    prompt = (("<|user|>", True), (" High & low?\nThink.", False), ("<|assistant|>", True))
    write_data_page(tmp_path / "page.html", title="t", facts=[], samples=[sample(prompt=prompt)])
    shown = "<b>&lt;|user|&gt;</b> High &amp; low?\nThink.<b>&lt;|assistant|&gt;</b></pre>"
    assert shown in (tmp_path / "page.html").read_text()


def test_the_page_loads_nothing(page):
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_a_spectrogram_is_loudest_at_the_tone():
    decibels = spectrogram_db(TONE, RATE)
    hertz = np.linspace(0, RATE / 2, len(decibels))
    assert decibels.max() == 0 and decibels.min() >= -80
    assert np.all(np.abs(hertz[decibels.argmax(axis=0)] - 1000) < 50)


@pytest.mark.parametrize("samples", [np.zeros(RATE), np.zeros(10), np.zeros(0)])
def test_silence_and_shortest_clips_have_a_spectrogram(samples):
    assert np.all(spectrogram_db(samples, RATE) == -80)


def test_a_long_clip_has_no_more_frames_than_can_be_seen():
    assert spectrogram_db(np.random.default_rng(0).normal(size=60 * RATE), RATE).shape[1] <= 1000
