"""The page of a grounding analysis, or of several side by side; made from analysis files alone."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nemo_mapo.reports.estimates import Estimate
from nemo_mapo.reports.grounding_plots import Bars, Point, Points, bars_svg, heads_svg, points_svg
from nemo_mapo.reports.plots import Level, Profile, Scale, profiles_svg
from nemo_mapo.reports.seed_plots import Group, groups_svg
from nemo_mapo.reports.theme import (
    ACCURACY,
    AFTER,
    EARLY,
    ENTROPY,
    LENGTH,
    MISSING,
    SILENT,
    VARIANTS,
    figure_html,
    grid_html,
    page,
)

HEARD = {"full": "its clip", "exchanged": "another clip", "silence": "silence", "text_only": "text alone"}
"""What the model was given, by name in the file."""
SELECTIONS = {"top": ("most attended", AFTER), "random": ("random", SILENT), "low": ("least attended", ACCURACY)}
COLOURS = (AFTER, *VARIANTS)
LINES = (("audio_mass_max", "Audio mass along the completion", "share of attention",
          "Strongest head, mean of the target layers. A line that sinks is a model that stops listening."),
         ("delta_h_nats", "Differential entropy Δh along the completion", "nats",
          "Entropy without audio minus entropy with it: above zero the audio settles what text leaves open."),
         ("policy_entropy_nats", "Entropy along the completion", "nats",
          "How open the next token is to the policy, audio heard."))  # fmt: skip


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
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{analyses[0].results["items"]} questions</p>',
        *(f'<p class="note">{escape(_origin(analysis))}</p>' for analysis in analyses),
        "<h2>How much of the score needs ears</h2>",
        '<p class="lead">The same questions, answered greedily, with something else in place of the audio.</p>',
        grid_html([_heard(analyses)]),
        _table(*_accuracy_table(analyses)),
        "<h2>Listening</h2>",
        grid_html([*(_profile(analyses, *line) for line in LINES), *(_layers(one) for one in analyses)]),
        "<h2>Heads</h2>",
        grid_html([_heads(number, one) for number, one in enumerate(analyses)]),
        "<h2>Evidence masking</h2>",
        f'<p class="lead">{_EVIDENCE_LEAD}</p>',
        grid_html([*(_evidence(number, one) for number, one in enumerate(analyses)), _acs(analyses)]),
        _table(*_acs_table(analyses)),
        _table(*_drop_table(analyses)),
        "<h2>Parts of speech</h2>",
        grid_html([_parts(number, one) for number, one in enumerate(analyses)]),
        "<h2>Length and collapse</h2>",
        grid_html([_lengths(analyses)]),
        _table(*_length_table(analyses)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(title=title, body="\n".join(sections)), encoding="utf-8")
    partial.replace(path)
    return path


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


def _heard(analyses: Sequence[Analysis]) -> str:
    groups = [
        Group(
            label=name if len(analyses) == 1 else f"{name}, {analysis.label}",
            colour=_colour(number),
            values={},
            estimate=_estimate(analysis.results["accuracy"][key]),
        )
        for key, name in HEARD.items()
        for number, analysis in enumerate(analyses)
    ]
    svg = groups_svg("heard", groups, Scale(label="accuracy", kind="percent"))
    return figure_html(title="Accuracy by what is heard", svg=svg, caption="Bar: accuracy; line: bootstrap interval.")


def _profile(analyses: Sequence[Analysis], key: str, title: str, unit: str, caption: str) -> str:
    profiles = [_curve(analysis, key, analysis.label, _colour(number)) for number, analysis in enumerate(analyses)]
    bottom = None if key == "delta_h_nats" else 0.0
    svg = profiles_svg(f"profile-{key}", profiles, Scale(label=unit, bottom=bottom))
    return figure_html(title=title, svg=svg, caption=caption)


def _layers(analysis: Analysis) -> str:
    layers = analysis.results["heads"]["layers"]
    curves = [
        _curve(analysis, f"layer_{layer}", f"layer {layer}", COLOURS[number % len(COLOURS)])
        for number, layer in enumerate(layers)
    ]
    svg = profiles_svg(f"layers-{escape(analysis.label)}", curves, Scale(label="share of attention", bottom=0.0))
    return figure_html(title=f"Audio mass by layer: {analysis.label}", svg=svg, caption="Strongest head of each layer.")


def _curve(analysis: Analysis, key: str, label: str, colour: str) -> Profile:
    profile = analysis.results["profile"]
    return Profile(label=label, colour=colour, position=np.array(profile["position"]), values=np.array(profile[key]))


def _heads(number: int, analysis: Analysis) -> str:
    heads = analysis.results["heads"]
    svg = heads_svg(f"heads-{number}", heads["layers"], heads["audio_mass"])
    return figure_html(title=f"Attention on the audio: {analysis.label}", svg=svg,
                       caption="Mean over all completion tokens.")  # fmt: skip


def _evidence(number: int, analysis: Analysis) -> str:
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
    svg = points_svg(f"evidence-{number}", series, Scale(label="accuracy", kind="percent"), x_label="silenced",
                     x_percent=True, levels=whole)  # fmt: skip
    return figure_html(title=f"Accuracy without part of the clip: {analysis.label}", svg=svg,
                       caption="By which frames are silenced; lines are bootstrap intervals.")  # fmt: skip


def _acs(analyses: Sequence[Analysis]) -> str:
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
    svg = points_svg("acs", series, scale, x_label="silenced", x_percent=True, levels=none)
    caption = "Accuracy with random frames silenced minus accuracy with the most attended ones, on the same questions."
    return figure_html(title="ACS", svg=svg, caption=caption)


def _parts(number: int, analysis: Analysis) -> str:
    rows = sorted(analysis.results["parts_of_speech"], key=lambda row: -row["delta_h_nats"])
    names = [f"{row['tag']} ({row['tokens']})" for row in rows]
    bars = [
        Bars(label="Δh", colour=LENGTH, values=[row["delta_h_nats"] for row in rows]),
        Bars(label="entropy", colour=ENTROPY, values=[row["entropy_nats"] for row in rows]),
    ]
    svg = bars_svg(f"parts-{number}", names, bars, Scale(label="nats per token"))
    return figure_html(title=f"By part of speech: {analysis.label}", svg=svg,
                       caption="Mean over tokens; in brackets how many. Tags as the gate uses them.")  # fmt: skip


def _lengths(analyses: Sequence[Analysis]) -> str:
    series = [
        Points(
            label=analysis.label,
            colour=_colour(number) if len(analyses) > 1 else EARLY,
            points=[
                Point(x=(row["shortest"] + row["longest"]) / 2, y=row["accuracy"])
                for row in analysis.results["length"]["bins"]
            ],
        )
        for number, analysis in enumerate(analyses)
    ]
    svg = points_svg("lengths", series, Scale(label="accuracy", kind="percent"), x_label="tokens of a completion")
    caption = (
        "Sampled completions in groups of similar length. Long ones may be of hard questions: the table has the effect "
        "within questions."
    )
    return figure_html(title="Accuracy by length", svg=svg, caption=caption)


Header = Sequence[str]
Rows = Sequence[Sequence[str]]


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


def _table(header: Header, rows: Rows) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _estimate(interval: Mapping[str, float]) -> Estimate:
    return Estimate(mean=interval["mean"], deviation=None, low=interval["low"], high=interval["high"], count=1)
