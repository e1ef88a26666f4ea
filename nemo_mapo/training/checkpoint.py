"""Megatron distributed checkpoints, written atomically."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_mapo.checksums import CHECKSUMS, checksums_of, damage, files_to_sum, write_checksums
from nemo_mapo.config.exp_manager import CheckpointCallbackConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.files import UNFINISHED, flush
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.lora import is_adapter
from nemo_mapo.models.untrusted import checkpoint_reader, refuse_code
from nemo_mapo.processes import is_main_rank
from nemo_mapo.ranks import gather
from nemo_mapo.training.optimizer import PolicyOptimizer
from nemo_mapo.training.room import no_room_in
from nemo_mapo.upstream.megatron import save

logger = logging.getLogger(__name__)

_STATE_FILE = "trainer_state.json"
_STEP_PREFIX = "step_"
VALIDATION = "validation"
"""Key of the metrics of validation in a trainer's state."""
BEST = "best"
"""Link to the checkpoint whose validation was the best."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: dict[str, Any]
    """The trainer's own state_dict: step, data position and the like."""


def step_name(step: int | Any) -> str:
    """Name of a step's checkpoint; if `step` is not a count, a name that no checkpoint has."""
    return f"{_STEP_PREFIX}{step:06d}" if isinstance(step, int) and step >= 0 else ""


class CheckpointStore:
    """The checkpoints of one run directory, `step_000020/` and so on.

    A checkpoint is written under a temporary name, flushed, and renamed when it is complete, so a directory with a
    final name is always complete.
    """

    def __init__(self, directory: Path, *, keep: int, best: CheckpointCallbackConfig | None = None) -> None:
        """Keep the `keep` newest, and the best according to `best`; None keeps the single best by accuracy or loss."""
        self.directory = directory
        self.keep = keep
        self._best = best or CheckpointCallbackConfig()

    @classmethod
    def of(cls, config: RunConfig, directory: Path) -> "CheckpointStore":
        """Those that a run keeps."""
        best = config.exp_manager.checkpoint_callback_params
        return cls(directory, keep=config.trainer.loop.keep_checkpoints, best=best)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None."""
        found = self._complete()
        return read_checkpoint(found[-1]) if found else None

    def newest_undamaged(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest undamaged checkpoint, and what is wrong with each newer one.

        Collective over all ranks; None if there is no checkpoint at all.

        Raises:
            ValueError: every checkpoint is damaged, or one holds what could run code.
        """
        damaged: list[str] = []
        for path in reversed(self._complete()):
            if not (found := _damage_on_any_rank(path)):
                return read_checkpoint(path), damaged
            damaged.append(found)
        if damaged:
            raise ValueError(f"no checkpoint in {self.directory} is whole, begin a new run directory: {damaged[0]}")
        return None, []

    def save(
        self,
        step: int,
        model: AudioLLM,
        optimizer: PolicyOptimizer,
        trainer_state: dict[str, Any],
        validation: Mapping[str, float] | None = None,
    ) -> Path:
        """Write a checkpoint of `step`, with the metrics of its validation, and remove those that need not be kept.

        Raises:
            ValueError: `validation` lacks the metric by which the best checkpoint is chosen.
        """
        if validation:
            self._best.score(validation)
            trainer_state = {**trainer_state, VALIDATION: dict(validation)}
        final = self.directory / step_name(step)
        if is_main_rank():
            self._remove_unfinished()
            if final.exists():
                _remove(final)
        write_checkpoint(final, model, optimizer=optimizer, state=trainer_state)
        if is_main_rank():
            best = [name for name, _, _ in self._ranked()[: self._best.save_top_k]]
            if best:
                _link(self.directory / BEST, best[0])
            for old in self._complete()[: -self.keep]:
                if old.name not in best:
                    _remove(old)
        return final

    def facts(self) -> dict[str, Any]:
        """The entry of the best checkpoint in run.json."""
        kept = self._ranked()[: self._best.save_top_k]
        return {"best_checkpoint": dict(zip(("name", "metric", "value"), kept[0], strict=True))} if kept else {}

    def _ranked(self) -> list[tuple[str, str, float]]:
        """The checkpoints that were validated, the best first: name, metric and its value."""
        found = []
        for path in self._complete():
            validation = _validation_of(path)
            if scored := self._best.score(validation):
                metric, score = scored
                found.append((score, path.name, metric, validation[metric]))
        # Sorting is stable: among equal ones the earlier stays first.
        return [one[1:] for one in sorted(found, key=lambda one: -one[0])]

    def _complete(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(
            path
            for path in self.directory.iterdir()
            if path.name.startswith(_STEP_PREFIX) and not path.name.endswith(UNFINISHED)
        )

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path)


