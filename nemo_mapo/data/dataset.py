"""Converts cuts to problems, and builds NeMo's Lhotse dataloader from a `DatasetConfig`."""

import logging
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lhotse import CutSet
from lhotse.audio import (
    AudioLoadingError,
    DurationMismatchError,
    set_audio_duration_mismatch_tolerance,
)
from lhotse.cut import Cut
from lhotse.dataset.sampling.base import CutSampler
from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.entries import DURATION_TOLERANCE_SECONDS, UnreadableClip
from nemo_mapo.data.manifests import clips_of, example_from_cut, example_id
from nemo_mapo.data.nemo_types import nemo_items
from nemo_mapo.data.prompts import encode_prompt
from nemo_mapo.data.sources import refuse_unsafe_recording
from nemo_mapo.processes import is_main_rank
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.types import Example, Wording

logger = logging.getLogger(__name__)

PromptLoader = DataLoader[list[Problem]]
AudioTokenCount = Callable[[int], int]
"""Samples of a clip to audio tokens of the model."""

LOUDEST = 16.0
"""Full scale is 1. Mixes and resampler overshoot stay well below these 24 dB; integer samples do not."""

_BAR_DELAY_SECONDS = 2.0
"""A short pass over a split needs no progress bar."""


_REPETITION = re.compile(r"(_repeat\d+)+$")
"""What Lhotse appends to the id of a cut that is drawn again."""

_NEVER = re.compile(r"(?!)")


class PromptDataset(Dataset[list[Problem]]):
    """Lhotse-style dataset: indexed by a `CutSet`, it reads the audio and writes the prompts of one batch."""

    unreadable: set[str]
    """Ids of the clips that were replaced so far; the owner of the run's state may set it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        audio_tokens: AudioTokenCount,
        wording: Wording,
        *,
        rows: list[int] | None = None,
        replace_unreadable: bool = False,
        open_ended: bool = False,
    ) -> None:
        """Read all cuts of a batch, or only those with index in `rows` (a data-parallel rank's share).

        With `open_ended`, questions need no choices. With `replace_unreadable`, another clip of the batch replaces one
        that cannot be read.
        """
        self.tokenizer = tokenizer
        self.audio_tokens = audio_tokens
        self.wording = wording
        self.rows = rows
        self.replace_unreadable = replace_unreadable
        self.open_ended = open_ended
        self.unreadable = set()

    def __getitem__(self, cuts: CutSet) -> list[Problem]:
        """Read `cuts` and write their prompts, in their order.

        Raises:
            ValueError: with cut id and path when audio cannot be decoded, ends early or holds NaN or infinity, unless
                another clip replaces it; with the field when a question is incomplete.
        """
        batch = list(cuts)
        read = [self._read(batch, row) for row in (range(len(batch)) if self.rows is None else self.rows)]
        return [self._problem(example_from_cut(cut, open_ended=self.open_ended), clips) for cut, clips in read]

    def _problem(self, example: Example, clips: list[Float[Tensor, "_"]]) -> Problem:
        token_ids = torch.tensor(self.encode(example, [len(clip) for clip in clips]))
        return Problem(prompt=Prompt(id=example.id, token_ids=token_ids, clips=tuple(clips)), example=example)

    def encode(self, example: Example, num_samples: Sequence[int]) -> list[int]:
        """Token ids of the prompt that asks `example` about clips of so many samples."""
        try:
            counts = [self.audio_tokens(samples) for samples in num_samples]
        except ValueError as error:
            raise ValueError(f"cut {example.id}: {error}") from error
        return encode_prompt(example, counts, self.tokenizer, self.wording)

    def _read(self, batch: list[Cut], row: int) -> tuple[Cut, list[Float[Tensor, "_"]]]:
        """The cut of a row and its audio; if that cannot be read, the next of the batch (cyclically) that can.

        Searches the whole batch, not only this rank's rows, so the replacement does not depend on the number of ranks.
        """
        for cut in batch[row:] + batch[:row]:
            try:
                return cut, [self._heard(clip) for clip in clips_of(cut)]
            except UnreadableClip as error:
                if not self.replace_unreadable:
                    raise
                if cut.id not in self.unreadable:
                    logger.warning(f"another clip takes the place of one that cannot be read: {error}")
                self.unreadable.add(str(cut.id))
        raise ValueError(f"none of the clips {[cut.id for cut in batch]} of a batch can be read")

    def _heard(self, clip: Cut) -> Float[Tensor, " samples"]:
        waveform = load_waveform(clip)
        try:
            self.audio_tokens(len(waveform))
        except ValueError as error:
            raise UnreadableClip(f"cut {clip.id}: {error}") from error
        return waveform


def load_waveform(cut: Cut) -> Float[Tensor, " samples"]:
    """Decode the audio of a mono cut: float32, full scale = 1.

    Raises:
        ValueError: the manifest names a command, a download or the like instead of a file.
        UnreadableClip: naming cut and path, when the stream is damaged or shorter than the cut, is not mono, or holds
            NaN, infinity or integers.
    """
    paths = [str(source.source) for source in cut.recording.sources if source.type == "file"]
    where = f"cut {cut.id} ({', '.join(paths) or 'from an archive'})"
    refuse_unsafe_recording(cut.recording, where)
    _refuse_missing_audio()
    try:
        samples = cut.load_audio()
    except (AudioLoadingError, DurationMismatchError, OSError) as error:
        raise UnreadableClip(
            f"{where}: audio cannot be read, the file is missing, damaged or truncated: replace it or remove the cut "
            f"from the manifest ({error})"
        ) from error
    if samples.shape[0] != 1:
        raise UnreadableClip(f"{where}: {samples.shape[0]} channels: convert the audio to mono")
    finite = np.isfinite(samples[0])
    if not finite.all():
        first = int(np.argmin(finite))
        raise UnreadableClip(
            f"{where}: {int((~finite).sum())} samples are NaN or infinite, the first is number {first}: "
            "replace the file or remove the cut from the manifest"
        )
    if (peak := float(np.abs(samples[0]).max(initial=0.0))) > LOUDEST:
        raise UnreadableClip(
            f"{where}: samples reach {peak:g} times full scale, as if integers had been written as floating point: "
            "divide them by their full scale and write the file again"
        )
    return torch.from_numpy(samples[0].astype(np.float32, copy=False))


class EpochSampler(Sampler[CutSet]):
    """Batches of cuts of one epoch, determined by (config, rank, epoch); can begin in the middle.

    Every pass sets up a new NeMo sampler, so no state is carried over from an earlier pass (Shar readers, for example,
    keep their own count).
    """

    def __init__(self, make_sampler: Callable[[int], CutSampler]) -> None:
        self._make_sampler = make_sampler
        self._epoch = 0
        self._skip = 0

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Set the epoch of the following passes; only the next pass skips its first `skip` batches."""
        if epoch < 0 or skip < 0:
            raise ValueError(f"epoch={epoch} and skip={skip} must not be negative")
        self._epoch, self._skip = epoch, skip

    def __iter__(self) -> Iterator[CutSet]:
        skip, self._skip = self._skip, 0
        for number, cuts in enumerate(self._batches()):
            if number >= skip:
                yield cuts

    def count_batches(self, limit: int | None = None) -> int:
        """Batches of the chosen epoch, or `limit` if there are more; a pass over manifests (Shar: the archives)."""
        return sum(1 for _ in islice(self._batches(), limit))

    def _batches(self) -> Iterator[CutSet]:
        try:
            yield from self._make_sampler(self._epoch)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"an archive of the split is damaged: write it again ({error})") from error


