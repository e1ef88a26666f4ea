"""An endless stream of batches of problems whose position can be saved and found again exactly."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.dataset import PromptDataset, num_batches_per_epoch, skip_batches
from nemo_mapo.ranks import gather_over_data_parallel
from nemo_mapo.rows import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptPhase:
    """A phase of the curriculum, or the only one."""

    name: str
    dataloader: DataLoader[list[Problem]]
    steps: int | None
    """Batches of this phase; None is unlimited."""


class PromptStream:
    """Full batches of the training split, phase after phase; in each, epoch after epoch, reshuffled each epoch."""

    def __init__(self, phases: Sequence[PromptPhase], batch_size: int, *, max_unreadable: int = 0) -> None:
        """Begin at the first phase; ValueError, when a batch is drawn, past `max_unreadable` clips of all ranks."""
        self.phases = tuple(phases)
        self.batch_size = batch_size
        self.max_unreadable = max_unreadable
        self.unreadable: frozenset[str] = frozenset()
        """Ids of the clips that were replaced, on any rank."""
        self.phase = 0
        self.steps_in_phase = 0
        self.epoch = 0
        self.batch = 0
        self._iterator: Any = None

    def batches_per_epoch(self, *, limit: int | None = None) -> int:
        """Batches in one pass over the split of the present phase, which must end, or `limit` if there are more.

        Raises:
            ValueError: if there is not a single full batch.
        """
        batches = num_batches_per_epoch(self.phases[self.phase].dataloader, limit=limit)
        if batches == 0:
            raise self._too_small()
        return batches

    def __next__(self) -> list[Problem]:
        if self.steps_in_phase == self.phases[self.phase].steps:
            self._go_to(phase=self.phase + 1)
        if self._iterator is None and len(self.phases) > 1 and self.steps_in_phase == 0:
            logger.info(f"data phase {self.phase + 1} of {len(self.phases)}: {self.phases[self.phase].name}")
        problems = self._draw()
        if problems is None:
            self.epoch, self.batch, self._iterator = self.epoch + 1, 0, None
            problems = self._draw()
        if problems is None:
            raise self._too_small()
        self.batch += 1
        self.steps_in_phase += 1
        if self.max_unreadable:
            self._note_unreadable()
        return problems

    def metrics(self) -> dict[str, float]:
        """Metrics of the data, only those that the config makes meaningful."""
        metrics: dict[str, float] = {}
        if len(self.phases) > 1:
            metrics["data/phase"] = float(self.phase + 1)
        if self.max_unreadable:
            metrics["data/unreadable_clips"] = float(len(self.unreadable))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Phase, steps taken in it, epoch of it, batches consumed in that, and the clips that were replaced."""
        return {
            "phase": self.phase,
            "steps_in_phase": self.steps_in_phase,
            "epoch": self.epoch,
            "batch": self.batch,
            "unreadable": sorted(self.unreadable),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that `state` has consumed; ValueError for a state of an earlier nemo-mapo."""
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(
                f"the checkpoint does not record its data position ({', '.join(missing)}): it was written by "
                "an earlier nemo-mapo. Start a new run from it with pretrained_checkpoint.restore_from_path"
            )
        check_counts(state, ("phase", "steps_in_phase", "epoch", "batch"))
        if state["phase"] >= len(self.phases):
            raise ValueError(f"trainer_state.json: phase is {state['phase']}, data.train_ds has {len(self.phases)}")
        self._go_to(phase=state["phase"])
        self.steps_in_phase, self.epoch, self.batch = state["steps_in_phase"], state["epoch"], state["batch"]
        self.unreadable = frozenset(state["unreadable"])
        for phase in self.phases:
            _dataset(phase).unreadable = set(self.unreadable)

    def _draw(self) -> list[Problem] | None:
        """The next batch of the epoch; None at its end."""
        if self._iterator is None:
            loader = self.phases[self.phase].dataloader
            skip_batches(loader, self.epoch, self.batch)
            self._iterator = iter(loader)
        problems: list[Problem] | None = next(self._iterator, None)
        return problems

    def _go_to(self, *, phase: int) -> None:
        self.phase, self.steps_in_phase, self.epoch, self.batch, self._iterator = phase, 0, 0, 0, None

    def _note_unreadable(self) -> None:
        """Share the replaced clips among all ranks, so that they end at the same step."""
        mine = _dataset(self.phases[self.phase]).unreadable
        self.unreadable = self.unreadable.union(*gather_over_data_parallel(mine))
        if len(self.unreadable) > self.max_unreadable:
            raise ValueError(
                f"{len(self.unreadable)} clips of the training split cannot be read, which is more than "
                f"data.train_ds.max_unreadable={self.max_unreadable}: {', '.join(sorted(self.unreadable))}; the log "
                "says why. Replace them, or raise the limit"
            )

    def _too_small(self) -> ValueError:
        return ValueError(
            f"data.train_ds.batch_size={self.batch_size} exceeds the training split"
            f"{f' of phase {self.phases[self.phase].name}' if len(self.phases) > 1 else ''} (or each of its duration "
            "buckets); use a smaller batch or more data"
        )


def check_counts(state: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a saved state in which one of `names` is not a count: ValueError naming it."""
    for name in names:
        value = state.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"trainer_state.json: {name} must be a whole number of at least 0, not {value!r}")


def total_steps(config: RunConfig, prompts: PromptStream) -> int:
    """Rollout batches of the whole run: phases, or NeMo-Aligner's max_epochs; max_steps may end it earlier."""
    split, limit = config.data.train_ds, config.trainer.loop.max_steps
    if split.phases:
        steps = sum(phase.steps for phase in split.phases)
    elif split.infinite:
        steps = limit
    else:
        # A long split is not counted beyond what the run takes.
        steps = prompts.batches_per_epoch(limit=None if limit < 0 else max(limit, 1)) * config.trainer.loop.max_epochs
    return steps if limit < 0 else min(steps, limit)


def _dataset(phase: PromptPhase) -> PromptDataset:
    dataset = phase.dataloader.dataset
    assert isinstance(dataset, PromptDataset)
    return dataset
