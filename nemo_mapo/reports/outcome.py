"""The outcome of a run: the few numbers that cards, terminal summary and ablation table share."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_mapo.reports.loading import Record, RunFiles, is_number, section, series
from nemo_mapo.statistics import Interval, paired_share_interval, share_interval

DEFAULT_CHANCE = 0.25
"""Accuracy of guessing if no rollout records its choices: four choices, as in the embedded corpus."""

EDGE_SHARE = 0.1
"""Share of a training curve at either end whose mean counts as its start or its end: single steps are too noisy."""

MIN_EDGE_STEPS = 3
"""Fewest steps averaged at either end of a training curve."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric before and after training."""

    start: float | None
    end: float | None
    source: str
    """Where both were measured: "test", "validation" or "training"; empty if they were not."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Metrics at the start and end of a run; shares are 0..1, None is not measured."""

    accuracy: Change
    accuracy_interval: Interval | None
    """Interval of the final accuracy, over its questions."""
    gain: Interval | None
    """Final accuracy minus that of the start, paired over the questions of the test split."""
    questions: int | None
    """Number of questions behind the final accuracy."""
    accuracy_silent: Change
    """Accuracy with the audio replaced by silence."""
    silent_interval: Interval | None
    audio_mass_late: Change
    """Attention to the audio over the last third of a completion."""
    completion_tokens: Change
    reasoning_words: Change
    seconds_total: float | None
    peak_rss_gb: float | None
    chance: float


def outcome(files: RunFiles) -> Outcome:
    """Gather the numbers: from the test split if measured there, else validation, else (mass, length) training."""
    accuracy, silent = (_change(files, name, None) for name in ("accuracy", "accuracy_silent"))
    questions = _questions(files, accuracy.source)
    return Outcome(
        accuracy=accuracy,
        accuracy_interval=_interval(accuracy, questions),
        gain=question_difference(files.test, "correct", files.test, "start_correct"),
        questions=questions,
        accuracy_silent=silent,
        silent_interval=_interval(silent, questions),
        audio_mass_late=_change(files, "audio_mass_late", "mapo/audio_mass_late"),
        completion_tokens=_change(files, "completion_tokens", "rollout/completion_tokens"),
        reasoning_words=_change(files, "reasoning_words", "rollout/reasoning_words"),
        seconds_total=_seconds_total(files),
        peak_rss_gb=_number(files.run, "peak_rss_gb"),
        chance=chance_accuracy(files.test or files.rollouts),
    )


def question_difference(
    first: Sequence[Record], first_key: str, second: Sequence[Record], second_key: str
) -> Interval | None:
    """Difference of two accuracies over the same questions, paired; None if the questions are not the same."""
    before = {record["id"]: record.get(second_key) for record in second}
    if not first or {record["id"] for record in first} != before.keys():
        return None
    pairs = [(record.get(first_key), before[record["id"]]) for record in first]
    return paired_share_interval(pairs.count((1, 0)), pairs.count((0, 1)), len(pairs))


def chance_accuracy(records: Iterable[Record]) -> float:
    """Accuracy of guessing: the mean of 1 / number of choices over rollouts or questions, `DEFAULT_CHANCE` without any.

    `choices` is the list of them in a rollout's record, and their number in a test question's.
    """
    counts = [found if isinstance(found, int) else len(found) for record in records if (found := record.get("choices"))]
    shares = [1 / count for count in counts]
    return statistics.fmean(shares) if shares else DEFAULT_CHANCE


def edge_steps(length: int) -> int:
    """Number of steps to average at either end of a training curve of `length` steps."""
    return min(length, max(MIN_EDGE_STEPS, round(EDGE_SHARE * length)))


def _change(files: RunFiles, name: str, training_key: str | None) -> Change:
    test = section(files.run, "test")
    if is_number(test.get(name)):
        return Change(start=_number(test, f"start_{name}"), end=float(test[name]), source="test")
    held_out = series(files.metrics, f"val/{name}")
    if len(held_out):
        # A single validation is the start if it is of step 0, otherwise the end.
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


def _questions(files: RunFiles, source: str) -> int | None:
    """Number of questions behind the final accuracy."""
    if source == "test":
        count = _number(section(files.run, "test"), "samples")
    else:
        validated = series(files.metrics, "val/questions")
        count = validated.last() if source == "validation" and len(validated) else None
    return None if count is None else int(count)


def _interval(change: Change, questions: int | None) -> Interval | None:
    share = change.end
    return None if share is None or not questions else share_interval(round(share * questions), questions)


def _seconds_total(files: RunFiles) -> float | None:
    stated = _number(files.run, "seconds_total")
    if stated is not None:
        return stated
    steps = series(files.metrics, "timing/step_seconds")
    return float(steps.values.sum()) if len(steps) else None


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return float(value) if is_number(value) else None
