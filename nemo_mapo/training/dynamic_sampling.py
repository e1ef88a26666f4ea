"""Dynamic sampling (DAPO): other prompts take the place of those whose completions all have the same reward.

Such a group has advantages 0 and teaches nothing. What replaces it comes from the prompts that would be drawn next, so
none is passed over, and which prompt goes where does not depend on the number of ranks.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from lhotse import CutSet
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_mapo.data.dataset import PromptDataset, skip_batches
from nemo_mapo.data.sequences import audio_rows
from nemo_mapo.rewards.combined import RewardTable
from nemo_mapo.training.prompts import PromptStream, check_counts
from nemo_mapo.training.ranks import gather_over_data_parallel
from nemo_mapo.types import AudioBatch, PromptBatch, Rollouts

Score = Callable[[Rollouts], tuple[RewardTable, Bool[Tensor, " group"]]]
"""Rewards of rollouts, and which of their groups have different ones."""
Sample = Callable[[int, list[int], list[int]], Rollouts]
"""Number of the round, open places of all ranks, those that this rank is to sample a new prompt for (by index)."""


class RefillingPromptStream(PromptStream):
    """A `PromptStream` that also hands out single prompts.

    They come from a batch of the stream that is set aside as a reserve, and from the next when that is used up. A
    reserve counts as a batch of the epoch but not as a step of its phase; a phase that ends leaves what is left of it.
    """

    def __init__(self, stream: PromptStream) -> None:
        """Begin where `stream` does, which is to be at its beginning."""
        super().__init__(stream.phases, stream.batch_size, max_unreadable=stream.max_unreadable)
        self._reserve: CutSet | None = None
        self._place: dict[str, int] = {}
        """Where the reserve was drawn (phase, epoch, batch) and its next prompt (row)."""

    def spare(self, count: int, mine: Sequence[int]) -> PromptBatch:
        """The next `count` prompts in reserve, of which this rank reads those numbered `mine` (any, repeated or not).

        To be called by all ranks, with the same `count`.
        """
        places = [self._next_place() for _ in range(count)]
        read = [self._read(*places[number]) for number in mine]
        if self.max_unreadable:
            self._note_unreadable()
        return join_prompts([(prompt, 0) for prompt in read], pad_id=self._dataset.pad_id)

    def state_dict(self) -> dict[str, Any]:
        """That of the stream, and what is left in reserve."""
        return {**super().state_dict(), "reserve": None if self._reserve is None else dict(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the prompts that `state` has consumed."""
        super().load_state_dict(state)
        self._reserve = None
        place = state["reserve"]
        if place is not None:
            check_counts(place, ("phase", "epoch", "batch", "row"))
        if place is not None and place["phase"] == self.phase:
            loader = self.phases[self.phase].dataloader
            skip_batches(loader, place["epoch"], place["batch"])
            self._reserve, self._place = next(iter(loader.sampler)), dict(place)

    @property
    def _dataset(self) -> PromptDataset:
        dataset = self.phases[self.phase].dataloader.dataset
        assert isinstance(dataset, PromptDataset)
        return dataset

    def _draw(self) -> PromptBatch | None:
        cuts = self._draw_cuts()
        return None if cuts is None else self._dataset[cuts]

    def _draw_cuts(self) -> CutSet | None:
        """The next batch of the epoch, its audio not read; None at the end of the epoch."""
        if self._iterator is None:
            loader = self.phases[self.phase].dataloader
            skip_batches(loader, self.epoch, self.batch)
            self._iterator = iter(loader.sampler)
        return next(self._iterator, None)

    def _next_place(self) -> tuple[CutSet, int]:
        """Batch and row of the next prompt in reserve."""
        if self._reserve is None or self._place["phase"] != self.phase or self._place["row"] == self.batch_size:
            cuts = self._draw_cuts()
            if cuts is None:
                self.epoch, self.batch, self._iterator = self.epoch + 1, 0, None
                cuts = self._draw_cuts()
            assert cuts is not None, "the step before has drawn from this split"
            self._reserve = cuts
            self._place = {"phase": self.phase, "epoch": self.epoch, "batch": self.batch, "row": 0}
            self.batch += 1
        row = self._place["row"]
        self._place["row"] += 1
        return self._reserve, row

    def _read(self, cuts: CutSet, row: int) -> PromptBatch:
        dataset = copy(self._dataset)
        dataset.rows = [row]
        return dataset[cuts]


