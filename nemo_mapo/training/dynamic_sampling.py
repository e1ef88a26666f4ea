"""Dynamic sampling (DAPO): other prompts replace those whose completions all have the same reward.

Such a group has advantages 0 and nothing is learned from it. Replacements are the prompts that would be drawn next, so
none is skipped, and the assignment of prompts does not depend on the number of ranks.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from lhotse import CutSet
from torch import Tensor

from nemo_mapo.data.dataset import PromptDataset, skip_batches
from nemo_mapo.ranks import gather, gather_over_data_parallel
from nemo_mapo.rewards.combined import RewardTable
from nemo_mapo.rows import Group, Problem
from nemo_mapo.training.prompts import PromptStream, check_counts

Score = Callable[[Sequence[Group]], tuple[RewardTable, Bool[Tensor, " group"]]]
"""Rewards of the completions of groups, and which groups have unequal rewards."""
Sample = Callable[[int, list[int], list[int]], list[Group]]
"""Number of the round, open places of all ranks, those that this rank is to sample a new prompt for (by index)."""


class RefillingPromptStream(PromptStream):
    """A `PromptStream` that also hands out single prompts.

    They come from a batch of the stream that is set aside as a reserve, and from the next one when it is used up. A
    reserve counts as a batch of the epoch but not as a step of its phase; when a phase ends, its rest is dropped.
    """

    def __init__(self, stream: PromptStream) -> None:
        """Begin where `stream` begins; nothing may have been drawn from it."""
        super().__init__(stream.phases, stream.batch_size, max_unreadable=stream.max_unreadable)
        self._reserve: CutSet | None = None
        self._place: dict[str, int] = {}
        """Where the reserve was drawn (phase, epoch, batch) and its next prompt (row)."""

    def spare(self, count: int, mine: Sequence[int]) -> list[Problem]:
        """The next `count` prompts in reserve, of which this rank reads those numbered `mine` (any, repeated or not).

        To be called by all ranks, with the same `count`.
        """
        places = [self._next_place() for _ in range(count)]
        read = [self._read(*places[number]) for number in mine]
        if self.max_unreadable:
            self._note_unreadable()
        return read

    def state_dict(self) -> dict[str, Any]:
        """State of the stream, and the rest of the reserve."""
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

    def _draw(self) -> list[Problem] | None:
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

    def _read(self, cuts: CutSet, row: int) -> Problem:
        dataset = copy(self._dataset)
        dataset.rows = [row]
        (problem,) = dataset[cuts]
        return problem


@dataclass(frozen=True, kw_only=True)
class Refilled:
    """A rollout batch after dynamic sampling."""

    groups: list[Group]
    rewards: RewardTable
    sampled: int
    """Groups sampled in all rounds, by all ranks."""
    metrics: dict[str, float]


def refill(first: Sequence[Group], *, places: Sequence[int], max_rounds: int, score: Score, sample: Sample) -> Refilled:
    """Sample a new prompt for every slot whose group has equal rewards, until none has or `max_rounds` have passed.

    To be called by all ranks; each holds the groups of its `places` in the whole batch. A slot that is still open at
    the end keeps the group that was sampled first.
    """
    rewards, differ = score(first)
    kept = list(zip(first, rewards.by_group(first), strict=True))
    whole = sum(gather_over_data_parallel(len(places)))
    open_places = _open_everywhere(places, differ)
    sampled, rounds = whole, 1
    replaced = 0
    while open_places and rounds <= max_rounds:
        mine = [number for number, place in enumerate(open_places) if place in places]
        # Ranks whose experts are sharded, or that ask servers together, make the same calls: a spare prompt fills up.
        wanted = mine + [0] * (max(gather_over_data_parallel(len(mine))) - len(mine))
        found = sample(rounds, open_places, wanted)
        rewards, differ = score(found)
        scored = list(zip(found, rewards.by_group(found), strict=True))
        still_open = _open_everywhere([open_places[number] for number in mine], differ[: len(mine)])
        for index, number in enumerate(mine):
            if open_places[number] not in still_open:
                kept[places.index(open_places[number])] = scored[index]
        sampled += len(open_places)
        replaced += len(open_places) - len(still_open)
        open_places, rounds = still_open, rounds + 1
    metrics = {
        "rollout/generation_rounds": float(rounds),
        "rollout/kept_share": (whole - len(open_places)) / sampled,
        "rollout/replaced_groups": replaced / whole,
    }
    return Refilled(
        groups=[group for group, _ in kept],
        rewards=RewardTable.joined([table for _, table in kept]),
        sampled=sampled,
        metrics=metrics,
    )


def _open_everywhere(places: Sequence[int], differ: Bool[Tensor, " group"]) -> list[int]:
    """Places of all ranks whose group has equal rewards, ascending; open is what any rank calls open."""
    mine = {place for place, different in zip(places, differ.tolist(), strict=True) if not different}
    return sorted(set[int]().union(*gather(mine)))
