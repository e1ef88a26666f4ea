"""The README's table and picture are those of the runs."""

import json

import pytest

from nemo_mapo.reports.ablation import AblationRun
from nemo_mapo.reports.readme import PICTURE, audio_mass_svg, update_readme
from nemo_mapo.reports.theme import AUDIO

BEGIN, END = "<!-- ablation -->", "<!-- /ablation -->"


def finished_run(directory, variant, accuracy, late_mass):
    directory.mkdir()
    records = [{"step": 0, "val/accuracy": 0.5}, {"step": 1, "val/accuracy": accuracy, "train/loss": 0.1}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    profiles = [
        {"step": step, "label": label, "position": [0.25, 0.75], "audio_mass_max": [0.6, mass], "count": [4, 4]}
        for step, label, mass in ((0, "before", 0.3), (1, "after", late_mass))
    ]
    (directory / "profiles.jsonl").write_text("".join(json.dumps(record) + "\n" for record in profiles))
    test = {"accuracy": accuracy, "accuracy_silent": 0.25, "start_accuracy": 0.5, "audio_mass_late": late_mass}
    (directory / "run.json").write_text(json.dumps({"seconds_total": 10.0, "test": test}))
    return AblationRun(variant=variant, seed=1, run_dir=directory)


def test_the_table_is_written_between_the_markers_and_can_be_rewritten(tmp_path):
    rows = [finished_run(tmp_path / "a", "grpo", 0.7, 0.35), finished_run(tmp_path / "b", "mapo", 0.75, 0.5)]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_readme(readme, rows)
    once = readme.read_text()
    assert once.startswith(f"before\n{BEGIN}\n|") and once.endswith(f"{END}\nafter\n")
    assert "75.0" in once and "old" not in once
    update_readme(readme, rows)
    assert readme.read_text() == once
    picture = (tmp_path / PICTURE).read_text()
    assert (
        "prefers-color-scheme:dark" in picture
        and ">MAPO</text>" in picture
        and AUDIO.light not in picture.split("</style>")[1]
    )


def test_the_picture_shows_the_variants_that_were_run(tmp_path):
    picture = audio_mass_svg([finished_run(tmp_path / "a", "mapo", 0.7, 0.35)])
    assert ">start policy</text>" in picture and ">MAPO</text>" in picture and ">GRPO</text>" not in picture
    with pytest.raises(ValueError, match="no run of grpo or mapo has profiles"):
        audio_mass_svg([finished_run(tmp_path / "b", "mask_only", 0.7, 0.35)])


def test_a_readme_without_markers_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing to fill")
    with pytest.raises(ValueError, match="has no <!-- ablation -->"):
        update_readme(readme, [finished_run(tmp_path / "a", "grpo", 0.7, 0.35)])
