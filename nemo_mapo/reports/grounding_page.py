"""The page of a grounding analysis, or of several side by side; made from analysis files alone."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_mapo.reports.charts import Level, Profile, Scale, profiles
from nemo_mapo.reports.estimate_charts import Bars, Group, Point, Points, bars, groups, heads, points
from nemo_mapo.reports.estimates import Estimate
from nemo_mapo.reports.pages import Figure, write_page
from nemo_mapo.reports.theme import LEAST, LINE, MASS, MISSING, MOST, RUNS, SILENT, Colour, tints

HEARD = {"full": "its clip", "exchanged": "another clip", "silence": "silence", "text_only": "text alone"}
"""What the model was given, by name in the file."""
SELECTIONS = {"top": ("most attended", MOST), "random": ("random", SILENT), "low": ("least attended", LEAST)}
LINES = (("audio_mass_max", "Audio mass along the completion", "share of attention",
          "Strongest head, mean of the target layers. A line that sinks is a model that stops listening."),
         ("delta_h_nats", "Differential entropy Δh along the completion", "nats",
          "Entropy without audio minus entropy with it: above zero the audio settles what text leaves open."),
         ("policy_entropy_nats", "Entropy along the completion", "nats",
          "How open the next token is to the policy, audio heard."))  # fmt: skip


Header = Sequence[str]
Rows = Sequence[Sequence[str]]

NEEDED = {"checkpoint", "split", "items", "ids", "settings", "accuracy", "needs_ears", "profile", "heads", "collapse",
          "untagged_completions", "parts_of_speech", "evidence", "acs", "length"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """An analysis file and what the page calls it."""

    label: str
    results: Mapping[str, Any]


def read_analysis(path: Path, label: str) -> Analysis:
    """Read a file that examples/analyse.py wrote; ValueError where it is none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no analysis ({error}); make it with examples/analyse.py") from error
    if not isinstance(results, dict) or (missing := sorted(NEEDED - results.keys())):
        raise ValueError(f"{path}: {', '.join(missing) if isinstance(results, dict) else 'everything'} missing; "
                         "make it again with examples/analyse.py")  # fmt: skip
    return Analysis(label=label, results=results)


def newest_analysis(run_dir: Path) -> Path:
    """The analysis file of a run directory that was written last; ValueError where there is none."""
    found = sorted((run_dir / "analysis").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"{run_dir} has no analysis; make one: python examples/analyse.py {run_dir}")
    return found[-1]


def write_grounding_page(analyses: Sequence[Analysis], path: Path, *, title: str) -> Path:
    """Write the page, whole or not at all; several analyses share every chart, one colour each.

    Raises:
        ValueError: nothing to show, or analyses of other questions or settings (their figures are not comparable).
    """
    _refuse_incomparable(analyses)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_page(
        path,
        "grounding.html",
        title=title,
        subtitle=f"{analyses[0].results['items']} questions",
        origins=[_origin(analysis) for analysis in analyses],
        sections=[*_listening_blocks(analyses), *_effect_blocks(analyses)],
    )


@dataclass(frozen=True, kw_only=True)
class Block:
    """Charts and tables below one heading."""

    name: str
    title: str
    lead: str = ""
    figures: Sequence[Figure]
    tables: Sequence[tuple[Header, Rows]] = ()


def _listening_blocks(analyses: Sequence[Analysis]) -> list[Block]:
    return [
        Block(
            name="heard",
            title="How much of the score depends on the audio",
            lead="The same questions, answered greedily, with something else in place of the audio.",
            figures=[_heard(analyses)],
            tables=[_accuracy_table(analyses)],
        ),
        Block(
            name="listening",
            title="Listening",
            figures=[*(_profile(analyses, *line) for line in LINES), *(_layers(one) for one in analyses)],
        ),
        Block(name="heads", title="Heads", figures=[_heads(one) for one in analyses]),
    ]


