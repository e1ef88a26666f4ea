"""Draws the charts of a run report: each function turns run files into figures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from nemo_mapo.reports import theme
from nemo_mapo.reports.charts import DASHES, Level, Line, Profile, Scale, curves, profiles, stacked
from nemo_mapo.reports.loading import Record, RunFiles, Series, is_number, section, series
from nemo_mapo.reports.outcome import chance_accuracy
from nemo_mapo.reports.pages import Figure
from nemo_mapo.reports.panels import PHASE_ORDER, Curve, Panel
from nemo_mapo.statistics import share_interval


def is_recorded(panel: Panel, files: RunFiles) -> bool:
    """Whether any metric of the chart has a value."""
    return any(len(series(files.metrics, curve.key)) for curve in panel.curves)


def panel_figure(
    panel: Panel, files: RunFiles, others: Mapping[str, Sequence[Record]] = MappingProxyType({})
) -> Figure | None:
    """Draw a chart, overlaid with the curves of `others` (metrics by run); None if there is nothing to show."""
    lines = [_line(curve, files.metrics, panel.scale) for curve in panel.curves]
    if not any(len(line.series) for line in lines):
        return None
    if panel.only_if_positive and not any((line.series.values > 0).any() for line in lines):
        return None
    lines += [
        replace(_line(curve, records, panel.scale), overlay=name, dash=dash)
        for (name, records), dash in zip(others.items(), cycle(DASHES), strict=False)
        for curve in panel.curves
    ]
    chart = curves(lines, panel.scale, _levels(panel.level, files))
    return Figure(title=panel.title, chart=chart, caption=panel.caption)


def timing_figure(files: RunFiles) -> Figure | None:
    """Draw how a step's time is divided into phases; None without timings."""
    parts = [
        Line(label=phase.replace("_", " "), colour=colour, series=series(files.metrics, f"timing/{phase}_seconds"))
        for phase, colour in zip(_phases(files.metrics), cycle(theme.PHASES), strict=False)
    ]
    if not any(len(part.series) for part in parts):
        return None
    total = series(files.metrics, "timing/step_seconds")
    chart = stacked(parts, total, Scale(label="seconds per step"))
    return Figure(
        title="Where the time goes",
        chart=chart,
        caption="Seconds of each phase, stacked; the line is the measured step. The stack may exceed it: the "
        "part-of-speech gate runs in parallel with the reference passes, and validation follows a step. Steps above "
        "three times the median are clipped.",
    )


def profile_figures(files: RunFiles) -> list[Figure]:
    """Draw mass, differential entropy and entropies by relative position, before and after training."""
    last = {label: _last_profile(files.profiles, label) for label in ("before", "after")}
    mass = _profiles(last, "audio_mass_max", theme.MASS, "strongest head")
    mass += _profiles(last, "audio_mass_mean", theme.MASS, "mean of heads", hidden=True)
    delta = _profiles(last, "delta_h_nats", theme.LINE)
    entropy = _profiles(last, "policy_entropy_nats", theme.AUDIO, "with audio")
    entropy += _profiles(last, "text_entropy_nats", theme.SILENT, "text only")
    figures: list[Figure] = []
    if mass:
        chart = profiles(mass, Scale(label="share of attention", bottom=0.0))
        caption = (
            "Audio mass from the first to the last token. A line that falls to the right is a model that stops "
            "listening; after training it should stay level. Strongest head, as in the objective; click a name for the "
            "mean of the heads."
        )
        figures.append(Figure(title="Audio mass along the completion", chart=chart, caption=caption))
    if delta:
        chart = profiles(delta, Scale(label="nats"), [Level(label="no difference", value=0.0)])
        caption = (
            "Entropy of the text-only reference minus entropy of the policy. Above zero, the audio settles what the "
            "text leaves open; at zero, the next token does not depend on the audio."
        )
        figures.append(Figure(title="Differential entropy Δh along the completion", chart=chart, caption=caption))
    if entropy:
        chart = profiles(entropy, Scale(label="nats", bottom=0.0))
        caption = (
            "The two parts of Δh. Text-only entropy alone does not show where the audio matters: it is also high where "
            "many wordings are possible."
        )
        figures.append(Figure(title="Entropies along the completion", chart=chart, caption=caption))
    return figures


def _phases(records: Sequence[Record]) -> list[str]:
    """Phases with a duration in the metrics, in the order of a step."""
    keys = {key for record in records for key in record}
    names = {key.removeprefix("timing/").removesuffix("_seconds") for key in keys if key.startswith("timing/")}
    known = [phase for phase in PHASE_ORDER if phase in names]
    return known + sorted(names - set(known) - {"step"})


def _line(curve: Curve, records: Sequence[Record], scale: Scale) -> Line:
    found = series(records, curve.key)
    if scale.kind == "log":
        # Signed terms are shown by size; a log axis has no place for exact zeros.
        kept = found.values != 0
        found = Series(steps=found.steps[kept], values=np.abs(found.values[kept]))
    line = Line(label=curve.label, colour=curve.colour, series=found, dashed=curve.dashed)
    if not curve.key.startswith("val/"):
        return line
    ends = _intervals(found, series(records, "val/questions")) if curve.key.startswith("val/accuracy") else None
    return replace(line, style="measured", ends=ends)


def _intervals(shares: Series, questions: Series) -> Float[NDArray[np.float64], "end step"] | None:
    """Wilson's intervals of accuracies, given their numbers of questions; None if these were not recorded."""
    if not len(shares) or shares.steps.tolist() != questions.steps.tolist():
        return None
    pairs = zip(shares.values, questions.values, strict=True)
    found = [share_interval(round(share * count), int(count)) for share, count in pairs]
    return np.array([[one.low for one in found], [one.high for one in found]])


def _levels(name: str, files: RunFiles) -> list[Level]:
    if name == "chance":
        return [Level(label="chance", value=chance_accuracy(files.test or files.rollouts), below=True)]
    value = section(files.config, "objective").get(name)
    return [Level(label="cap", value=float(value))] if name and is_number(value) else []


def _last_profile(profiles: Sequence[Record], label: str) -> Record:
    found = [profile for profile in profiles if profile.get("label") == label]
    return max(found, key=lambda profile: int(profile["step"])) if found else {}


def _profiles(
    last: Mapping[str, Record], key: str, colour: theme.Colour, name: str = "", *, hidden: bool = False
) -> list[Profile]:
    """The signal before (dashed) and after training (solid)."""
    found: list[Profile] = []
    for label, record in last.items():
        pairs = _pairs(record.get("position"), record.get(key))
        if pairs:
            position, values = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
            text = f"{label}, {name}" if name else label
            found.append(
                Profile(label=text, colour=colour, position=position, values=values, dashed=label == "before",
                        hidden=hidden)
            )  # fmt: skip
    return found


def _pairs(position: Any, values: Any) -> list[tuple[float, float]]:
    """Bins with both numbers; bins without tokens have null."""
    if not isinstance(position, list) or not isinstance(values, list):
        return []
    return [(x, y) for x, y in zip(position, values, strict=False) if is_number(x) and is_number(y)]