def build_dataloader(
    dataset_config: DatasetConfig,
    *,
    prompt_dataset: PromptDataset,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    only: frozenset[str] | None = None,
) -> PromptLoader:
    """Batch a split through NeMo's Lhotse dataloading; an epoch is one pass over all items of `input_cfg`.

    Ranks get disjoint batches, the same number each; a remainder is divided among them (or dropped, with `drop_last`).
    Weights of `input_cfg` items set how early an item is drawn, or how often if the split is infinite; an infinite
    split has a single endless epoch. With `only`, only questions with these ids are read. Run `validate_manifest`
    first: this function assumes a valid manifest.
    """
    allowed = only
    if allowed is None and dataset_config.max_samples is not None:
        allowed = frozenset(question_ids(dataset_config, prompt_dataset))

    def make_sampler(epoch: int) -> CutSampler:
        config = _nemo_config(dataset_config, epoch=epoch, drop_last=drop_last)
        sampler = _nemo_sampler(config, prompt_dataset, rank, world_size)
        if dataset_config.infinite:
            sampler = sampler.map(_with_own_ids)
        if allowed is None:
            return sampler
        # Lhotse filters before it maps: repetitions do not have their own ids back yet.
        repeated = _REPETITION if dataset_config.infinite else _NEVER
        return sampler.filter(lambda cut: repeated.sub("", example_id(cut)) in allowed)

    # torch draws a seed per pass; give it its own generator, so that reading data does not advance the global one.
    generator = torch.Generator().manual_seed(dataset_config.seed)
    return DataLoader(prompt_dataset, sampler=EpochSampler(make_sampler), batch_size=None, generator=generator)


def skip_batches(dataloader: PromptLoader, epoch: int, n: int = 0) -> None:
    """Make the next pass over `dataloader` start at batch `n` of `epoch`, without reading the audio before it."""
    _epoch_sampler(dataloader).set_epoch(epoch, skip=n)


