"""The page of one grounding analysis or of several side by side, made from their files alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_mapo.reports.analyses import BLOCKED, HEARD, Analysis, refuse_incomparable
from nemo_mapo.reports.charts import Level, Profile, Scale, profiles
from nemo_mapo.reports.clips import kept_clips
from nemo_mapo.reports.estimate_charts import Bars, Group, Point, Points, bars, groups, heads, points
from nemo_mapo.reports.grounding_tables import (
    SELECTIONS,
    accuracy_table,
    acs_table,
    admission,
    between_table,
    causal_table,
    drop_table,
    length_table,
    truth_table,
)
from nemo_mapo.reports.loading import recorded
from nemo_mapo.reports.pages import Block, Figure, write_page
from nemo_mapo.reports.theme import LINE, MASS, RUNS, SILENT, Colour, tints
from nemo_mapo.statistics import Estimate

LINES = (("audio_mass_max", "Audio mass along the completion", "share of attention",
          "Strongest head, mean of the target layers. A line that falls is a model that stops listening."),
         ("delta_h_nats", "Differential entropy Δh along the completion", "nats",
          "Entropy without audio minus entropy with it: above zero, the audio settles what the text leaves open."),
         ("policy_entropy_nats", "Entropy along the completion", "nats",
          "Uncertainty of the policy about the next token, with audio."))  # fmt: skip


def write_grounding_page(analyses: Sequence[Analysis], path: Path, *, title: str) -> Path:
    """Write the page atomically; several analyses share every chart, one colour each.

    Raises:
        ValueError: no analysis, or analyses of different questions or settings, whose numbers are not comparable.
    """
    refuse_incomparable(analyses)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_page(
        path,
        "grounding.html",
        title=title,
        subtitle=_asked(analyses[0]),
        commits=recorded([one.results for one in analyses], "commit"),
        commands=recorded([one.results for one in analyses], "command"),
        origins=[_origin(analysis) for analysis in analyses],
        sections=[*_listening_blocks(analyses), *_effect_blocks(analyses)],
        examples=_examples(analyses),
    )


def _listening_blocks(analyses: Sequence[Analysis]) -> list[Block]:
    return [
        Block(
            name="heard",
            title="How much of the score depends on the audio",
            lead="The same questions, answered greedily, with the audio replaced or removed.",
            figures=[_heard(analyses)],
            tables=[accuracy_table(analyses), *([between_table(analyses)] if len(analyses) > 1 else [])],
            note=_HEARD_NOTE if len(analyses) > 1 else "",
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
            name="causal",
            title="Causal listening",
            lead=_CAUSAL_LEAD,
            figures=[_blocked(analyses)],
            tables=[causal_table(analyses), truth_table(analyses)],
            note=" ".join(admission(one) for one in analyses),
        ),
        Block(
            name="evidence",
            title="Evidence masking",
            lead=_EVIDENCE_LEAD,
            figures=[*(_evidence(one) for one in analyses), _acs(analyses)],
            tables=[acs_table(analyses), drop_table(analyses)],
        ),
        Block(name="parts", title="Parts of speech", figures=[_parts(one) for one in analyses]),
        Block(
            name="length",
            title="Length and collapse",
            figures=[_lengths(analyses)],
            tables=[length_table(analyses)],
        ),
    ]


def _examples(analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
    """The first questions with their clips, and every run's answers."""
    shown = []
    for number, example in enumerate(analyses[0].results["examples"]):
        said = [
            {"run": one.label, **answer, "heard": HEARD[answer["heard"]]}
            for one in analyses
            for answer in one.results["examples"][number]["said"]
        ]
        shown.append({**example, "said": said, "clips": kept_clips(analyses[0].run_dir, example["id"])})
    return shown


def _asked(analysis: Analysis) -> str:
    """The number of questions, and how they were chosen."""
    items, split = analysis.results["items"], analysis.results["items_in_split"]
    chance = f"chance {100 * analysis.results['chance']:.1f} %"
    if items == split:
        return f"all {items} questions of the split · {chance}"
    seed = analysis.results["settings"]["seed"]
    return f"{items} of the split's {split} questions, drawn at random with seed {seed} · {chance}"


def _origin(analysis: Analysis) -> str:
    """The checkpoint and split of an analysis, and what its numbers leave out."""
    results = analysis.results
    untagged = results["untagged_completions"]
    left_out = f"; {untagged} completions could not be aligned with their text and have no parts of speech"
    return f"{analysis.label}: checkpoint {results['checkpoint']}, {results['split']}{left_out if untagged else ''}"


_HEARD_NOTE = (
    "Differences are paired over the questions: Tango's interval, exact McNemar p. An interval that contains 0 does "
    "not show that there is no difference; it shows which differences are excluded."
)
_CAUSAL_LEAD = (
    "The same questions with attention to the audio blocked for some tokens. The accuracy lost is what listening there "
    "is worth; tokens that attend to the audio and lose nothing without it have not used it."
)
_EVIDENCE_LEAD = (
    "Parts of each clip are silenced and the question is asked again. If accuracy falls more without the frames that "
    "the model attended to than without as many others, its attention was on the evidence (ACS: random minus most "
    "attended)."
)


def _heard(analyses: Sequence[Analysis]) -> Figure:
    found = {name: [one.results["accuracy"][key] for one in analyses] for key, name in HEARD.items()}
    return _accuracies(analyses, found, "Accuracy by what is heard")


def _blocked(analyses: Sequence[Analysis]) -> Figure:
    found = {
        name: [(one.results["accuracy"] | one.results["causal"]["accuracy"])[key] for one in analyses]
        for key, name in BLOCKED.items()
    }
    return _accuracies(analyses, found, "Accuracy by which tokens are deaf")


def _accuracies(analyses: Sequence[Analysis], found: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> Figure:
    rows = [
        Group(
            label=name if len(analyses) == 1 else f"{name}, {analysis.label}",
            colour=_colour(number),
            values={},
            estimate=_estimate(interval),
        )
        for name, intervals in found.items()
        for number, (analysis, interval) in enumerate(zip(analyses, intervals, strict=True))
    ]
    chart = groups(rows, Scale(label="accuracy", kind="percent"), _chance(analyses))
    return Figure(title=title, chart=chart, caption="Diamond: accuracy; line: its interval.")


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
    caption = "Strongest head of each layer; deeper layers have a fuller colour."
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
    levels = [
        Level(label="whole clip", value=analysis.results["accuracy"]["full"]["mean"]),
        Level(label="chance", value=analysis.results["chance"], below=True),
    ]
    scale = Scale(label="accuracy", kind="percent")
    chart = points(series, scale, x_label="silenced", x_percent=True, levels=levels)
    caption = "By selection of the silenced frames; vertical lines are intervals."
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
    caption = "Mean over tokens; their number is in parentheses. The tags are the gate's."
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
    scale = Scale(label="accuracy", kind="percent")
    chart = points(series, scale, x_label="tokens of a completion", levels=_chance(analyses))
    caption = (
        "Sampled completions in groups of similar length. Long ones may belong to hard questions; the table has the "
        "effect within questions."
    )
    return Figure(title="Accuracy by length", chart=chart, caption=caption)


def _chance(analyses: Sequence[Analysis]) -> list[Level]:
    return [Level(label="chance", value=analyses[0].results["chance"])]


def _colour(number: int) -> Colour:
    return RUNS[number % len(RUNS)]


def _estimate(interval: Mapping[str, float]) -> Estimate:
    return Estimate(mean=interval["mean"], deviation=None, low=interval["low"], high=interval["high"], count=1)