@dataclass(frozen=True, kw_only=True)
class Refilled:
    """A rollout batch after dynamic sampling."""

    rollouts: Rollouts
    rewards: RewardTable
    groups: int
    """Sampled in all rounds, by all ranks."""
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The completions of one prompt, among those that were sampled with them."""

    rollouts: Rollouts
    rewards: RewardTable
    index: int


def refill(
    first: Rollouts, *, places: Sequence[int], max_rounds: int, score: Score, sample: Sample, pad_id: int
) -> Refilled:
    """Sample a new prompt for every place whose group has equal rewards, until none has or `max_rounds` have passed.

    To be called by all ranks; each holds the groups of its `places` in the whole batch. A group that is still open in
    the end stays as it was sampled first.
    """
    rewards, differ = score(first)
    groups = [_Group(rollouts=first, rewards=rewards, index=index) for index in range(len(places))]
    whole = sum(gather_over_data_parallel(len(places)))
    open_places = _open_everywhere(places, differ, whole)
    sampled, rounds = whole, 1
    replaced = 0
    while open_places and rounds <= max_rounds:
        mine = [number for number, place in enumerate(open_places) if place in places]
        # Ranks that share out experts, or ask servers together, make the same calls; a prompt to throw away fills up.
        wanted = mine + [0] * (max(gather_over_data_parallel(len(mine))) - len(mine))
        found = sample(rounds, open_places, wanted)
        rewards, differ = score(found)
        still_open = _open_everywhere([open_places[number] for number in mine], differ[: len(mine)], whole)
        for index, number in enumerate(mine):
            if open_places[number] not in still_open:
                groups[places.index(open_places[number])] = _Group(rollouts=found, rewards=rewards, index=index)
        sampled += len(open_places)
        replaced += len(open_places) - len(still_open)
        open_places, rounds = still_open, rounds + 1
    metrics = {
        "rollout/generation_rounds": float(rounds),
        "rollout/kept_share": (whole - len(open_places)) / sampled,
        "rollout/replaced_groups": replaced / whole,
    }
    kept = [(group.rollouts, group.index) for group in groups]
    return Refilled(
        rollouts=join_rollouts(kept, pad_id=pad_id) if replaced else first,
        rewards=_join_rewards(groups, first.group_size),
        groups=sampled,
        metrics=metrics,
    )


def _open_everywhere(places: Sequence[int], differ: Bool[Tensor, " group"], whole: int) -> list[int]:
    """Places of all ranks whose group has equal rewards, ascending; open is what any rank calls open."""
    flags = torch.zeros(whole, device=torch.cuda.current_device())
    flags[[place for place, different in zip(places, differ.tolist(), strict=True) if not different]] = 1.0
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [int(place) for place in flags.nonzero().flatten()]


def join_prompts(parts: Sequence[tuple[PromptBatch, int]], *, pad_id: int) -> PromptBatch:
    """One batch of some rows of several; a row's clips come with it."""
    tokens = [batch.tokens[row, : int(batch.lengths[row])] for batch, row in parts]
    clips = [[(batch.audio, clip) for clip in batch.clips(row)] for batch, row in parts]
    waveforms = [audio.waveforms[clip, : int(audio.lengths[clip])] for of_row in clips for audio, clip in of_row]
    return PromptBatch(
        tokens=pad_sequence(tokens, batch_first=True, padding_value=pad_id),
        lengths=torch.tensor([len(row) for row in tokens]),
        audio=AudioBatch(
            waveforms=pad_sequence(waveforms, batch_first=True) if waveforms else torch.zeros(0, 0),
            lengths=torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.int64),
        ),
        audio_row=audio_rows([len(of_row) for of_row in clips]),
        examples=tuple(batch.examples[row] for batch, row in parts),
    )


def join_rollouts(parts: Sequence[tuple[Rollouts, int]], *, pad_id: int) -> Rollouts:
    """One batch of some groups, by number, of several batches of the same group size and weights."""
    first = parts[0][0]
    size = first.group_size
    rows = [(rollouts, row) for rollouts, group in parts for row in range(group * size, (group + 1) * size)]
    assert all(other.group_size == size and other.weight_version == first.weight_version for other, _ in parts)

    def joined(name: str, fill: int | float) -> Tensor:
        values = [vars(rollouts)[name][row, : int(rollouts.completion_lengths[row])] for rollouts, row in rows]
        return pad_sequence(values, batch_first=True, padding_value=fill)

    return Rollouts(
        prompts=join_prompts([(rollouts.prompts, group) for rollouts, group in parts], pad_id=pad_id),
        group_size=size,
        completions=joined("completions", pad_id),
        completion_lengths=torch.stack([rollouts.completion_lengths[row] for rollouts, row in rows]),
        finish_reasons=tuple(rollouts.finish_reasons[row] for rollouts, row in rows),
        texts=tuple(rollouts.texts[row] for rollouts, row in rows),
        log_probs=joined("log_probs", 0.0),
        sampling_log_probs=joined("sampling_log_probs", 0.0),
        weight_version=first.weight_version,
    )


def _join_rewards(groups: Sequence[_Group], size: int) -> RewardTable:
    rows = [(group.rewards, group.index * size + member) for group in groups for member in range(size)]
    return RewardTable(
        by_reward={name: [table.by_reward[name][row] for table, row in rows] for name in groups[0].rewards.by_reward},
        total=[table.total[row] for table, row in rows],
    )
