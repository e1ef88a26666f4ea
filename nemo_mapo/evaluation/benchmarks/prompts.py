"""Converts items to problems, with clips of any sample rate and channel count."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import soundfile
import torch
from jaxtyping import Float
from lhotse.augmentation.resample import Resample
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.evaluation import EvaluationDataConfig
from nemo_mapo.data.dataset import LOUDEST, AudioTokenCount
from nemo_mapo.data.entries import DURATION_TOLERANCE_SECONDS
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.evaluation.benchmarks.items import Item
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.types import Example, Wording


class BenchmarkPrompts:
    """Reads the clips of items and writes their prompts."""

    def __init__(
        self,
        config: EvaluationDataConfig,
        *,
        audio_root: Path,
        tokenizer: PreTrainedTokenizerBase,
        audio_tokens: AudioTokenCount,
        wording: Wording,
        shuffle: int | None = None,
    ) -> None:
        """`shuffle` is a seed that reorders each item's choices; None is the published order."""
        self.config = config
        self.audio_root = audio_root
        self.tokenizer = tokenizer
        self.audio_tokens = audio_tokens
        self.wording = wording
        self.shuffle = shuffle

    def __call__(self, items: Sequence[Item]) -> list[Problem]:
        """The problems of `items`; ValueError names item and file of a clip that cannot be read."""
        return [self._problem(self.example(item), self._waveforms(item)) for item in items]

    def _problem(self, example: Example, clips: list[Float[Tensor, "_"]]) -> Problem:
        token_ids = torch.tensor(self._encode(example, [len(clip) for clip in clips]))
        return Problem(prompt=Prompt(id=example.id, token_ids=token_ids, clips=tuple(clips)), example=example)

    def example(self, item: Item) -> Example:
        """The question as the model sees it; the answer is included but never shown."""
        return Example(
            id=item.id,
            question=item.question,
            choices=shown_choices(item, self.shuffle),
            answer=item.answer or "",
            task=item.part,
        )

    def check(self, items: Sequence[Item], refuse_long: Callable[[str, int], None]) -> int:
        """Check every clip and prompt length from the headers, before anything is generated.

        Returns:
            How many items have a clip that is truncated to `max_clip_seconds`.

        Raises:
            ValueError: naming the item whose clip is missing or unreadable, or whose prompt is too long.
        """
        cut = 0
        for item in items:
            seconds = [self._seconds(item, number) for number in range(len(item.audio))]
            cut += any(self._kept(duration) < duration for duration in seconds)
            samples = [round(self._kept(duration) * self.config.sample_rate) for duration in seconds]
            try:
                length = len(self._encode(self.example(item), self._joined(samples)))
            except ValueError as error:
                raise ValueError(f"item {item.id}: {error}") from error
            refuse_long(f"the prompt of item {item.id}", length)
        return cut

    def _encode(self, example: Example, num_samples: Sequence[int]) -> list[int]:
        counts = [self.audio_tokens(samples) for samples in num_samples]
        return encode_prompt(example, counts, self.tokenizer, self.wording)

    def _joined(self, samples: Sequence[int]) -> Sequence[int]:
        """Lengths of the clips of an item's prompt."""
        gap = self.config.clip_gap_seconds
        if gap is None:
            return samples
        return [sum(samples) + round(gap * self.config.sample_rate) * (len(samples) - 1)]

    def _kept(self, seconds: float) -> float:
        return seconds if self.config.max_clip_seconds is None else min(seconds, self.config.max_clip_seconds)

    def _seconds(self, item: Item, number: int) -> float:
        """Length of the segment of a clip that an item asks about."""
        _, frames, rate = self._stretch(item, number)
        return frames / rate

    def _stretch(self, item: Item, number: int) -> tuple[int, int, int]:
        """First frame, number of frames and sample rate of the segment that an item asks about (default: all)."""
        path = item.audio[number]
        start_seconds, seconds = (item.start_seconds, item.duration_seconds) if number == 0 else (0.0, None)
        try:
            header = soundfile.info(self.audio_root / path)
        except soundfile.LibsndfileError as error:
            raise self._unreadable(item, path, str(error)) from error
        if not header.frames:
            raise self._unreadable(item, path, "it holds no sample")
        rate = header.samplerate
        start, left = round(start_seconds * rate), header.frames - round(start_seconds * rate)
        frames = left if seconds is None else round(seconds * rate)
        if left <= 0 or frames > left + round(DURATION_TOLERANCE_SECONDS * rate):
            end = start_seconds + frames / rate
            raise self._unreadable(
                item, path, f"{start_seconds:g} s to {end:g} s are asked of {header.frames / rate:g} s"
            )
        return start, min(frames, left), rate

    def _waveforms(self, item: Item) -> list[Float[Tensor, "_"]]:
        clips = [self._clip(item, number) for number in range(len(item.audio))]
        if self.config.clip_gap_seconds is None:
            return clips
        gap = torch.zeros(round(self.config.clip_gap_seconds * self.config.sample_rate))
        return [torch.cat([part for clip in clips for part in (gap, clip)][1:])]

    def _clip(self, item: Item, number: int) -> Float[Tensor, " samples"]:
        """Decode one clip: channels averaged, resampled, float32, full scale = 1."""
        path = item.audio[number]
        start, frames, rate = self._stretch(item, number)
        limit = self.config.max_clip_seconds
        frames = frames if limit is None else min(frames, round(limit * rate))
        try:
            samples, _ = soundfile.read(
                self.audio_root / path, start=start, frames=frames, dtype="float32", always_2d=True
            )
        except soundfile.LibsndfileError as error:
            raise self._unreadable(item, path, str(error)) from error
        mono = torch.from_numpy(samples).mean(dim=1)
        if not bool(mono.isfinite().all()):
            raise self._unreadable(item, path, "it holds NaN or infinite samples")
        if (peak := float(mono.abs().max())) > LOUDEST:
            raise self._unreadable(item, path, f"samples reach {peak:g} times full scale")
        resampled: Tensor = Resample(rate, self.config.sample_rate)(mono) if rate != self.config.sample_rate else mono
        return resampled

    def _unreadable(self, item: Item, path: str, reason: str) -> ValueError:
        return ValueError(
            f"item {item.id}: audio {self.audio_root / path} cannot be read ({reason}); restore it, or correct "
            "benchmark.audio_root, which the published paths start from"
        )


def shown_choices(item: Item, shuffle: int | None) -> tuple[str, ...]:
    """The choices in the order in which the model sees them, which depends only on the seed and the item's id."""
    choices = list(item.choices)
    if shuffle is not None:
        random.Random(f"{shuffle}:{item.id}").shuffle(choices)
    return tuple(choices)
