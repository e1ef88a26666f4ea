"""What a run came to: the few figures that cards, terminal summary and ablation table share."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_mapo.reports.loading import Record, RunFiles, is_number, section, series

DEFAULT_CHANCE = 0.25
"""Accuracy of guessing when no rollout says how many choices there were: four choices, as in the embedded corpus."""

EDGE_SHARE = 0.1
"""Part of a training curve, at either end, that stands for its start and its end: single steps are too noisy."""

MIN_EDGE_STEPS = 3
"""Fewest steps averaged at either end of a training curve."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure before and after training."""

    start: float | None
    end: float | None
    source: str
    """Where both ends were measured: "test", "validation" or "training"; empty when nowhere."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Start and end of a run; shares are 0..1, None is not measured."""

    accuracy: Change
    accuracy_standard_error: float | None
    accuracy_silent: Change
    """Accuracy with the audio replaced by silence."""
    audio_mass_late: Change
    """Attention on the audio over the last third of a completion."""
    completion_tokens: Change
    reasoning_words: Change
    seconds_total: float | None
    peak_rss_gb: float | None
    chance: float


def outcome(files: RunFiles) -> Outcome:
    """Gather the figures: from the test split if measured there, else validation, else (mass, length) training."""
    test = section(files.run, "test")
    return Outcome(
        accuracy=_change(files, "accuracy", None),
        accuracy_standard_error=_number(test, "standard_error"),
        accuracy_silent=_change(files, "accuracy_silent", None),
        audio_mass_late=_change(files, "audio_mass_late", "mapo/audio_mass_late"),
        completion_tokens=_change(files, "completion_tokens", "rollout/completion_tokens"),
        reasoning_words=_change(files, "reasoning_words", "rollout/reasoning_words"),
        seconds_total=_seconds_total(files),
        peak_rss_gb=_number(files.run, "peak_rss_gb"),
        chance=chance_accuracy(files.rollouts),
    )


def chance_accuracy(rollouts: Iterable[Record]) -> float:
    """Accuracy of guessing: the mean of 1 / number of choices over rollouts, `DEFAULT_CHANCE` without any."""
    shares = [1 / len(rollout["choices"]) for rollout in rollouts if rollout.get("choices")]
    return statistics.fmean(shares) if shares else DEFAULT_CHANCE


def edge_steps(length: int) -> int:
    """How many steps at either end of a training curve of `length` steps are averaged."""
    return min(length, max(MIN_EDGE_STEPS, round(EDGE_SHARE * length)))


def _change(files: RunFiles, name: str, training_key: str | None) -> Change:
    test = section(files.run, "test")
    if is_number(test.get(name)):
        return Change(start=_number(test, f"start_{name}"), end=float(test[name]), source="test")
    held_out = series(files.metrics, f"val/{name}")
    if len(held_out):
        # A single validation is the start if it came before any training, otherwise the end.
        has_start = len(held_out) > 1 or held_out.steps[0] == 0
        has_end = len(held_out) > 1 or held_out.steps[0] > 0
        return Change(
            start=held_out.first() if has_start else None,
            end=held_out.last() if has_end else None,
            source="validation",
        )
    training = series(files.metrics, training_key) if training_key else None
    if training is None or not len(training):
        return Change(start=None, end=None, source="")
    edge = edge_steps(len(training))
    return Change(start=training.first(edge), end=training.last(edge), source="training")


def _seconds_total(files: RunFiles) -> float | None:
    stated = _number(files.run, "seconds_total")
    if stated is not None:
        return stated
    steps = series(files.metrics, "timing/step_seconds")
    return float(steps.values.sum()) if len(steps) else None


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return float(value) if is_number(value) else None
