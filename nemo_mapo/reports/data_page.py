"""A page of samples of a corpus: question, choices, player and spectrogram of each, and statistics of the corpus."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nemo_mapo.reports.clips import data_uri, player_source
from nemo_mapo.reports.pages import Card, write_page

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010
DYNAMIC_RANGE_DB = 80.0
"""Points this far below the loudest one are black: they are the noise floor of 16-bit audio."""

MAX_FRAMES = 1000
"""More than the picture's width in pixels; longer clips have longer hops."""

FIGURE_SIZE_INCHES = (5.2, 1.9)
PICTURE_DPI = 100
PICTURE_TEXT = "#808080"
"""Legible on light and dark pages (contrast about 4)."""


@dataclass(frozen=True, kw_only=True)
class ClipSample:
    """One question with its audio."""

    id: str
    split: str
    task: str
    question: str
    choices: tuple[str, ...]
    answer: str
    samples: Float[NDArray[Any], " samples"]
    """Full scale = 1."""
    sample_rate: int
    """Hz."""
    prompt: tuple[tuple[str, bool], ...] = ()
    """The model's prompt in pieces: a text, and whether it is a special token; empty is not shown."""


def write_data_page(path: Path, *, title: str, facts: Sequence[tuple[str, str]], samples: Sequence[ClipSample]) -> None:
    """Write the page, self-contained with audio and pictures, and atomically.

    Args:
        path: the .html file.
        title: heading, plain text.
        facts: names and values of the numbers above the samples, plain text.
        samples: the samples in their order on the page.
    """
    write_page(
        path,
        "data.html",
        title=title,
        subtitle="The right choice is green. In the spectrograms, brighter is louder.",
        cards=[Card(name=name, value=value) for name, value in facts],
        clips=[_clip(sample) for sample in samples],
    )


def spectrogram_db(
    samples: Float[NDArray[Any], " samples"], sample_rate: int
) -> Float[NDArray[Any], "frequency frame"]:
    """Power of Hann-windowed frames of 25 ms in dB relative to the loudest point, at least -`DYNAMIC_RANGE_DB`.

    Bins go from 0 Hz to half the sample rate. A clip shorter than a frame is padded with silence.
    """
    window = max(2, round(WINDOW_SECONDS * sample_rate))
    padded = np.pad(samples, (0, max(0, window - len(samples))))
    hop = max(round(HOP_SECONDS * sample_rate), -(-len(padded) // MAX_FRAMES))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
    loudest = power.max()
    if loudest == 0:
        return np.full(power.shape, -DYNAMIC_RANGE_DB)
    floor = loudest * 10 ** (-DYNAMIC_RANGE_DB / 10)
    decibels: NDArray[np.float64] = 10 * np.log10(np.maximum(power, floor) / loudest)
    return decibels


def _clip(sample: ClipSample) -> dict[str, Any]:
    seconds = len(sample.samples) / sample.sample_rate
    return {
        "id": sample.id,
        "head": " · ".join((sample.split, sample.task, f"{seconds:.1f} s", sample.id)),
        "question": sample.question,
        "choices": sample.choices,
        "answer": sample.answer,
        "prompt": sample.prompt,
        "audio": player_source(sample.samples, sample.sample_rate),
        "picture": _picture_source(sample),
    }


def _picture_source(sample: ClipSample) -> str:
    figure = Figure(figsize=FIGURE_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(
        spectrogram_db(sample.samples, sample.sample_rate),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-DYNAMIC_RANGE_DB,
        vmax=0.0,
        extent=(0.0, len(sample.samples) / sample.sample_rate, 0.0, sample.sample_rate / 2000),
    )
    axes.set_xlabel("s", fontsize=9, color=PICTURE_TEXT)
    axes.set_ylabel("kHz", fontsize=9, color=PICTURE_TEXT)
    axes.tick_params(labelsize=9, colors=PICTURE_TEXT)
    axes.spines[:].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PICTURE_DPI, transparent=True)
    return data_uri("image/png", file.getvalue())
