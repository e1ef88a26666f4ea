"""The tables of a grounding page."""

import math
from collections.abc import Mapping, Sequence

from nemo_mapo.reports.analyses import BLOCKED, HEARD, Analysis
from nemo_mapo.reports.theme import LEAST, MISSING, MOST, SILENT
from nemo_mapo.statistics import PairedComparison, compare_paired, difference_in_words

Header = Sequence[str]
Rows = Sequence[Sequence[str]]
SELECTIONS = {"top": ("most attended", MOST), "random": ("random", SILENT), "low": ("least attended", LEAST)}
"""Frames that evidence masking silences: name and colour."""


def accuracy_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    """Accuracy by what the model hears, and the accuracy lost without its clip."""

    def cell(row: Mapping[str, float]) -> str:
        return f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"

    header = [
        "",
        *(f"{name}, %" for name in HEARD.values()),
        *(f"full minus {HEARD[key]}, points" for key in HEARD if key != "full"),
    ]
    return header, [
        [
            analysis.label,
            *(cell(analysis.results["accuracy"][key]) for key in HEARD),
            *(cell(analysis.results["accuracy_lost"][key]) for key in HEARD if key != "full"),
        ]
        for analysis in analyses
    ]


def causal_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    """Accuracy lost when attention to the audio is blocked, paired over the questions; late listening comes first."""
    header = ["accuracy lost, points (p)", *(name for key, name in BLOCKED.items() if key != "full")]
    return header, [
        [
            analysis.label,
            *(
                f"{_points(lost)} ({lost['p_value']:.2g})"
                for lost in (analysis.results["causal"]["lost"][key] for key in BLOCKED if key != "full")
            ),
        ]
        for analysis in analyses
    ]


def truth_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    """Teacher-forced probability of the right choice, by what the model hears or which tokens are deaf."""
    names = BLOCKED | {key: HEARD[key] for key in ("silence", "exchanged")}
    header = ["probability of the truth, %", "questions", *names.values()]
    rows = []
    for analysis in analyses:
        causal = analysis.results["causal"]
        found = [causal["truth"].get(key) for key in names]
        cells = [
            MISSING if one is None else f"{100 * one['mean']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
            for one in found
        ]
        rows.append([analysis.label, str(causal["truth_questions"]), *cells])
    return header, rows


def admission(analysis: Analysis) -> str:
    """A sentence on whether this task can test late listening with this model."""
    causal, chance = analysis.results["causal"], analysis.results["chance"]
    used, alone = causal["late_listening_used"], causal["accuracy"]["only_late"]
    measured = (
        f"{analysis.label}: late listening is worth {_points(used)} points; when only late tokens hear, "
        f"{100 * alone['mean']:.1f} % [{100 * alone['low']:.1f}, {100 * alone['high']:.1f}] are right "
        f"(chance {100 * chance:.1f} %)"
    )
    if causal["without_late_part"]:
        measured += f"; {causal['without_late_part']} completions have no late part"
    if used["low"] > 0:
        return f"{measured}. Late listening is used: the task can test it."
    return (
        f"{measured}. The interval contains 0: with this model the task cannot test whether late listening helps, "
        "whatever the audio mass says."
    )


def between_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    """Accuracy of every further analysis minus that of the first, paired over the questions."""
    first = analyses[0]
    header = [f"minus {first.label}", *(f"{name}, points (p)" for name in HEARD.values()), "with its clip"]
    rows = []
    for analysis in analyses[1:]:
        found = {key: _compared(analysis, first, key) for key in HEARD}
        gap = found["full"].difference
        cells = [f"{_points(vars(one.difference))} ({one.p_value:.2g})" for one in found.values()]
        rows.append([analysis.label, *cells, difference_in_words(100 * gap.low, 100 * gap.high)])
    return header, rows


def _compared(analysis: Analysis, first: Analysis, heard: str) -> PairedComparison:
    settings = first.results["settings"]
    return compare_paired(
        analysis.results["scores"][heard],
        first.results["scores"][heard],
        samples=settings["bootstrap_samples"],
        seed=settings["seed"],
        confidence=settings["confidence"],
    )


def acs_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    """ACS by share of the clip that is silenced."""
    ratios = [row["ratio"] for row in analyses[0].results["acs"]]
    return ["ACS, points (p)", *(f"{100 * ratio:g} % silenced" for ratio in ratios)], [
        [
            analysis.label,
            *(f"{_points(row)} ({row['p_value']:.2g})" for row in analysis.results["acs"]),
        ]
        for analysis in analyses
    ]


def drop_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    """Accuracy lost to evidence masking, by selection."""
    ratios = [row["ratio"] for row in analyses[0].results["acs"]]
    return ["accuracy lost, points", "silenced", *(f"{100 * ratio:g} %" for ratio in ratios)], [
        [
            analysis.label,
            name,
            *(_points(row["drop"]) for row in analysis.results["evidence"] if row["selection"] == selection),
        ]
        for analysis in analyses
        for selection, (name, _) in SELECTIONS.items()
    ]


def length_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    """Correlations of length and accuracy, and collapse."""
    header = ["", "length and accuracy, r", "r within questions", "the same, finished ones only", "truncated",
              "collapse index, mean", "collapsed, %", "accuracy collapsed, %", "accuracy others, %"]  # fmt: skip
    rows = []
    for analysis in analyses:
        length, collapse = analysis.results["length"], analysis.results["collapse"]
        rows.append(
            [
                analysis.label,
                _number(length["pearson"]),
                _number(length["within_item"]),
                _number(length["within_item_finished"]),
                str(length["truncated"]),
                _number(collapse["mean_index"]),
                *(_number(collapse[key], 100.0, 1) for key in ("share", "accuracy_collapsed", "accuracy_others")),
            ]
        )
    return header, rows


def _points(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['mean']:+.1f} [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def _number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return MISSING if value is None or math.isnan(value) else f"{factor * value:.{digits}f}"
