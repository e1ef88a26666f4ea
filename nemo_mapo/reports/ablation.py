"""Runs of an ablation by variant and seed, and their tables: means over seeds, differences to the baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_mapo.reports import theme
from nemo_mapo.reports.estimates import Estimate, estimate, paired_difference, paired_ratio
from nemo_mapo.reports.loading import RunFiles, load_run
from nemo_mapo.reports.outcome import Outcome, outcome
from nemo_mapo.reports.theme import MISSING, Colour

DEFAULT_BASELINE = "GRPO"

Cell = tuple[str, str]
"""A figure and its interval, as text."""

Table = tuple[list[str], list[list[Cell]]]
"""Header and rows."""


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """One finished run of an ablation."""

    variant: str
    """As it should stand in the table, e.g. "GRPO" or "mask only"."""
    seed: int
    run_dir: Path


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One column of the table."""

    header: str
    unit: str
    digits: int
    factor: float
    """From the unit of `value` to the one shown."""
    value: Callable[[Outcome], float | None]


def _gain(found: Outcome) -> float | None:
    start, end = found.accuracy.start, found.accuracy.end
    return None if start is None or end is None else end - start


ACCURACY = Measure(header="held-out accuracy", unit="%", digits=1, factor=100.0, value=lambda found: found.accuracy.end)
SILENT = Measure(
    header="accuracy with silence", unit="%", digits=1, factor=100.0, value=lambda found: found.accuracy_silent.end
)
LATE_MASS = Measure(
    header="late audio mass", unit="", digits=3, factor=1.0, value=lambda found: found.audio_mass_late.end
)
TOKENS = Measure(header="length", unit="tokens", digits=1, factor=1.0, value=lambda found: found.completion_tokens.end)
SECONDS = Measure(header="time", unit="s", digits=0, factor=1.0, value=lambda found: found.seconds_total)

MEASURES = (
    ACCURACY,
    Measure(header="gain over start", unit="points", digits=1, factor=100.0, value=_gain),
    SILENT,
    LATE_MASS,
    TOKENS,
    SECONDS,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs by variant (in the order given) and seed, read from their directories."""

    variants: Mapping[str, Mapping[int, tuple[RunFiles, Outcome]]]
    baseline: str | None
    """Name of the baseline among the variants, None when it was not run."""

    def values(self, variant: str, measure: Measure) -> dict[int, float]:
        """The measure of every seed that has it, in the unit shown."""
        found = {seed: measure.value(result) for seed, (_, result) in self.variants[variant].items()}
        return {seed: measure.factor * value for seed, value in found.items() if value is not None}

    def colour(self, variant: str) -> Colour:
        """The variant's colour, the same on every chart; the baseline has the neutral one."""
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
        parts += [_markdown_table(*difference_table(comparison)), difference_note(comparison.baseline)]
    return "\n\n".join(parts) + "\n"


def summary_note(comparison: Comparison) -> str:
    """How to read the table of means."""
    note = "Mean ± standard deviation over seeds; in brackets the 95 % t-interval of the mean."
    return note + split_note(comparison)


def difference_note(baseline: str) -> str:
    """How to read the table of differences."""
    return (
        f"Difference to {baseline} with the same seed, mean and 95 % t-interval over the shared seeds. "
        "An interval that contains 0 (for a ratio, 1) shows no difference."
    )


def split_note(comparison: Comparison) -> str:
    """On which split accuracy was measured, with a warning when it was not one and the same."""
    sources = {result.accuracy.source for seeds in comparison.variants.values() for _, result in seeds.values()} - {""}
    if len(sources) == 1:
        return f" Accuracy on the {sources.pop()} split."
    return f" Beware: accuracy comes from different splits ({', '.join(sorted(sources))})." if sources else ""


def summary_table(comparison: Comparison) -> Table:
    """Every measure by variant: mean, standard deviation and interval over seeds."""
    header = ["variant", "seeds", *(_header(measure) for measure in MEASURES)]
    rows = []
    for variant, seeds in comparison.variants.items():
        cells = [_cell(estimate([*comparison.values(variant, measure).values()]), measure) for measure in MEASURES]
        rows.append([(variant, ""), (str(len(seeds)), ""), *cells])
    return header, rows


def difference_table(comparison: Comparison) -> Table:
    """Every measure minus the baseline's with the same seed; the comparison must have a baseline."""
    assert comparison.baseline is not None
    compared = [measure for measure in MEASURES if measure.value is not _gain]
    header = [f"minus {comparison.baseline}", "shared seeds"]
    header += [_header(measure).replace("%", "points") for measure in compared] + ["late audio mass, ratio"]
    rows = []
    for variant, seeds in comparison.variants.items():
        if variant == comparison.baseline:
            continue
        shared = len(seeds.keys() & comparison.variants[comparison.baseline].keys())
        pairs = {
            measure: (comparison.values(variant, measure), comparison.values(comparison.baseline, measure))
            for measure in (*compared, LATE_MASS)
        }
        cells = [_signed(paired_difference(*pairs[measure]), measure.digits) for measure in compared]
        rows.append([(variant, ""), (str(shared), ""), *cells, _ratio(paired_ratio(*pairs[LATE_MASS]))])
    return header, rows


def _header(measure: Measure) -> str:
    return f"{measure.header}, {measure.unit}" if measure.unit else measure.header


def _cell(found: Estimate | None, measure: Measure) -> Cell:
    if found is None:
        return MISSING, ""
    digits = measure.digits
    spread = "" if found.deviation is None else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread}", _interval(found, f".{digits}f")


def _signed(found: Estimate | None, digits: int) -> Cell:
    return (MISSING, "") if found is None else (f"{found.mean:+.{digits}f}", _interval(found, f"+.{digits}f"))


def _ratio(found: Estimate | None) -> Cell:
    return (MISSING, "") if found is None else (f"{found.mean:.2f}", _interval(found, ".2f"))


def _interval(found: Estimate, layout: str) -> str:
    return "" if found.low is None or found.high is None else f"[{found.low:{layout}}, {found.high:{layout}}]"


def _markdown_table(header: list[str], rows: list[list[Cell]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _markdown_cell(cell: Cell) -> str:
    return " ".join(part for part in cell if part).replace("|", "\\|")
