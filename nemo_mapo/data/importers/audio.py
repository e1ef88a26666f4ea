"""Audio of a corpus as manifests refer to it: checked once per file, and copied only on request."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from lhotse.audio import AudioLoadingError, info, read_audio

from nemo_mapo.data.importers.base import InvalidRecord
from nemo_mapo.data.sources import refuse_unsafe_path

_LARGEST = 1.0 - 2.0**-15
"""The largest sample that 16 bits hold."""


@dataclass(frozen=True, kw_only=True)
class StoredAudio:
    """An audio file that a manifest can name."""

    digest: str
    """SHA-256 of the original file."""
    source: str
    """Absolute, or relative to the manifest's directory."""
    sample_rate: int
    num_samples: int

    @property
    def duration_seconds(self) -> float:
        """Of the whole file."""
        return self.num_samples / self.sample_rate


class AudioStore:
    """Audio of one prepared corpus.

    Mono files at the requested rate stay where they are. Others are refused, or with `resample` written below
    `directory` as mono 16-bit FLAC at that rate; so is audio without a file of its own. A copy is named by the digest
    of its original.

    A copy that would exceed full scale (floating point, or resampler overshoot) is scaled so that its peak is full
    scale: clipping would change the sound, a gain does not. `turned_down` counts those files.
    """

    def __init__(self, directory: Path, *, sample_rate: int, resample: bool) -> None:
        self.directory = directory
        self.sample_rate = sample_rate
        self.resample = resample
        self.turned_down: dict[str, float] = {}
        """Peaks above full scale, by file."""
        self._known: dict[Path | str, StoredAudio] = {}

    def add(self, audio: Path | bytes, where: str) -> StoredAudio:
        """Check a file and return its description for the manifest.

        Raises:
            InvalidRecord: the file is missing, unreadable or empty, or holds NaN or infinity.
            ValueError: another sample rate, or several channels, without `resample`.
        """
        name = str(audio) if isinstance(audio, Path) else "audio in the table"
        if isinstance(audio, Path):
            refuse_unsafe_path(str(audio), where)
            if audio in self._known:
                return self._known[audio]
            if not audio.is_file():
                raise InvalidRecord("audio file missing", f"{where}: no audio file at {audio}: add it")
        digest = _digest(audio)
        if digest not in self._known:
            self._known[digest] = self._checked(audio, digest, f"{where}: {name}")
        if isinstance(audio, Path):
            self._known[audio] = self._known[digest]
        return self._known[digest]

    def _checked(self, audio: Path | bytes, digest: str, where: str) -> StoredAudio:
        try:
            header = info(audio if isinstance(audio, Path) else io.BytesIO(audio))
        except AudioLoadingError as error:
            raise InvalidRecord("audio unreadable", f"{where} is not a readable audio file: replace it") from error
        if header.frames <= 0:
            raise InvalidRecord("audio empty", f"{where} holds no samples: replace it")
        fits = header.samplerate == self.sample_rate and header.channels == 1
        if not fits and not self.resample:
            raise ValueError(
                f"{where} has {header.samplerate} Hz and {header.channels} channels, not {self.sample_rate} Hz, mono: "
                f"have copies written with --resample {self.sample_rate} (or, if it is mono and the model takes "
                f"that rate, prepare it with --sample-rate {header.samplerate})"
            )
        if fits and isinstance(audio, Path):
            source, samples = str(audio.resolve()), header.frames
        else:
            source, samples = self._copy(audio, digest, where)
        return StoredAudio(digest=digest, source=source, sample_rate=self.sample_rate, num_samples=samples)

    def _copy(self, audio: Path | bytes, digest: str, where: str) -> tuple[str, int]:
        try:
            channels, rate = read_audio(audio if isinstance(audio, Path) else io.BytesIO(audio))
        except AudioLoadingError as error:
            raise InvalidRecord("audio unreadable", f"{where} is truncated or damaged: replace it") from error
        samples = np.atleast_2d(channels).mean(axis=0)
        if not np.isfinite(samples).all():
            raise InvalidRecord("audio not finite", f"{where} holds NaN or infinite samples: replace it")
        if rate != self.sample_rate:
            import librosa

            samples = librosa.resample(samples, orig_sr=rate, target_sr=self.sample_rate, res_type="soxr_hq")
        if (peak := float(np.abs(samples).max())) > _LARGEST:
            self.turned_down[where] = peak
            samples = samples * (_LARGEST / peak)
        path = Path("audio") / digest[:2] / f"{digest[:32]}.flac"
        (self.directory / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(self.directory / path, samples, self.sample_rate, subtype="PCM_16")
        return path.as_posix(), len(samples)


def _digest(audio: Path | bytes) -> str:
    if isinstance(audio, bytes):
        return hashlib.sha256(audio).hexdigest()
    with audio.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
