"""The ablation's page: means over seeds, paired differences from the baseline, and plots."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_mapo.reports.ablation import (
    ACCURACY,
    LATE_MASS,
    SILENT,
    TOKENS,
    AblationRun,
    Comparison,
    Table,
    comparison_markdown,
    difference_note,
    difference_table,
    read_runs,
    readings,
    summary_note,
    summary_table,
)
from nemo_mapo.reports.charts import SMOOTHING_SHARE, Band, Level, Scale, bands, moving_mean
from nemo_mapo.reports.estimate_charts import Group, groups
from nemo_mapo.reports.loading import recorded, series
from nemo_mapo.reports.pages import Figure, write_page
from nemo_mapo.reports.report import REPORT_FILE

__all__ = ["AblationRun", "write_comparison"]

MARKDOWN_FILE = "comparison.md"
HTML_FILE = "comparison.html"

SHARE = Scale(label="accuracy", kind="percent")

FROM_ZERO = Scale(label="accuracy", kind="percent", bottom=0.0)
"""For accuracies near chance, where a tight axis would make noise look like an effect."""

POINT_FIGURES = (
    (ACCURACY, "Held-out accuracy", SHARE, "Accuracy at the end of training, and at its start."),
    (SILENT, "Accuracy with silence", SHARE, "The audio replaced by silence: should be at chance, the dotted line."),
    (LATE_MASS, "Late audio mass", Scale(label="share of attention"), "Over the last third of a completion."),
    (TOKENS, "Length", Scale(label="tokens per completion"), "Mean length of completions at the end of training."),
)

CURVE_FIGURES = (
    ("val/accuracy", "Held-out accuracy", SHARE, "On the validation split; step 0 is the start."),
    ("val/accuracy_silent", "Accuracy with silence", FROM_ZERO, "Should stay at chance, the dotted line."),
    ("rollout/reward_mean", "Reward in training", Scale(label="reward, points"), "Weighted sum of the rewards."),
    (
        "mapo/audio_mass_late",
        "Late audio mass in training",
        Scale(label="share of attention"),
        "Attention to the audio over the last third of sampled completions: what the attention loss should raise.",
    ),
    (
        "rollout/completion_tokens",
        "Length of training completions",
        Scale(label="tokens per completion"),
        "A variant that shortens its reasoning may do so at the cost of listening.",
    ),
    (
        "train/kl_loss",
        "KL to the reference",
        Scale(label="nats per token", bottom=0.0),
        "How far each variant has moved from the start policy: compare accuracies at similar distance.",
    ),
)

POINTS_NOTE = "One dot per seed, each seed at one height; the diamond is the mean, the line its 95 % interval."
BANDS_NOTE = "Mean over seeds; the band spans the lowest to the highest seed."


def write_comparison(rows: Sequence[AblationRun], output_dir: Path) -> Path:
    """Write `comparison.md` (the tables) and `comparison.html` (tables and plots); return the path of the latter.

    Args:
        rows: Finished runs. Variants may have different seeds; differences are over shared ones.
        output_dir: Created if missing.

    Raises:
        ValueError: no rows, or a variant has a seed twice.
        RunFileError: as `load_run`.
    """
    comparison = read_runs(rows)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MARKDOWN_FILE).write_text(comparison_markdown(comparison), encoding="utf-8")
    points = [_points(comparison, number) for number in range(len(POINT_FIGURES))]
    curve_figures = [_curves(comparison, number) for number in range(len(CURVE_FIGURES))]
    runs = [files.run for seeds in comparison.variants.values() for files, _ in seeds.values()]
    return write_page(
        output_dir / HTML_FILE,
        "comparison.html",
        title="Ablation",
        subtitle=f"{len(comparison.variants)} variants, {len(runs)} runs",
        commits=recorded(runs, "commit"),
        commands=recorded(runs, "command"),
        summary=_table(summary_table(comparison), summary_note(comparison)),
        differences=_differences(comparison),
        baseline=comparison.baseline,
        points_note=POINTS_NOTE,
        points=[figure for figure in points if figure],
        curves_note=BANDS_NOTE,
        curves=[figure for figure in curve_figures if figure],
        runs=_runs(comparison, output_dir),
    )


def _differences(comparison: Comparison) -> dict[str, Any] | None:
    if comparison.baseline is None:
        return None
    return _table(difference_table(comparison), difference_note(comparison)) | {"readings": readings(comparison)}


def _table(table: Table, note: str) -> dict[str, Any]:
    header, rows = table
    return {"header": header, "rows": rows, "note": note}


def _points(comparison: Comparison, number: int) -> Figure | None:
    measure, title, scale, caption = POINT_FIGURES[number]
    rows = [
        Group(label=variant, colour=comparison.colour(variant), values=values, estimate=found)
        for variant in comparison.variants
        if (values := comparison.values(variant, measure)) and (found := comparison.estimate(variant, measure))
    ]
    if not rows:
        return None
    levels = [] if measure not in (ACCURACY, SILENT) else [Level(label="chance", value=comparison.chance)]
    if measure is ACCURACY and comparison.start is not None:
        levels.append(Level(label="start", value=comparison.start))
    return Figure(title=title, chart=groups(rows, scale, levels), caption=caption)


def _curves(comparison: Comparison, number: int) -> Figure | None:
    key, title, scale, caption = CURVE_FIGURES[number]
    found = [band for variant in comparison.variants if (band := _band(comparison, variant, key)) is not None]
    if not found:
        return None
    levels = [Level(label="chance", value=comparison.chance, below=True)] if key.startswith("val/accuracy") else ()
    return Figure(title=title, chart=bands(found, scale, levels), caption=caption)


def _band(comparison: Comparison, variant: str, key: str) -> Band | None:
    """Curves of a variant's seeds at the steps that all have, smoothed unless held-out; None if there are none."""
    curves = [series(files.metrics, key) for files, _ in comparison.variants[variant].values()]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return None
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    if not len(steps):
        return None
    window = 1 if key.startswith("val/") else max(1, round(SMOOTHING_SHARE * len(steps)))
    values = np.stack([moving_mean(curve.values[np.isin(curve.steps, steps)], window) for curve in curves])
    return Band(label=variant, colour=comparison.colour(variant), steps=steps, values=values)


def _runs(comparison: Comparison, output_dir: Path) -> list[dict[str, str]]:
    items = []
    for variant, seeds in comparison.variants.items():
        for seed, (files, _) in seeds.items():
            exists = (files.run_dir / REPORT_FILE).is_file()
            # Relative, so that the directory of an ablation can be moved or served.
            report = Path(os.path.relpath(files.run_dir / REPORT_FILE, output_dir)).as_posix() if exists else ""
            items.append({"label": f"{variant}, seed {seed}", "report": report, "notes": " ".join(files.notes)})
    return items
