"""The words must be true of the sounds: each is checked by measuring the rendered waveform."""

import numpy as np
import pytest

from nemo_mapo.embedded.synthetic_audio import SAMPLE_RATE, loudest_rms, render_clip
from nemo_mapo.embedded.synthetic_text import ATTRIBUTES, Event

FRAME = 512
HOP = 160


def sound(kind: str, attribute: str, seed: int, loudness: float = -18.0) -> np.ndarray:
    event = Event(kind=kind, attribute=attribute, start_seconds=0.7, duration_seconds=0.5, loudness=loudness)
    clip = render_clip([event], np.random.default_rng(seed)).astype(np.float64) / 32768
    return clip[round(0.7 * SAMPLE_RATE) : round(1.2 * SAMPLE_RATE)]


def spectrum(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE), np.abs(np.fft.rfft(samples)) ** 2


def peak_hertz_over_time(samples: np.ndarray) -> np.ndarray:
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP] * np.hanning(FRAME)
    return np.fft.rfftfreq(FRAME, 1 / SAMPLE_RATE)[np.argmax(np.abs(np.fft.rfft(frames)), axis=1)]


def pulses(samples: np.ndarray) -> int:
    envelope = np.convolve(np.abs(samples), np.ones(80) / 80, mode="same")
    loud = envelope > 0.3 * envelope.max()
    return int(np.sum(loud[1:] & ~loud[:-1]))


@pytest.mark.parametrize("seed", range(5))
def test_tones_climb_from_deep_to_shrill(seed):
    peaks = []
    for word in ATTRIBUTES["tone"]:
        hertz, power = spectrum(sound("tone", word, seed))
        peaks.append(hertz[np.argmax(power)])
    assert peaks[0] < 200 < 290 < peaks[1] < 460 < 890 < peaks[2] < 1410 < 2790 < peaks[3] < 4210


@pytest.mark.parametrize("seed", range(5))
def test_noises_brighten_from_dull_to_sharp(seed):
    centroids = []
    for word in ATTRIBUTES["noise"]:
        hertz, power = spectrum(sound("noise", word, seed))
        centroids.append(float((hertz * power).sum() / power.sum()))
    assert centroids[0] < 420 < centroids[1] < 1450 < centroids[2] < 4050 < centroids[3]


@pytest.mark.parametrize("seed", range(5))
def test_sweeps_move_as_their_words_say(seed):
    tracks = {word: peak_hertz_over_time(sound("sweep", word, seed)) for word in ATTRIBUTES["sweep"]}
    start, middle, end = ({word: track[place] for word, track in tracks.items()} for place in (1, 22, -2))
    assert start["rising"] < middle["rising"] < end["rising"]
    assert start["falling"] > middle["falling"] > end["falling"]
    assert start["peaking"] < middle["peaking"] > end["peaking"]
    assert start["dipping"] > middle["dipping"] < end["dipping"]


@pytest.mark.parametrize("seed", range(5))
def test_pulse_trains_quicken_from_slow_to_frantic(seed):
    counts = [pulses(sound("pulse", word, seed)) for word in ATTRIBUTES["pulse"]]
    assert counts[0] <= 3 < counts[1] <= 5 < counts[2] <= 7 < counts[3] <= 12


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_the_stated_loudness_is_that_of_the_loudest_forty_milliseconds(kind):
    for word in ATTRIBUTES[kind]:
        measured = 20 * np.log10(loudest_rms(sound(kind, word, 0, loudness=-20.0)))
        assert measured == pytest.approx(-20.0, abs=0.2)


def test_a_clip_is_a_function_of_events_and_generator():
    event = Event(kind="noise", attribute="warm", start_seconds=0.0, duration_seconds=0.5, loudness=-20.0)
    first, again, other = (render_clip([event], np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first.dtype == np.int16 and first.shape == (32000,)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_does_not_fit_the_clip_or_full_scale_is_refused():
    late = Event(kind="tone", attribute="low", start_seconds=1.8, duration_seconds=0.5, loudness=-20.0)
    with pytest.raises(ValueError, match="does not fit"):
        render_clip([late], np.random.default_rng(0))
    shouted = Event(kind="tone", attribute="low", start_seconds=0.0, duration_seconds=0.5, loudness=0.0)
    with pytest.raises(ValueError, match="full scale"):
        render_clip([shouted], np.random.default_rng(0))
