"""Reading a run directory back: metrics, profiles, sample rollouts, config and run facts."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from nemo_mapo.config.yaml_files import read_recorded

Record = dict[str, Any]
"""One JSON object of a run file."""

METRICS_FILE = "metrics.jsonl"
PROFILES_FILE = "profiles.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
TEST_FILE = "test.jsonl"
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"


class RunFileError(ValueError):
    """A run file that cannot be read; the message names the file and, if it is one line's fault, the line."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Everything a report is made from."""

    run_dir: Path
    metrics: tuple[Record, ...]
    """One record per step, in order; if a resumed run wrote a step twice, the later record."""
    profiles: tuple[Record, ...]
    """Signals by relative position in the completion, one record per (step, label)."""
    rollouts: tuple[Record, ...]
    test: tuple[Record, ...]
    """One record per question of the test split: right or wrong, at the start and at the end; empty without a test."""
    config_text: str
    config: Record
    run: Record
    notes: tuple[str, ...]
    """What a reader of the page should know about the files, e.g. that one is missing or truncated."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The finite values of one metric over training steps."""

    steps: Int[NDArray[np.int64], " step"]
    values: Float[NDArray[np.float64], " step"]

    def __len__(self) -> int:
        return len(self.steps)

    def first(self, count: int = 1) -> float:
        """Mean of the first `count` values."""
        return float(self.values[:count].mean())

    def last(self, count: int = 1) -> float:
        """Mean of the last `count` values."""
        return float(self.values[-count:].mean())


def load_run(run_dir: Path) -> RunFiles:
    """Read all run files of `run_dir`.

    Only `metrics.jsonl` is required. A last line that has no newline and does not parse is what a killed process leaves
    behind: it is dropped and noted.

    Raises:
        RunFileError: no such directory, no metrics file, or a line that is not a record of its file.
    """
    if not run_dir.is_dir():
        raise RunFileError(f"{run_dir} is not a directory; give a run directory, the one that holds {METRICS_FILE}")
    if not (run_dir / METRICS_FILE).is_file():
        raise RunFileError(f"{run_dir} holds no {METRICS_FILE}; is it a run directory, and has the run started?")
    notes: list[str] = []
    metrics = _read_jsonl(run_dir / METRICS_FILE, notes)
    rollouts = _read_jsonl(run_dir / ROLLOUTS_FILE, notes)
    test = _read_jsonl(run_dir / TEST_FILE, notes) if (run_dir / TEST_FILE).is_file() else []
    config_text, config = _read_config(run_dir / CONFIG_FILE, notes)
    # Supervised training writes profiles only if it has a test split.
    expected = not is_supervised(config) or (run_dir / PROFILES_FILE).is_file()
    profiles = _read_jsonl(run_dir / PROFILES_FILE, notes) if expected else []
    _check_metrics(run_dir / METRICS_FILE, metrics)
    return RunFiles(
        run_dir=run_dir,
        metrics=tuple(sorted(_last_wins(metrics, ("step",)), key=lambda record: int(record["step"]))),
        profiles=tuple(_last_wins(profiles, ("step", "label"))),
        rollouts=tuple(_last_wins(rollouts, ("step", "split", "id", "text"))),
        test=tuple(_last_wins(test, ("id",))),
        config_text=config_text,
        config=config,
        run=_read_run(run_dir / RUN_FILE, notes),
        notes=tuple(notes),
    )


def series(records: Iterable[Record], key: str) -> Series:
    """Collect metric `key` over the records that have it; null, NaN and infinite values are left out."""
    found = [(record["step"], record[key]) for record in records if is_number(record.get(key))]
    return Series(
        steps=np.array([step for step, _ in found], dtype=np.int64),
        values=np.array([value for _, value in found], dtype=np.float64),
    )


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number (JSON's true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping under `name`, or an empty one."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def is_supervised(config: Mapping[str, Any]) -> bool:
    """Whether a run's config is that of supervised training (examples/sft.py)."""
    return bool(section(section(config, "trainer"), "sft"))


def _read_jsonl(path: Path, notes: list[str]) -> list[Record]:
    if not path.is_file():
        notes.append(f"{path.name} is missing; what it would show is left out.")
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number == len(lines):
                notes.append(f"{path.name} line {number} is incomplete and left out: its writer was interrupted.")
                break
            raise RunFileError(f"{path} line {number} is not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise RunFileError(f"{path} line {number} should be a JSON object, found {type(record).__name__}")
        if not isinstance(record.get("step"), int):
            raise RunFileError(f"{path} line {number} has no whole-number 'step', found {record.get('step')!r}")
        records.append(record)
    return records


def recorded(runs: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """The values that runs recorded under `name`, e.g. their commits: each once, in order, without missing ones."""
    return list(dict.fromkeys(str(run[name]) for run in runs if run.get(name)))


def _check_metrics(path: Path, records: Sequence[Record]) -> None:
    for record in records:
        for key, value in record.items():
            if value is not None and not isinstance(value, int | float):
                raise RunFileError(f"{path}, step {record['step']}: {key} should be a number, found {value!r}")


def _last_wins(records: Iterable[Record], keys: tuple[str, ...]) -> list[Record]:
    kept: dict[tuple[Any, ...], Record] = {}
    for record in records:
        kept[tuple(record.get(key) for key in keys)] = record
    return list(kept.values())


def _read_config(path: Path, notes: list[str]) -> tuple[str, Record]:
    if not path.is_file():
        notes.append(f"{path.name} is missing; checks that need the config use the defaults.")
        return "", {}
    try:
        return path.read_text(encoding="utf-8"), read_recorded(path)
    except ValueError as error:
        raise RunFileError(str(error)) from error


def _read_run(path: Path, notes: list[str]) -> Record:
    if not path.is_file():
        notes.append(f"{path.name} is missing: the run has not finished, or was stopped.")
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunFileError(f"{path} line {error.lineno} is not valid JSON: {error.msg}") from error
    if not isinstance(run, dict):
        raise RunFileError(f"{path} should hold a JSON object, found {type(run).__name__}")
    return run
