"""Clips of sampled questions, kept in a run's directory so that its pages can play them."""

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
from jaxtyping import Float
from numpy.typing import NDArray

CLIPS = "clips"
"""Directory below a run's."""

Clip = Float[NDArray[Any], " samples"]


def write_clips(run_dir: Path, question: str, clips: Sequence[Clip], sample_rate: int) -> None:
    """Keep the clips of a question (full scale = 1, Hz) as FLAC, unless they are there."""
    for number, clip in enumerate(clips):
        path = _path(run_dir, question, number)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(_flac(clip, sample_rate))


def kept_clips(run_dir: Path, question: str) -> tuple[str, ...]:
    """What audio elements play for a question: its clips inside the page, in order; empty if none was kept."""
    found: list[str] = []
    while (path := _path(run_dir, question, len(found))).is_file():
        found.append(data_uri("audio/flac", path.read_bytes()))
    return tuple(found)


def has_clips(run_dir: Path, question: str) -> bool:
    """Whether a clip of the question was kept."""
    return _path(run_dir, question, 0).is_file()


def player_source(clip: Clip, sample_rate: int) -> str:
    """A clip (full scale = 1, Hz) as the source of an audio element: FLAC inside the page."""
    return data_uri("audio/flac", _flac(clip, sample_rate))


def data_uri(kind: str, content: bytes) -> str:
    """Content of a media type as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _path(run_dir: Path, question: str, number: int) -> Path:
    # A question's id may hold anything, also what leads out of the directory; its hash does not.
    name = hashlib.sha256(question.encode()).hexdigest()[:16]
    return run_dir / CLIPS / f"{name}-{number}.flac"


def _flac(clip: Clip, sample_rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()
