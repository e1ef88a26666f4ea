"""Waveforms of the synthetic corpus: tones, sweeps, noise bursts and pulse trains over a noise floor."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_mapo.embedded.synthetic_text import Event

SAMPLE_RATE = 16000
"""Hz."""
CLIP_SECONDS = 2.0

Samples = NDArray[np.float64]

_TONE_HZ = {"deep": (110.0, 180.0), "low": (300.0, 450.0), "high": (900.0, 1400.0), "shrill": (2800.0, 4200.0)}
"""Ranges of the fundamental; neighbours are an octave apart (deep and low: three quarters)."""
_TONE_OVERTONES = ((1, 1.0), (2, 0.3), (3, 0.1))
"""Multiple of the fundamental and its amplitude."""
_NOISE_HZ = {"dull": (80.0, 400.0), "warm": (400.0, 1400.0), "bright": (1400.0, 4000.0), "sharp": (4000.0, 7600.0)}
"""Pass bands."""
_NOISE_EDGE_JITTER = 0.1
"""Relative shift of the band edges, so that no two bursts share a band."""
_SWEEP_CENTRE_HZ = (500.0, 1200.0)
_SWEEP_OCTAVES = (1.5, 2.2)
_PULSES_PER_SECOND = {"slow": (3.5, 5.0), "steady": (7.0, 9.0), "fast": (12.0, 14.5), "frantic": (19.0, 23.0)}
_PULSE_CARRIER_HZ = (700.0, 2200.0)
_PULSE_SECONDS = 0.03
"""Length of one pulse; shorter than the gap between pulses even of a frantic train."""
_FADE_SECONDS = 0.01
"""Raised-cosine fade at both ends of a sound, against clicks."""
_LOUDNESS_WINDOW_SECONDS = 0.04
_FLOOR_DBFS = (-66.0, -56.0)
_INT16_PEAK = 32767


def render_clip(events: Sequence[Event], rng: np.random.Generator) -> NDArray[np.int16]:
    """Synthesise a mono clip of `CLIP_SECONDS` at `SAMPLE_RATE`; everything not fixed by `events` comes from `rng`.

    Each sound is scaled so that its loudest 40 ms have the RMS that its `loudness` states. ValueError if an event
    extends beyond the clip or the sum exceeds full scale.
    """
    clip = rng.standard_normal(round(CLIP_SECONDS * SAMPLE_RATE)) * _amplitude(rng.uniform(*_FLOOR_DBFS))
    for event in events:
        sound = _SOUNDS[event.kind](event.attribute, round(event.duration_seconds * SAMPLE_RATE), rng)
        start = round(event.start_seconds * SAMPLE_RATE)
        if start < 0 or start + len(sound) > len(clip):
            raise ValueError(f"{event} does not fit into a clip of {CLIP_SECONDS} s")
        clip[start : start + len(sound)] += sound * (_amplitude(event.loudness) / loudest_rms(sound))
    peak = float(np.abs(clip).max())
    if peak > 1.0:
        raise ValueError(f"clip exceeds full scale (peak {peak:.2f}): lower the loudness of {list(events)}")
    samples: NDArray[np.int16] = np.round(clip * _INT16_PEAK).astype(np.int16)
    return samples


def loudest_rms(samples: Samples) -> float:
    """Return the largest RMS over any 40 ms of `samples` (one dimension, full scale = 1)."""
    window = min(len(samples), round(_LOUDNESS_WINDOW_SECONDS * SAMPLE_RATE))
    energy = np.concatenate([[0.0], np.cumsum(samples**2)])
    return float(np.sqrt((energy[window:] - energy[:-window]).max() / window))


def _tone(attribute: str, length: int, rng: np.random.Generator) -> Samples:
    phase = 2 * np.pi * rng.uniform(*_TONE_HZ[attribute]) * np.arange(length) / SAMPLE_RATE
    step = phase[1] - phase[0]
    audible = [(multiple, level) for multiple, level in _TONE_OVERTONES if multiple * step < np.pi]
    return _faded(sum((level * np.sin(multiple * phase) for multiple, level in audible), np.zeros(length)))


def _sweep(attribute: str, length: int, rng: np.random.Generator) -> Samples:
    position = np.linspace(0.0, 1.0, length)
    shape = position - 0.5 if attribute in ("rising", "falling") else 0.5 - np.abs(2 * position - 1)
    sign = 1 if attribute in ("rising", "peaking") else -1
    centre = np.exp(rng.uniform(*np.log(_SWEEP_CENTRE_HZ)))
    hertz = centre * 2.0 ** (sign * shape * rng.uniform(*_SWEEP_OCTAVES))
    return _faded(np.sin(2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE))


def _noise(attribute: str, length: int, rng: np.random.Generator) -> Samples:
    low, high = np.array(_NOISE_HZ[attribute]) * rng.uniform(1 - _NOISE_EDGE_JITTER, 1 + _NOISE_EDGE_JITTER / 2, 2)
    spectrum = np.fft.rfft(rng.standard_normal(length))
    hertz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    spectrum[(hertz < low) | (hertz > high)] = 0
    return _faded(np.fft.irfft(spectrum, length))


def _pulse(attribute: str, length: int, rng: np.random.Generator) -> Samples:
    period = round(SAMPLE_RATE / rng.uniform(*_PULSES_PER_SECOND[attribute]))
    width = round(_PULSE_SECONDS * SAMPLE_RATE)
    burst = np.hanning(width) * np.sin(2 * np.pi * rng.uniform(*_PULSE_CARRIER_HZ) * np.arange(width) / SAMPLE_RATE)
    train = np.zeros(length)
    for start in range(0, length - width, period):
        train[start : start + width] = burst
    return train


_SOUNDS = {"tone": _tone, "sweep": _sweep, "noise": _noise, "pulse": _pulse}


def _faded(samples: Samples) -> Samples:
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.arange(round(_FADE_SECONDS * SAMPLE_RATE)) / (_FADE_SECONDS * SAMPLE_RATE))
    samples[: len(ramp)] *= ramp
    samples[-len(ramp) :] *= ramp[::-1]
    return samples


def _amplitude(decibels: float) -> float:
    return float(10.0 ** (decibels / 20.0))