def num_batches_per_epoch(dataloader: PromptLoader, *, limit: int | None = None) -> int:
    """Count the batches that one epoch gives to this rank, up to `limit`, without reading audio files."""
    return _epoch_sampler(dataloader).count_batches(limit)


def longest_prompt(dataloader: PromptLoader, *, limit: int | None = None) -> tuple[str, int]:
    """Id and number of tokens of the longest prompt of the split (or of `limit` cuts of it); no audio is read."""
    rows = rows_of_split(dataloader, limit=limit)
    return max(((example.id, len(prompt)) for example, prompt in rows), key=lambda found: found[1], default=("", 0))


def rows_of_split(dataloader: PromptLoader, *, limit: int | None = None) -> Iterator[tuple[Example, list[int]]]:
    """Example and prompt of each cut of the chosen epoch (or of `limit` of them); no audio is read."""
    dataset = dataloader.dataset
    assert isinstance(dataset, PromptDataset)
    cuts = islice((cut for batch in _epoch_sampler(dataloader) for cut in batch), limit)
    bar = tqdm(
        cuts, desc="measuring prompts", unit="cut", delay=_BAR_DELAY_SECONDS, leave=False, disable=not is_main_rank()
    )
    for cut in bar:
        example = example_from_cut(cut, open_ended=dataset.open_ended)
        yield example, dataset.encode(example, [clip.num_samples for clip in clips_of(cut)])


def _epoch_sampler(dataloader: PromptLoader) -> EpochSampler:
    sampler = dataloader.sampler
    if not isinstance(sampler, EpochSampler):
        raise ValueError(f"dataloader has a {type(sampler).__name__}: only those of build_dataloader can be positioned")
    return sampler


def _nemo_config(config: DatasetConfig, *, epoch: int, drop_last: bool) -> dict[str, Any]:
    """Translate a split into NeMo's dataloader options."""
    return {
        "input_cfg": nemo_items(config.items),
        "batch_size": config.batch_size,
        "sample_rate": config.sample_rate,
        "min_duration": config.min_duration,
        "max_duration": config.max_duration,
        "shuffle": config.shuffle,
        "shuffle_buffer_size": config.shuffle_buffer_size,
        "drop_last": drop_last,
        "seed": config.seed,
        # Shuffling, mixing and the order of Shar archives all follow this one.
        "shard_seed": config.seed + epoch,
        "use_bucketing": config.bucket_duration_bins is not None,
        "bucket_duration_bins": None if config.bucket_duration_bins is None else list(config.bucket_duration_bins),
        "bucket_buffer_size": config.bucket_buffer_size,
        "num_buckets": len(config.bucket_duration_bins or ()) + 1,
        # A background thread would make batches depend on timing.
        "concurrent_bucketing": False,
        "num_workers": 0,
        "force_finite": not config.infinite,
        # Batches are drawn in the training process: needed to continue at a given one.
        "force_map_dataset": True,
        # The trainer configures the allocator.
        "cuda_expandable_segments": False,
    }


def _nemo_sampler(config: dict[str, Any], dataset: PromptDataset, rank: int, world_size: int) -> CutSampler:
    with _preserved_global_rng():
        loader = get_lhotse_dataloader_from_config(config, global_rank=rank, world_size=world_size, dataset=dataset)
    return loader.sampler


def _with_own_ids(cuts: CutSet) -> CutSet:
    return CutSet.from_cuts(cut.with_id(_REPETITION.sub("", cut.id)) for cut in cuts)


def question_ids(config: DatasetConfig, dataset: PromptDataset) -> list[str]:
    """The ids of a split's questions, up to `max_samples`, as NeMo reads them unshuffled (Shar: in the archive order of
    `seed`); no audio is read."""
    plain = {"shuffle": False, "use_bucketing": False, "force_finite": True}
    unshuffled = {**_nemo_config(config, epoch=0, drop_last=False), **plain}
    ids: list[str] = []
    for cuts in _nemo_sampler(unshuffled, dataset, rank=0, world_size=1):
        ids.extend(example_id(cut) for cut in cuts)
        if config.max_samples is not None and len(ids) >= config.max_samples:
            break
    return ids[: config.max_samples]


@cache
def _refuse_missing_audio() -> None:
    """Lower Lhotse's tolerance for this process: by default it pads up to half a second with mirrored samples.

    Done once, because Lhotse logs every change.
    """
    set_audio_duration_mismatch_tolerance(DURATION_TOLERANCE_SECONDS)


@contextmanager
def _preserved_global_rng() -> Iterator[None]:
    """Preserve the process's random state, which NeMo overwrites whenever it sets up a dataloader."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
