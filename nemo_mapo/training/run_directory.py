"""The directory that holds everything about a run; opened once, never shared by two different runs."""

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from nemo_mapo import __version__
from nemo_mapo.config.load import ConfigError, as_plain, differences, flat
from nemo_mapo.config.run import RunConfig
from nemo_mapo.config.start import used_directory
from nemo_mapo.config.yaml_files import read_recorded
from nemo_mapo.files import write_text
from nemo_mapo.processes import is_main_rank
from nemo_mapo.rewards.templates import prompt_wording
from nemo_mapo.training.checkpoint import followed
from nemo_mapo.training.records import JsonLines

_LOOPS = ("trainer.mapo", "trainer.sft")
_LENGTH = tuple(f"{loop}.{name}" for loop in _LOOPS for name in ("max_epochs", "max_steps"))
_INTERVALS = ("val_check_interval", "save_interval", "max_time_per_run", "keep_checkpoints")
_MAY_CHANGE = (
    *_LENGTH,
    *(f"{loop}.{name}" for loop in _LOOPS for name in _INTERVALS),
    "exp_manager",
    "trainer.num_threads",
    "trainer.num_nodes",
    "trainer.devices",
    "model.tensor_model_parallel_size",
    "model.sequence_parallel",
    "model.pipeline_model_parallel_size",
    "model.expert_model_parallel_size",
    "model.micro_batch_size",
    "model.packed_tokens",
    "model.decoder.recompute_granularity",
    "model.decoder.recompute_modules",
    "warm_start.cache_dir",
    "rollout.vllm",
    "rollout.trtllm",
    "rollout.log_prob_alarm",
    "rewards.judge.base_url",
)
"""Keys that a resumed run may set differently: how long, how often, how fast and in which layout. (Another number of
threads or another layout may change sums in their last bits; the length decides the learning rate if the schedule is a
cosine, and is compared then.)"""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Paths of a run's files, which the main rank alone writes."""

    path: Path

    @property
    def metrics(self) -> JsonLines:
        """One flat object per step."""
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def rollouts(self) -> JsonLines:
        """Completions to read."""
        return JsonLines(self.path / "rollouts.jsonl")

    @property
    def profiles(self) -> JsonLines:
        """Audio mass and differential entropy along completions."""
        return JsonLines(self.path / "profiles.jsonl")

    @property
    def test(self) -> JsonLines:
        """Every question of the test split: right or wrong before and after training."""
        return JsonLines(self.path / "test.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Distributed checkpoints, one directory per step."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """NeMo's experiment manager writes here: its own directory, because it moves what it finds into run_N."""
        return self.path / "logs"

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def summary(self) -> Path:
        """Times, memory, test metrics; written when the run ends."""
        return self.path / "run.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out while the main rank of this one writes; a kill releases the lock.

        Raises:
            ValueError: if another process is at work here.
        """
        try:
            with FileLock(self.path / ".lock", timeout=0) if is_main_rank() else contextlib.nullcontext():
                yield
        except Timeout as error:
            raise ValueError(
                f"exp_manager.explicit_log_dir={self.path}: another process is training there; wait for it, or choose "
                "another directory"
            ) from error

    def write_summary(self, facts: dict[str, Any]) -> None:
        """Write run.json whole or not at all."""
        if not is_main_rank():
            return
        write_text(self.summary, json.dumps(facts, indent=2) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run recorded after its last checkpoint, and the record of its end."""
        if not is_main_rank():
            return
        for file in (self.metrics, self.rollouts):
            file.forget_after(step)
        for path in (self.profiles.path, self.test.path, self.summary):
            path.unlink(missing_ok=True)


def open_run_directory(config: RunConfig) -> RunDirectory:
    """Create or reopen the run directory and write the resolved config into it, as the main rank.

    Raises:
        ValueError: if it cannot be written, or holds a run that should not be resumed or was configured differently.
    """
    directory = RunDirectory(path=Path(config.exp_manager.explicit_log_dir))
    if not is_main_rank():
        return directory
    if problems := list(used_directory(config)):
        raise ConfigError(*problems)
    where = f"exp_manager.explicit_log_dir={directory.path}"
    try:
        directory.checkpoints.mkdir(parents=True, exist_ok=True)
        directory.config.open("a").close()
    except OSError as error:
        raise ValueError(f"{where}: cannot write there ({error.strerror}); choose another directory") from error
    if directory.metrics.path.exists() or any(directory.checkpoints.glob("step_*")):
        changed = config_changes(read_recorded(directory.config), recorded_config(config))
        if changed:
            raise ValueError(
                f"{where} holds a run with another config, so it cannot be resumed; set these back or choose another "
                "directory:\n" + "\n".join(f"  {line}" for line in changed)
            )
    write_text(directory.config, yaml.safe_dump(recorded_config(config), sort_keys=False))
    return directory


def recorded_config(config: RunConfig) -> dict[str, Any]:
    """What config.yaml holds: the resolved config, with the words of the prompts in place of `template`, and the
    checkpoint that `best` was in place of that name."""
    plain = as_plain(config)
    if (start := config.pretrained_checkpoint.restore_from_path) is not None:
        plain["pretrained_checkpoint"]["restore_from_path"] = str(followed(Path(start)))
    plain["data"]["prompt"] = asdict(prompt_wording(config.data.prompt, config.rewards.template))
    return plain


def renewed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with today's `trainer.mapo.generation` in place of the two switches of earlier versions."""
    trainer = recorded.get("trainer")
    if not isinstance(trainer, dict) or not isinstance(mapo := trainer.get("mapo"), dict) or "generation" in mapo:
        return recorded
    kept = {name: value for name, value in mapo.items() if name not in ("asynchronous", "dynamic_sampling")}
    generation: dict[str, Any] = {"type": "synchronous"}
    if (mapo.get("asynchronous") or {}).get("max_staleness"):
        generation = {"type": "one_ahead"}
    elif mapo.get("dynamic_sampling") is not None:
        generation = {"type": "dynamic_sampling", **mapo["dynamic_sampling"]}
    return {**recorded, "trainer": {**trainer, "mapo": {**kept, "generation": generation}}}


def config_changes(before: dict[str, Any], now: dict[str, Any], *, length_too: bool = False) -> list[str]:
    """Differences of two recorded configs that change what is learned, a line each; `length_too` adds the length."""
    length_too = length_too or flat(before).get("model.optim.sched.name") == "cosine"
    free = [key for key in _MAY_CHANGE if not (length_too and key in _LENGTH)]
    return differences(renewed(before), now, free=free)


def this_command() -> str:
    """The command that started this process, in shell syntax."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def commit() -> str:
    """The commit that this package was run from, and whether the files differed; its version outside a checkout."""
    here = Path(__file__).parent
    asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        head, changed = (subprocess.run(one, cwd=here, capture_output=True, text=True, check=True) for one in asked)
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return head.stdout.strip() + (", with changes" if changed.stdout.strip() else "")
