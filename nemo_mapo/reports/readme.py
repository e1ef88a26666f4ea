"""Puts an ablation's table and picture where the README shows them, so that no figure there is typed by hand."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_mapo.reports.ablation import AblationRun, comparison_markdown, read_runs
from nemo_mapo.reports.loading import load_run
from nemo_mapo.reports.plots import Profile, Scale, profiles_svg
from nemo_mapo.reports.theme import ACCURACY, AFTER, BEFORE

BEGIN, END = "<!-- ablation -->", "<!-- /ablation -->"
PICTURE = Path("docs", "images", "audio_mass.svg")
PICTURE_CURVES = (("grpo", "after", "GRPO", ACCURACY), ("mapo", "after", "MAPO", AFTER))
"""Variant, label in profiles.jsonl, name in the picture."""
_SVG_NAMESPACE = (
    'font-family="sans-serif" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
)


def update_readme(readme: Path, rows: Sequence[AblationRun]) -> None:
    """Replace the table between the README's markers, and the picture of the audio mass beside it.

    Raises:
        ValueError: the README has no markers.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} has no {BEGIN} ... {END} to fill")
    table = comparison_markdown(read_runs(rows))
    filled = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table}{END}", text, flags=re.DOTALL)
    readme.write_text(filled)
    picture = readme.parent / PICTURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    svg = audio_mass_svg(rows).replace("<svg ", f"<svg {_SVG_NAMESPACE} ", 1)
    picture.write_text(svg + "\n")


def audio_mass_svg(rows: Sequence[AblationRun]) -> str:
    """Audio mass along held-out completions, mean over seeds: the start policy, GRPO and MAPO.

    Raises:
        ValueError: a variant of the picture has no run with profiles.
    """
    profiles = [_mean_profile(rows, "grpo", "before", "start policy", BEFORE, dashed=True)]
    profiles += [_mean_profile(rows, *curve) for curve in PICTURE_CURVES]
    return profiles_svg("audio-mass", profiles, Scale(label="share of attention on the audio", bottom=0.0))


def _mean_profile(
    rows: Sequence[AblationRun], variant: str, label: str, name: str, colour: str, *, dashed: bool = False
) -> Profile:
    found = [
        record
        for row in rows
        if row.variant == variant
        for record in load_run(row.run_dir).profiles
        if record["label"] == label
    ]
    if not found:
        raise ValueError(f"no {label} profile in the runs of {variant}")
    return Profile(
        label=name,
        colour=colour,
        position=np.asarray(found[0]["position"], dtype=np.float64),
        values=np.mean([record["audio_mass_max"] for record in found], axis=0),
        dashed=dashed,
    )
