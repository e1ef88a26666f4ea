"""Clips of sampled questions, stored in the run directory so that its pages can play them."""

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
"""Subdirectory of a run directory."""

Clip = Float[NDArray[Any], " samples"]


def write_clips(run_dir: Path, question: str, clips: Sequence[Clip], sample_rate: int) -> None:
    """Store the clips of a question (full scale = 1, `sample_rate` in Hz) as FLAC, unless they exist."""
    for number, clip in enumerate(clips):
        path = _path(run_dir, question, number)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(_flac(clip, sample_rate))


def kept_clips(run_dir: Path, question: str) -> tuple[str, ...]:
    """Sources of audio elements for a question's stored clips, in order; empty if there are none."""
    found: list[str] = []
    while (path := _path(run_dir, question, len(found))).is_file():
        found.append(data_uri("audio/flac", path.read_bytes()))
    return tuple(found)


def has_clips(run_dir: Path, question: str) -> bool:
    """Whether a clip of the question is stored."""
    return _path(run_dir, question, 0).is_file()


def player_source(clip: Clip, sample_rate: int) -> str:
    """A clip (full scale = 1, `sample_rate` in Hz) as the source of an audio element: FLAC in a data URI."""
    return data_uri("audio/flac", _flac(clip, sample_rate))


def data_uri(kind: str, content: bytes) -> str:
    """Content of media type `kind` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _path(run_dir: Path, question: str, number: int) -> Path:
    # A question's id may be anything, even a path that leads out of the directory; its hash is safe.
    name = hashlib.sha256(question.encode()).hexdigest()[:16]
    return run_dir / CLIPS / f"{name}-{number}.flac"


def _flac(clip: Clip, sample_rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()
