"""Writes an ablation's table and picture into the README, so that no number there is typed by hand."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nemo_mapo.reports.ablation import AblationRun, comparison_markdown, read_runs
from nemo_mapo.reports.charts import Profile
from nemo_mapo.reports.loading import load_run
from nemo_mapo.reports.markdown import fill
from nemo_mapo.reports.theme import AUDIO, GRID, INK, LATE, MUTED, Colour

PICTURE = Path("docs", "images", "audio_mass.svg")
PICTURE_CURVES = (
    (("grpo", "mapo"), "before", "start policy", MUTED),
    (("grpo",), "after", "GRPO", AUDIO),
    (("mapo",), "after", "MAPO", LATE),
)
"""Variants, label in profiles.jsonl, name and colour in the picture."""
PICTURE_INCHES = (6.4, 3.1)
PICTURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "audio-mass",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GRID.light,
    "axes.labelcolor": MUTED.light,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID.light,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "text.color": INK.light,
    "lines.linewidth": 2.2,
}


def update_readme(readme: Path, rows: Sequence[AblationRun]) -> None:
    """Replace the table between the README's markers, and the picture of the audio mass that it shows.

    Raises:
        ValueError: the README has no markers.
    """
    fill(readme, "ablation", comparison_markdown(read_runs(rows)))
    picture = readme.parent / PICTURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(audio_mass_svg(rows))


def audio_mass_svg(rows: Sequence[AblationRun]) -> str:
    """Audio mass along held-out completions, mean over seeds: the start policy, and of GRPO and MAPO what was run.

    The background is transparent, and the colours follow the reader's light or dark scheme.

    Raises:
        ValueError: none of them has a run with profiles.
    """
    found = [_mean_profile(rows, *curve) for curve in PICTURE_CURVES]
    profiles = [item for item in found if item is not None]
    if not profiles:
        raise ValueError("no run of grpo or mapo has profiles, which the picture is drawn from")
    with matplotlib.rc_context(PICTURE_STYLE):
        figure = Figure(figsize=PICTURE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for item in profiles:
            style = (0, (4, 2)) if item.dashed else "-"
            axes.plot(item.position, item.values, color=item.colour.light, linestyle=style)
            axes.annotate(item.label, (float(item.position[-1]), float(item.values[-1])), xytext=(6, -3),
                          textcoords="offset points", color=item.colour.light)  # fmt: skip
        axes.grid(axis="y")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("position in the completion")
        axes.set_ylabel("attention on the audio")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _follow_scheme(buffer.getvalue(), (*(item.colour for item in profiles), INK, MUTED, GRID))


def _follow_scheme(svg: str, colours: Sequence[Colour]) -> str:
    """Replace the colours by variables that follow the reader's light or dark scheme."""
    light, dark = "", ""
    for number, colour in enumerate(dict.fromkeys(colours)):
        svg = svg.replace(colour.light, f"var(--c{number})")
        light += f"--c{number}:{colour.light};"
        dark += f"--c{number}:{colour.dark};"
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, svg, count=1)


def _mean_profile(
    rows: Sequence[AblationRun], variants: Sequence[str], label: str, name: str, colour: Colour
) -> Profile | None:
    found = [
        record
        for row in rows
        if row.variant in variants
        for record in load_run(row.run_dir).profiles
        if record["label"] == label
    ]
    if not found:
        return None
    return Profile(
        label=name,
        colour=colour,
        position=np.asarray(found[0]["position"], dtype=np.float64),
        values=np.mean([record["audio_mass_max"] for record in found], axis=0),
        dashed=label == "before",
    )
