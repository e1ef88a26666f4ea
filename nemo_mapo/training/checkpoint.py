"""Megatron distributed checkpoints that are either whole or not there."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.training.optimizer import PolicyOptimizer
from nemo_mapo.training.ranks import is_main_rank
from nemo_mapo.training.untrusted import refuse_code

_STATE_FILE = "trainer_state.json"
_UNFINISHED = ".unfinished"
_STEP_PREFIX = "step_"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: dict[str, Any]
    """The trainer's own state_dict: step, data position and the like."""


class CheckpointStore:
    """The checkpoints of one run directory, `step_000020/` and so on.

    A checkpoint is written under another name, flushed, and renamed when it is whole, so a directory with a final
    name is always complete.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None."""
        found = self._complete()
        return read_checkpoint(found[-1]) if found else None

    def save(self, step: int, model: AudioLLM, optimizer: PolicyOptimizer, trainer_state: dict[str, Any]) -> Path:
        """Write a checkpoint of `step` and remove the oldest ones beyond `keep`."""
        final = self.directory / f"{_STEP_PREFIX}{step:06d}"
        if is_main_rank():
            self._remove_unfinished()
            if final.exists():
                _remove(final)
        write_checkpoint(final, model, optimizer=optimizer, state=trainer_state)
        if is_main_rank():
            for old in self._complete()[: -self.keep]:
                _remove(old)
        return final

    def _complete(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(
            path
            for path in self.directory.iterdir()
            if path.name.startswith(_STEP_PREFIX) and not path.name.endswith(_UNFINISHED)
        )

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(path)


def write_checkpoint(
    final: Path, model: AudioLLM, *, optimizer: PolicyOptimizer | None = None, state: dict[str, Any] | None = None
) -> None:
    """Write model (and optimiser, trainer state, RNG) to `final`, which appears only when it is whole.

    Every rank writes its part; `final` must be on storage that all of them see.
    """
    unfinished = final.with_name(final.name + _UNFINISHED)
    if is_main_rank():
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
    dist.barrier()
    sharded = {"model": model.sharded_state_dict(), "rng": torch.get_rng_state()}
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(sharded["model"])
    dist_checkpointing.save(sharded, str(unfinished))
    dist.barrier()
    if is_main_rank():
        (unfinished / _STATE_FILE).write_text(json.dumps(state or {}, indent=2) + "\n")
        for path in unfinished.iterdir():
            _flush(path)
        _flush(unfinished)
        unfinished.rename(final)
        _flush(final.parent)
    dist.barrier()


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint directory.

    Raises:
        ValueError: if it is not a whole nemo-mapo checkpoint, or holds what could run code (`refuse_code`).
    """
    state_file = path / _STATE_FILE
    if path.name.endswith(_UNFINISHED) or not state_file.is_file():
        raise ValueError(
            f"{path} is not a complete nemo-mapo checkpoint (no {_STATE_FILE}); "
            "point to a directory such as RUN/checkpoints/step_000100"
        )
    refuse_code(path)
    return Checkpoint(path=path, state=json.loads(state_file.read_text()))


def refuse_adapters(path: Path) -> None:
    """ValueError for a checkpoint with LoRA adapters: a model without them would silently load its base alone."""
    read_checkpoint(path)
    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    if adapters := sorted(key for key in keys if key.endswith(".lora_a")):
        raise ValueError(
            f"pretrained_checkpoint.restore_from_path={path} holds LoRA adapters ({adapters[0]}, ...), which a start "
            "would leave out: merge them first (docs/recipes.md)"
        )


def load_part(path: Path, model: AudioLLM, part: Literal["perception", "language_model"]) -> None:
    """Load one part of a checkpoint and leave the other as it is, whatever the checkpoint has there."""
    read_checkpoint(path)
    wanted = {name: value for name, value in model.sharded_state_dict().items() if name.startswith(f"{part}.")}
    loaded = dist_checkpointing.load({"model": wanted}, str(path))
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    assert not unexpected and not any(name.startswith(f"{part}.") for name in missing)


def load_checkpoint(path: Path, model: AudioLLM, *, optimizer: PolicyOptimizer | None = None) -> dict[str, Any]:
    """Load weights (and optimiser and torch's RNG state, when an optimiser is given); return the trainer's state.

    The layout may be another one than that which wrote the checkpoint: every rank reads the parts it needs.
    """
    checkpoint = read_checkpoint(path)
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
    """Take the final name away first: a directory with that name stays whole to the last."""
    unfinished = checkpoint.with_name(checkpoint.name + _UNFINISHED)
    checkpoint.rename(unfinished)
    shutil.rmtree(unfinished)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
