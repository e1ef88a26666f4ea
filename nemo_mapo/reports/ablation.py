"""Runs of an ablation by variant and seed, and their tables: means over seeds, differences to the baseline."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_mapo.reports import theme
from nemo_mapo.reports.loading import RunFiles, load_run
from nemo_mapo.reports.markdown import table
from nemo_mapo.reports.outcome import Outcome, chance_accuracy, outcome, question_difference
from nemo_mapo.reports.theme import MISSING, Colour
from nemo_mapo.statistics import (
    Estimate,
    Range,
    difference_in_words,
    estimate,
    paired_difference,
    paired_ratio,
)

DEFAULT_BASELINE = "GRPO"

Cell = tuple[str, str]
"""A number and its interval, as text."""

Table = tuple[list[str], list[list[Cell]]]
"""Header and rows."""


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """One finished run of an ablation."""

    variant: str
    """Name in the table, e.g. "GRPO" or "mask only"."""
    seed: int
    run_dir: Path


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One column of the table."""

    header: str
    unit: str
    digits: int
    factor: float
    """Converts the unit of `value` to the one shown."""
    value: Callable[[Outcome], float | None]
    within: Range
    """Range of the value."""
    difference: Range = "real"
    """Range of a difference of two values."""
    question: str = ""
    """Key of test.jsonl with its value for each question, if it is an accuracy."""


def _gain(found: Outcome) -> float | None:
    start, end = found.accuracy.start, found.accuracy.end
    return None if start is None or end is None else end - start


ACCURACY = Measure(header="held-out accuracy", unit="%", digits=1, factor=100.0, within="share",
                   difference="difference", question="correct", value=lambda found: found.accuracy.end)  # fmt: skip
GAIN = Measure(header="gain over start", unit="points", digits=1, factor=100.0, within="difference", value=_gain)
SILENT = Measure(header="accuracy with silence", unit="%", digits=1, factor=100.0, within="share",
                 difference="difference", question="silent", value=lambda found: found.accuracy_silent.end)  # fmt: skip
LATE_MASS = Measure(header="late audio mass", unit="", digits=3, factor=1.0, within="share", difference="difference",
                    value=lambda found: found.audio_mass_late.end)  # fmt: skip
TOKENS = Measure(header="length", unit="tokens", digits=1, factor=1.0, within="positive",
                 value=lambda found: found.completion_tokens.end)  # fmt: skip
SECONDS = Measure(header="time", unit="s", digits=0, factor=1.0, within="positive",
                  value=lambda found: found.seconds_total)  # fmt: skip

MEASURES = (ACCURACY, GAIN, SILENT, LATE_MASS, TOKENS, SECONDS)
COMPARED = tuple(measure for measure in MEASURES if measure is not GAIN)
"""Without gains: all variants share one start, so their gains differ by as much as their accuracies."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs by variant (in the order given) and seed, read from their directories."""

    variants: Mapping[str, Mapping[int, tuple[RunFiles, Outcome]]]
    baseline: str | None
    """Name of the baseline among the variants; None if it was not run."""

    def values(self, variant: str, measure: Measure) -> dict[int, float]:
        """The measure by seed, for seeds that have it."""
        found = {seed: measure.value(result) for seed, (_, result) in self.variants[variant].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, variant: str, measure: Measure) -> Estimate | None:
        """Mean and interval over the seeds."""
        return estimate([*self.values(variant, measure).values()], measure.within)

    def difference(self, variant: str, measure: Measure) -> Estimate | None:
        """Variant minus baseline over the seeds that both have; with one such seed, over its test questions."""
        assert self.baseline is not None
        found = paired_difference(
            self.values(variant, measure), self.values(self.baseline, measure), measure.difference
        )
        if found is None or found.count > 1 or not measure.question:
            return found
        (seed,) = self.variants[variant].keys() & self.variants[self.baseline].keys()
        first, second = (self.variants[name][seed][0].test for name in (variant, self.baseline))
        over = question_difference(first, measure.question, second, measure.question)
        return found if over is None else replace(found, low=over.low, high=over.high)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        files = [files for seeds in self.variants.values() for files, _ in seeds.values()]
        return chance_accuracy(
            [record for one in files for record in one.test] or [record for one in files for record in one.rollouts]
        )

    @property
    def start(self) -> float | None:
        """Accuracy of the policy that training started from, mean over the runs that measured it."""
        found = [result.accuracy.start for seeds in self.variants.values() for _, result in seeds.values()]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known else None

    def colour(self, variant: str) -> Colour:
        """The variant's colour, the same on every chart; the baseline's is neutral."""
        if variant == self.baseline:
            return theme.LINE
        others = [name for name in self.variants if name != self.baseline]
        return theme.RUNS[others.index(variant) % len(theme.RUNS)]