def write_checkpoint(
    final: Path, model: AudioLLM, *, optimizer: PolicyOptimizer | None = None, state: dict[str, Any] | None = None
) -> None:
    """Write model (and optimiser, trainer state, RNG) to `final`, which appears only when it is whole.

    Every rank writes its part; `final` must be on storage that all ranks share.

    Raises:
        NoRoomLeft: the disk is full; the partial checkpoint is removed.
    """
    unfinished = final.with_name(final.name + UNFINISHED)
    if is_main_rank():
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
    dist.barrier()
    sharded = {"model": model.sharded_state_dict(), "rng": torch.get_rng_state()}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"])
    with _removed_unless_whole(unfinished):
        save(sharded, unfinished)
        if is_main_rank():
            (unfinished / _STATE_FILE).write_text(json.dumps(state or {}, indent=2) + "\n")
        dist.barrier()
        sums = checksums_of(files_to_sum(unfinished)[dist.get_rank() :: dist.get_world_size()])
        of_all = {name: value for part in gather(sums) for name, value in part.items()}
        if is_main_rank():
            write_checksums(unfinished, of_all)
            for path in unfinished.iterdir():
                flush(path)
            flush(unfinished)
            unfinished.rename(final)
            flush(final.parent)
    dist.barrier()


@contextmanager
def _removed_unless_whole(unfinished: Path) -> Iterator[None]:
    try:
        with no_room_in(unfinished.parent):
            yield
    # After any error, including Ctrl-C: a partial checkpoint must not take up the space of the next.
    except BaseException:
        if is_main_rank():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint directory.

    Raises:
        ValueError: if it is not a whole nemo-mapo checkpoint, or holds what could run code (`refuse_code`).
    """
    state_file = path / _STATE_FILE
    if path.name.endswith(UNFINISHED) or not state_file.is_file():
        raise ValueError(
            f"{path} is not a complete nemo-mapo checkpoint (no {_STATE_FILE}); "
            "point to a directory such as RUN/checkpoints/step_000100"
        )
    refuse_code(path)
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{state_file} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{state_file} is damaged: it holds {state!r}, not the state of a trainer")
    return Checkpoint(path=path, state=state)


def refuse_damage(path: Path) -> None:
    """Refuse a checkpoint that differs from what was written: ValueError naming the file, on all ranks together."""
    if found := _damage_on_any_rank(path):
        raise ValueError(
            f"{found}: the checkpoint is damaged. Use another one, or delete {path / CHECKSUMS} to load it "
            "anyway, with whatever weights it has now"
        )


def _damage_on_any_rank(path: Path) -> str:
    """Each rank reads a share of the files."""
    if not (path / CHECKSUMS).is_file():
        logger.warning(f"{path} has no {CHECKSUMS}: its files cannot be verified")
    return next(filter(None, gather(damage(path, part=dist.get_rank(), parts=dist.get_world_size()))), "")


def has_adapters(path: Path) -> bool:
    """Whether a checkpoint holds LoRA adapters; ValueError as `checkpoint_reader`."""
    return any(is_adapter(key) for key in checkpoint_reader(path).read_metadata().state_dict_metadata)


def load_part(path: Path, model: AudioLLM, part: Literal["perception", "language_model"]) -> None:
    """Load one part of a checkpoint and leave the other part of the model unchanged.

    Raises:
        ValueError: as `read_checkpoint` and `refuse_damage`.
    """
    refuse_damage(path)
    read_checkpoint(path)
    wanted = {name: value for name, value in model.sharded_state_dict().items() if name.startswith(f"{part}.")}
    loaded = dist_checkpointing.load({"model": wanted}, str(path))
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    assert not unexpected and not any(name.startswith(f"{part}.") for name in missing)


def load_checkpoint(
    path: Path, model: AudioLLM, *, optimizer: PolicyOptimizer | None = None, undamaged: bool = False
) -> dict[str, Any]:
    """Load weights (and optimiser and torch's RNG state, when an optimiser is given); return the trainer's state.

    The layout may differ from that of the run that wrote it: every rank reads the parts it needs.

    Args:
        path: directory of the checkpoint.
        model: takes the weights.
        optimizer: takes its state.
        undamaged: the checksums have been compared already (`CheckpointStore.newest_undamaged`).

    Raises:
        ValueError: as `read_checkpoint` and `refuse_damage`; or the checkpoint has adapters and the model has none.
    """
    if not undamaged:
        refuse_damage(path)
    checkpoint = read_checkpoint(path)
    if not any(is_adapter(name) for name, _ in model.named_parameters()) and has_adapters(path):
        # Megatron reads what the model asks for, and would leave them out without a word.
        raise ValueError(f"{path} holds LoRA adapters, which the model that it is loaded into has not")
    sharded: dict[str, Any] = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"], loading=True)
    loaded = dist_checkpointing.load(sharded, str(path))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        torch.set_rng_state(loaded["rng"])
    return checkpoint.state


def _remove(checkpoint: Path) -> None:
    """Rename before deleting, so that a directory with the final name is always complete."""
    unfinished = checkpoint.with_name(checkpoint.name + UNFINISHED)
    checkpoint.rename(unfinished)
    shutil.rmtree(unfinished)


def followed(path: Path) -> Path:
    """The checkpoint at a path; a link (`best`), which may change later, is resolved to its present target."""
    return path.parent / path.readlink() if path.is_symlink() else path


def _validation_of(path: Path) -> dict[str, float]:
    """Validation metrics of a checkpoint; none if its state is damaged, so that it cannot be the best."""
    try:
        state = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, float] = state.get(VALIDATION, {}) if isinstance(state, dict) else {}
    return found


def _link(link: Path, name: str) -> None:
    """Point `link` to the checkpoint of this name beside it, without a moment in which it is missing.

    A run copied with links followed has a directory in its place, which is removed.
    """
    if link.is_dir() and not link.is_symlink():
        _remove(link)
    fresh = link.with_suffix(".next")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(link)