def _effect_blocks(analyses: Sequence[Analysis]) -> list[Block]:
    return [
        Block(
            name="evidence",
            title="Evidence masking",
            lead=_EVIDENCE_LEAD,
            figures=[*(_evidence(one) for one in analyses), _acs(analyses)],
            tables=[_acs_table(analyses), _drop_table(analyses)],
        ),
        Block(name="parts", title="Parts of speech", figures=[_parts(one) for one in analyses]),
        Block(
            name="length",
            title="Length and collapse",
            figures=[_lengths(analyses)],
            tables=[_length_table(analyses)],
        ),
    ]


def _refuse_incomparable(analyses: Sequence[Analysis]) -> None:
    """ValueError where the analyses did not ask the same questions in the same way."""
    if not analyses:
        raise ValueError("name at least one analysis")
    first = analyses[0]
    for other in analyses[1:]:
        if first.results["ids"] != other.results["ids"]:
            shared = len(set(first.results["ids"]) & set(other.results["ids"]))
            raise ValueError(
                f"{first.label} has {first.results['items']} questions, {other.label} has {other.results['items']}, "
                f"and {shared} of them are shared, or their order differs: compare analyses of the same split"
            )
        settings = {
            name: (value, other.results["settings"].get(name))
            for name, value in first.results["settings"].items()
            if name != "max_items"
        }
        if changed := [f"{name} ({one} and {two})" for name, (one, two) in settings.items() if one != two]:
            raise ValueError(
                f"{first.label} and {other.label} differ in {', '.join(changed)}: analyse both with the same settings"
            )


def _origin(analysis: Analysis) -> str:
    """Which checkpoint answered what; what of it is left out of the figures."""
    results = analysis.results
    untagged = results["untagged_completions"]
    left_out = f"; {untagged} completions could not be laid over their text and have no part of speech"
    return f"{analysis.label}: checkpoint {results['checkpoint']}, {results['split']}{left_out if untagged else ''}"


_EVIDENCE_LEAD = (
    "Parts of each clip are silenced and the question is asked again. Where accuracy falls more without the frames "
    "that the model attended to than without as many others, its attention was on the evidence (ACS: random minus "
    "most attended)."
)


def _heard(analyses: Sequence[Analysis]) -> Figure:
    rows = [
        Group(
            label=name if len(analyses) == 1 else f"{name}, {analysis.label}",
            colour=_colour(number),
            values={},
            estimate=_estimate(analysis.results["accuracy"][key]),
        )
        for key, name in HEARD.items()
        for number, analysis in enumerate(analyses)
    ]
    chart = groups(rows, Scale(label="accuracy", kind="percent"))
    return Figure(title="Accuracy by what is heard", chart=chart, caption="Diamond: accuracy; line: its interval.")


def _profile(analyses: Sequence[Analysis], key: str, title: str, unit: str, caption: str) -> Figure:
    lines = [_curve(analysis, key, analysis.label, _colour(number)) for number, analysis in enumerate(analyses)]
    bottom = None if key == "delta_h_nats" else 0.0
    return Figure(title=title, chart=profiles(lines, Scale(label=unit, bottom=bottom)), caption=caption)


def _layers(analysis: Analysis) -> Figure:
    layers = analysis.results["heads"]["layers"]
    curves = [
        _curve(analysis, f"layer_{layer}", f"layer {layer}", colour)
        for layer, colour in zip(layers, tints(MASS, len(layers)), strict=True)
    ]
    chart = profiles(curves, Scale(label="share of attention", bottom=0.0))
    caption = "Strongest head of each layer, the deepest in the fullest colour."
    return Figure(title=f"Audio mass by layer: {analysis.label}", chart=chart, caption=caption)


def _curve(analysis: Analysis, key: str, label: str, colour: Colour) -> Profile:
    profile = analysis.results["profile"]
    return Profile(label=label, colour=colour, position=np.array(profile["position"]), values=np.array(profile[key]))


def _heads(analysis: Analysis) -> Figure:
    found = analysis.results["heads"]
    chart = heads(found["layers"], found["audio_mass"])
    caption = "Mean over all completion tokens."
    return Figure(title=f"Attention on the audio: {analysis.label}", chart=chart, caption=caption)