def read_runs(rows: Sequence[AblationRun], *, baseline: str = DEFAULT_BASELINE) -> Comparison:
    """Read the run directories of an ablation; by variant and seed.

    Raises:
        ValueError: no rows, or a variant has a seed twice.
        RunFileError: as `load_run`.
    """
    if not rows:
        raise ValueError("an ablation needs at least one finished run")
    variants: dict[str, dict[int, tuple[RunFiles, Outcome]]] = {}
    for row in rows:
        seeds = variants.setdefault(row.variant, {})
        if row.seed in seeds:
            raise ValueError(f"variant {row.variant!r} has seed {row.seed} twice; the second is {row.run_dir}")
        files = load_run(row.run_dir)
        seeds[row.seed] = (files, outcome(files))
    found = [name for name in variants if name.casefold() == baseline.casefold()]
    return Comparison(variants=variants, baseline=found[0] if found else None)


def comparison_markdown(comparison: Comparison) -> str:
    """The two tables in Markdown, each with a line on how to read it."""
    parts = [_markdown_table(*summary_table(comparison)), summary_note(comparison)]
    if comparison.baseline is not None:
        parts += [_markdown_table(*difference_table(comparison)), difference_note(comparison)]
        parts += ["\n".join(f"- {sentence}" for sentence in readings(comparison))]
    return "\n\n".join(parts) + "\n"


def summary_note(comparison: Comparison) -> str:
    """How to read the table of means."""
    start = "" if comparison.start is None else f", the start {100 * comparison.start:.1f} %"
    return (
        "Mean ± standard deviation over seeds; in brackets the 95 % t-interval of the mean, on a scale that keeps it "
        f"within the possible range. Chance is {100 * comparison.chance:.1f} %{start}.{split_note(comparison)}"
    )


def difference_note(comparison: Comparison) -> str:
    """How to read the table of differences."""
    return (
        f"Difference from {comparison.baseline} with the same seed, mean and 95 % t-interval over the shared seeds; "
        "with one shared seed, accuracies have the interval over its test questions, which does not include the "
        "variation between seeds. An interval that contains 0 (for a ratio, 1) does not show that there is no "
        "difference; it shows which differences are excluded."
    )


def readings(comparison: Comparison) -> list[str]:
    """What the difference in accuracy from the baseline shows, a sentence for each variant that has an interval."""
    sentences = []
    for variant in comparison.variants:
        found = None if variant == comparison.baseline else comparison.difference(variant, ACCURACY)
        if found is not None and found.low is not None and found.high is not None:
            words = difference_in_words(100 * found.low, 100 * found.high)
            sentences.append(f"Accuracy of {variant} against {comparison.baseline}: {words}.")
    return sentences


def split_note(comparison: Comparison) -> str:
    """The split on which accuracy was measured, or a warning if it was not the same for all runs."""
    sources = {result.accuracy.source for seeds in comparison.variants.values() for _, result in seeds.values()} - {""}
    if len(sources) == 1:
        return f" Accuracy on the {sources.pop()} split."
    return f" Warning: accuracy is from different splits ({', '.join(sorted(sources))})." if sources else ""


def summary_table(comparison: Comparison) -> Table:
    """Every measure by variant: mean, standard deviation and interval over seeds."""
    header = ["variant", "seeds", *(_header(measure) for measure in MEASURES)]
    rows = []
    for variant, seeds in comparison.variants.items():
        cells = [_cell(comparison.estimate(variant, measure), measure) for measure in MEASURES]
        rows.append([(variant, ""), (str(len(seeds)), ""), *cells])
    return header, rows


def difference_table(comparison: Comparison) -> Table:
    """Every measure minus the baseline's with the same seed; the comparison must have a baseline."""
    assert comparison.baseline is not None
    header = [f"minus {comparison.baseline}", "shared seeds"]
    header += [_header(measure).replace("%", "points") for measure in COMPARED] + ["late audio mass, ratio"]
    rows = []
    for variant, seeds in comparison.variants.items():
        if variant == comparison.baseline:
            continue
        shared = len(seeds.keys() & comparison.variants[comparison.baseline].keys())
        cells = [_signed(comparison.difference(variant, measure), measure) for measure in COMPARED]
        ratio = paired_ratio(*(comparison.values(name, LATE_MASS) for name in (variant, comparison.baseline)))
        rows.append([(variant, ""), (str(shared), ""), *cells, _ratio(ratio)])
    return header, rows


def _header(measure: Measure) -> str:
    return f"{measure.header}, {measure.unit}" if measure.unit else measure.header


def _cell(found: Estimate | None, measure: Measure) -> Cell:
    if found is None:
        return MISSING, ""
    digits, found = measure.digits, found.times(measure.factor)
    spread = "" if found.deviation is None else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread}", _interval(found, f".{digits}f")


def _signed(found: Estimate | None, measure: Measure) -> Cell:
    if found is None:
        return MISSING, ""
    layout, scaled = f"+.{measure.digits}f", found.times(measure.factor)
    return f"{scaled.mean:{layout}}", _interval(scaled, layout)


def _ratio(found: Estimate | None) -> Cell:
    return (MISSING, "") if found is None else (f"{found.mean:.2f}", _interval(found, ".2f"))


def _interval(found: Estimate, layout: str) -> str:
    return "" if found.low is None or found.high is None else f"[{found.low:{layout}}, {found.high:{layout}}]"


def _markdown_table(header: list[str], rows: list[list[Cell]]) -> str:
    return table(header, [[" ".join(filter(None, cell)).replace("|", "\\|") for cell in row] for row in rows])
