"""The evidence page: results of the variants of each task, from the files that `examples/evidence.py` writes."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_mapo.reports.loading import load_run, series
from nemo_mapo.reports.markdown import table
from nemo_mapo.reports.theme import MISSING
from nemo_mapo.statistics import Estimate, Range, difference_in_words, estimate, paired_difference

BASELINE = "grpo"
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvidenceRun:
    """A run that was started, and its measurements if it finished."""

    task: str
    variant: str
    seed: int
    measured: Path | None
    """The file that `measure_run` wrote; None if the run has not finished."""
    run_dir: Path | None = None
    """Where its metrics are; None leaves it out of the table of the training."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column of the table."""

    header: str
    value: Callable[[Record], float | None]
    factor: float = 100.0
    digits: int = 1
    within: Range = "share"
    difference: Range = "difference"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _minus(name: str, before: str, after: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        pairs = zip(record[name][before], record[name][after], strict=True)
        return _mean([one - other for one, other in pairs if one is not None and other is not None])

    return value


def _opposed(name: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        pairs = zip(record[name]["full"], record["contradicts"], strict=True)
        return _mean([score for score, contradicts in pairs if contradicts])

    return value


ACCURACY = Measure(header="accuracy, %", value=lambda record: _mean(record["correct"]["full"]))
TRUTH = Measure(header="probability of the truth, %", value=lambda record: _mean(record["truth"]["full"]))
MEASURES = (
    ACCURACY,
    Measure(header="accuracy where the prior is wrong, %", value=_opposed("correct")),
    TRUTH,
    Measure(header="the same where the prior is wrong, %", value=_opposed("truth")),
    Measure(header="usual word said, %", value=lambda record: _mean(record["usual"])),
    Measure(header="late listening used, points", value=_minus("correct", "full", "deaf_late"), within="difference"),
    Measure(header="the same, probability, points", value=_minus("truth", "full", "deaf_late"), within="difference"),
    Measure(header="only late hears, %", value=lambda record: _mean(record["correct"]["only_late"])),
    Measure(header="silence, %", value=lambda record: _mean(record["correct"]["silence"])),
    Measure(header="late mass", value=lambda record: _mean(record["late_mass"]), factor=1.0, digits=3),
    Measure(header="tokens", value=lambda record: _mean([float(count) for count in record["tokens"]]), factor=1.0,
            within="positive", difference="real"),
)  # fmt: skip


def _quarter(name: str, *, last: bool = False) -> Callable[[Record], float | None]:
    def value(metrics: Record) -> float | None:
        values = series(metrics["steps"], name).values.tolist()
        size = max(1, len(values) // 4)
        return _mean(values[-size:] if last else values[:size])

    return value


def _quarters(name: str, header: str, unit: str = "", **options: Any) -> tuple[Measure, Measure]:
    first = Measure(header=f"{header}, first quarter{unit}", value=_quarter(name), **options)
    return first, Measure(header=f"last quarter{unit}", value=_quarter(name, last=True), **options)


TRAINING = (
    *_quarters("rollout/accuracy", "accuracy of rollouts", ", %"),
    *_quarters("mapo/audio_mass_late", "late mass", factor=1.0, digits=3),
    *_quarters("rollout/completion_tokens", "tokens", factor=1.0, within="positive", difference="real"),
)
"""Of a run's metrics: its records by step, under "steps"."""


def evidence_markdown(runs: Sequence[EvidenceRun], starts: Mapping[str, Path]) -> str:
    """Tables by task: means over seeds, differences from GRPO with the same seed, and what they show.

    Args:
        runs: every run that was started; those without measurements are counted and named.
        starts: measurements of the policy that a task's runs start from.
    """
    tasks = list(dict.fromkeys(run.task for run in runs))
    return "\n\n".join(_task(task, [run for run in runs if run.task == task], starts.get(task)) for task in tasks)


def _task(task: str, runs: Sequence[EvidenceRun], start: Path | None) -> str:
    measured: dict[str, dict[int, Record]] = {}
    for run in runs:
        if run.measured is not None:
            measured.setdefault(run.variant, {})[run.seed] = _read(run.measured)
    unfinished = [f"{run.variant} seed {run.seed}" for run in runs if run.measured is None]
    parts = [f"### {task}"]
    if start is not None:
        parts.append(admission(_read(start)))
    if not measured:
        return "\n\n".join([*parts, "No run is finished."])
    parts += _tables(measured, MEASURES)
    if BASELINE in measured:
        base = measured[BASELINE]
        lines = [line for name in measured if name != BASELINE for line in _settled(name, measured[name], base)]
        parts.append("\n".join(f"- {line}" for line in lines))
    trained: dict[str, dict[int, Record]] = {}
    for run in runs:
        if run.measured is not None and run.run_dir is not None:
            trained.setdefault(run.variant, {})[run.seed] = {"steps": load_run(run.run_dir).metrics}
    if trained:
        parts.append("While they were trained:")
        parts += _tables(trained, TRAINING)
    if unfinished:
        parts.append(f"Started and not finished: {', '.join(unfinished)}.")
    return "\n\n".join(parts)


def _tables(found: Mapping[str, Mapping[int, Record]], measures: Sequence[Measure]) -> list[str]:
    """Levels by variant, and differences from the baseline if it is among them; without measures nobody has."""
    shown = [
        one
        for one in measures
        if any(one.value(record) is not None for seeds in found.values() for record in seeds.values())
    ]
    header = ["", "seeds", *(measure.header for measure in shown)]
    rows = [
        [name, str(len(seeds)), *(_level(_values(seeds, measure), measure) for measure in shown)]
        for name, seeds in found.items()
    ]
    if BASELINE not in found:
        return [table(header, rows)]
    base = found[BASELINE]
    gaps = [
        [name, str(len(base.keys() & seeds.keys())), *(_gap(seeds, base, one) for one in shown)]
        for name, seeds in found.items()
        if name != BASELINE
    ]
    return [table(header, rows), "Minus GRPO, same seed: mean and 95 % t-interval over the seeds.", table(header, gaps)]


def admission(record: Record) -> str:
    """Whether the task can test late listening, judged by the policy that its runs start from."""
    gaps = [one - other for one, other in zip(record["correct"]["full"], record["correct"]["deaf_late"], strict=True)]
    used = estimate(gaps)
    assert used is not None
    alone, full = _mean(record["correct"]["only_late"]), _mean(record["correct"]["full"])
    text = (
        f"Start: accuracy {_percent(full)}, with late tokens deaf {_percent(_mean(record['correct']['deaf_late']))}, "
        f"when only late tokens hear {_percent(alone)}, with silence {_percent(_mean(record['correct']['silence']))} "
        f"(chance {_percent(record['chance'])}). "
    )
    if used.low is not None and used.low > 0:
        return text + "Late listening is used: the task can test it."
    return text + "Late listening is not used: the task cannot test whether promoting it helps."


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has no measurements ({error}); delete it to measure the run again") from error
    return record


def _values(seeds: Mapping[int, Record], measure: Measure) -> dict[int, float]:
    found = {seed: measure.value(record) for seed, record in seeds.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _level(values: Mapping[int, float], measure: Measure) -> str:
    found = estimate([*values.values()], measure.within)
    return _shown(found, measure, "")


def _gap(seeds: Mapping[int, Record], base: Mapping[int, Record], measure: Measure) -> str:
    return _shown(_difference(seeds, base, measure), measure, "+")


def _difference(seeds: Mapping[int, Record], base: Mapping[int, Record], measure: Measure) -> Estimate | None:
    return paired_difference(_values(seeds, measure), _values(base, measure), measure.difference)


def _settled(name: str, seeds: Mapping[int, Record], base: Mapping[int, Record]) -> list[str]:
    lines = []
    for measure, words in ((ACCURACY, "accuracy"), (TRUTH, "probability of the truth")):
        found = _difference(seeds, base, measure)
        if found is not None and found.low is not None and found.high is not None:
            lines.append(f"{name}, {words} against GRPO: {difference_in_words(100 * found.low, 100 * found.high)}.")
    return lines


def _shown(found: Estimate | None, measure: Measure, sign: str) -> str:
    if found is None:
        return MISSING
    scaled, layout = found.times(measure.factor), f"{sign}.{measure.digits}f"
    interval = "" if scaled.low is None or scaled.high is None else f" [{scaled.low:{layout}}, {scaled.high:{layout}}]"
    return f"{scaled.mean:{layout}}{interval}"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f} %"