def _evidence(analysis: Analysis) -> Figure:
    series = [
        Points(
            label=label,
            colour=colour,
            points=[
                Point(x=row["ratio"], y=row["mean"], low=row["low"], high=row["high"])
                for row in analysis.results["evidence"]
                if row["selection"] == selection
            ],
        )
        for selection, (label, colour) in SELECTIONS.items()
    ]
    whole = [Level(label="whole clip", value=analysis.results["accuracy"]["full"]["mean"])]
    scale = Scale(label="accuracy", kind="percent")
    chart = points(series, scale, x_label="silenced", x_percent=True, levels=whole)
    caption = "By which frames are silenced; vertical lines are intervals."
    return Figure(title=f"Accuracy without part of the clip: {analysis.label}", chart=chart, caption=caption)


def _acs(analyses: Sequence[Analysis]) -> Figure:
    series = [
        Points(
            label=analysis.label,
            colour=_colour(number),
            points=[
                Point(x=row["ratio"], y=row["mean"], low=row["low"], high=row["high"])
                for row in analysis.results["acs"]
            ],
        )
        for number, analysis in enumerate(analyses)
    ]
    scale = Scale(label="difference in accuracy", kind="percent")
    none = [Level(label="no difference", value=0.0)]
    chart = points(series, scale, x_label="silenced", x_percent=True, levels=none)
    caption = "Accuracy with random frames silenced minus accuracy with the most attended ones, on the same questions."
    return Figure(title="ACS", chart=chart, caption=caption)


def _parts(analysis: Analysis) -> Figure:
    rows = sorted(analysis.results["parts_of_speech"], key=lambda row: -row["delta_h_nats"])
    names = [f"{row['tag']} ({row['tokens']})" for row in rows]
    found = [
        Bars(label="Δh", colour=LINE, values=[row["delta_h_nats"] for row in rows]),
        Bars(label="entropy", colour=SILENT, values=[row["entropy_nats"] for row in rows]),
    ]
    chart = bars(names, found, Scale(label="nats per token"))
    caption = "Mean over tokens; in brackets how many. Tags as the gate uses them."
    return Figure(title=f"By part of speech: {analysis.label}", chart=chart, caption=caption)


def _lengths(analyses: Sequence[Analysis]) -> Figure:
    series = [
        Points(
            label=analysis.label,
            colour=_colour(number),
            points=[
                Point(x=(row["shortest"] + row["longest"]) / 2, y=row["accuracy"])
                for row in analysis.results["length"]["bins"]
            ],
        )
        for number, analysis in enumerate(analyses)
    ]
    chart = points(series, Scale(label="accuracy", kind="percent"), x_label="tokens of a completion")
    caption = (
        "Sampled completions in groups of similar length. Long ones may be of hard questions: the table has the effect "
        "within questions."
    )
    return Figure(title="Accuracy by length", chart=chart, caption=caption)


def _accuracy_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
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
            *(cell(analysis.results["needs_ears"][key]) for key in HEARD if key != "full"),
        ]
        for analysis in analyses
    ]


def _acs_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    ratios = [row["ratio"] for row in analyses[0].results["acs"]]
    return ["ACS, points (p)", *(f"{100 * ratio:g} % silenced" for ratio in ratios)], [
        [
            analysis.label,
            *(f"{_points(row)} ({row['p_value']:.2g})" for row in analysis.results["acs"]),
        ]
        for analysis in analyses
    ]


def _drop_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
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


def _length_table(analyses: Sequence[Analysis]) -> tuple[Header, Rows]:
    header = ["", "length and accuracy, r", "r within questions", "the same, finished ones only", "cut off",
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
                str(length["cut_off"]),
                _number(collapse["mean_index"]),
                *(_number(collapse[key], 100.0, 1) for key in ("share", "accuracy_collapsed", "accuracy_others")),
            ]
        )
    return header, rows


def _points(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['mean']:+.1f} [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def _number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return MISSING if value is None or math.isnan(value) else f"{factor * value:.{digits}f}"


def _colour(number: int) -> Colour:
    return RUNS[number % len(RUNS)]


def _estimate(interval: Mapping[str, float]) -> Estimate:
    return Estimate(mean=interval["mean"], deviation=None, low=interval["low"], high=interval["high"], count=1)
