"""Tables of scores by category, as the benchmarks' papers print them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from nemo_mapo.config.evaluation import StatisticsConfig
from nemo_mapo.evaluation.benchmarks.items import Benchmark, Item
from nemo_mapo.evaluation.benchmarks.scoring import Score
from nemo_mapo.statistics import PairedComparison, difference_in_words, score_interval

OVERALL = "all"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group of items."""

    group: tuple[str, ...]
    items: int
    score: float
    """Mean over all its items; missing and unparsable ones count 0."""
    low: float
    high: float
    """Confidence interval of `score`."""
    missing: int
    unparsable: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """Groups of one kind."""

    fields: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything about one set of predictions."""

    benchmark: str
    overall: Row
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    version: str
    """The published version of the items, by the contents of the file."""
    official_string_match: float | None
    """Score by `official_string_match`, over the same items; None if the benchmark's own script has another rule."""
    chance: float | None
    """Expected score of guessing among the choices; None without items that have choices."""

    def as_plain(self) -> dict[str, Any]:
        """The content of results.json."""
        return asdict(self)

    def markdown(self) -> str:
        """One table per kind of group, the overall score first."""
        parts = [f"# {self.benchmark}", _markdown(("",), (self.overall,))]
        parts += [_markdown(table.fields, table.rows) for table in self.tables]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes)]).rstrip("\n") + "\n"


def build_results(
    benchmark: Benchmark, scores: Sequence[Score], statistics: StatisticsConfig, *, notes: Sequence[str] = ()
) -> Results:
    """Tabulate one score per item of the benchmark, in its order; `notes` are printed for the reader."""
    pairs = list(zip(benchmark.items, scores, strict=True))
    assert all(item.id == score.id for item, score in pairs)
    tables = tuple(
        Table(fields=fields, rows=tuple(_rows(pairs, fields, statistics))) for fields in benchmark.layout.tables
    )
    return Results(
        benchmark=benchmark.layout.title,
        overall=_row((OVERALL,), [score for _, score in pairs], statistics),
        tables=tables,
        notes=(*notes, *_official_note(scores), f"data: {benchmark.version}", *_notes(benchmark)),
        version=benchmark.version,
        official_string_match=_official_score(scores),
        chance=_chance(benchmark),
    )


def _official_score(scores: Sequence[Score]) -> float | None:
    official = [score.official for score in scores if score.official is not None]
    return sum(official) / len(official) if official else None


def _official_note(scores: Sequence[Score]) -> Iterator[str]:
    share = _official_score(scores)
    if share is not None:
        differ = sum(bool(score.value) != score.official for score in scores)
        yield (
            f"official_string_match: {100 * share:.2f} % by the words that an answer contains, as the benchmark's own "
            f"script scores; the two rules differ on {differ} of {len(scores)} items"
        )


def comparison_markdown(comparison: PairedComparison) -> str:
    """The paired tests in words."""
    gap = comparison.difference
    lines = [
        f"- difference {100 * gap.mean:+.2f} points, interval {100 * gap.low:+.2f} to {100 * gap.high:+.2f}, "
        f"p = {comparison.p_value:.4f}",
        f"- first against second: {difference_in_words(100 * gap.low, 100 * gap.high)}",
    ]
    if comparison.mcnemar is None:
        lines.append("- some scores are ratings: interval and p by bootstrap")
    else:
        test = comparison.mcnemar
        lines.append(
            f"- right in the first run only: {test.only_first}, in the second only: {test.only_second}; "
            f"exact McNemar p = {test.p_value:.4f}"
        )
    return "\n".join(lines) + "\n"


def _rows(pairs: Sequence[tuple[Item, Score]], fields: tuple[str, ...], statistics: StatisticsConfig) -> Iterator[Row]:
    groups: dict[tuple[str, ...], list[Score]] = {}
    for item, score in pairs:
        for group in product(*(item.groups[name] for name in fields)):
            groups.setdefault(group, []).append(score)
    for group in sorted(groups):
        yield _row(group, groups[group], statistics)


def _row(group: tuple[str, ...], scores: Sequence[Score], statistics: StatisticsConfig) -> Row:
    interval = score_interval(
        [score.value for score in scores],
        samples=statistics.bootstrap_samples,
        seed=statistics.seed,
        confidence=statistics.confidence,
    )
    return Row(
        group=group,
        items=len(scores),
        score=interval.mean,
        low=interval.low,
        high=interval.high,
        missing=sum(score.status == "missing" for score in scores),
        unparsable=sum(score.status == "unparsable" for score in scores),
    )


def _chance(benchmark: Benchmark) -> float | None:
    guesses = [1 / len(item.choices) for item in benchmark.items if item.choices]
    return sum(guesses) / len(guesses) if guesses else None


def _notes(benchmark: Benchmark) -> Iterator[str]:
    if (chance := _chance(benchmark)) is not None:
        count = sum(bool(item.choices) for item in benchmark.items)
        yield f"chance is {100 * chance:.2f} % over the {count} items with choices"
    sizes = benchmark.layout.sizes
    if sizes and len(benchmark.items) not in sizes.values():
        published = ", ".join(f"{size} ({name})" for name, size in sizes.items())
        yield f"not a published set: {len(benchmark.items)} items, published are {published}"
    if repaired := benchmark.with_empty_choices:
        yield f"items published with an empty choice, which is left out: {len(repaired)} ({', '.join(repaired)})"
    if benchmark.defective:
        yield (
            f"items whose published answer is not among two or more choices, right only where it is spelled out: "
            f"{len(benchmark.defective)} ({', '.join(benchmark.defective)})"
        )


def _markdown(fields: Sequence[str], rows: Sequence[Row]) -> str:
    head = [*fields, "items", "score %", "interval", "missing", "unparsable"]
    lines = [head, [*("---" for _ in fields), *("---:" for _ in head[len(fields) :])]]
    lines += [
        [
            *(name.replace("|", "\\|") for name in row.group),
            str(row.items),
            f"{100 * row.score:.2f}",
            f"{100 * row.low:.2f} to {100 * row.high:.2f}",
            str(row.missing),
            str(row.unparsable),
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
