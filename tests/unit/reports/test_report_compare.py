"""The ablation: means, paired differences and a page, from run directories."""

import math
import re

import pytest

from nemo_mapo.reports.ablation import comparison_markdown, read_runs
from nemo_mapo.reports.compare import AblationRun, write_comparison
from nemo_mapo.reports.theme import MISSING
from nemo_mapo.statistics import estimate, paired_difference, paired_ratio


@pytest.fixture
def rows(make_run, tmp_path):
    """Two variants, three seeds; full MAPO is 2, 4 and 6 points better and listens 1.5 times as much."""
    found = []
    for variant, gains, mass in (("GRPO", (0.1, 0.1, 0.1), 0.4), ("full MAPO", (0.12, 0.14, 0.16), 0.6)):
        for seed, gain in enumerate(gains):
            run = make_run(seed=seed, gain=gain, steps=20)
            run.run["test"]["audio_mass_late"] = mass
            directory = run.write(tmp_path / f"{variant}-{seed}".replace(" ", "-"))
            found.append(AblationRun(variant=variant, seed=seed, run_dir=directory))
    return found


def tables(rows, **options):
    return comparison_markdown(read_runs(rows, **options))


def test_an_estimate_is_mean_deviation_and_t_interval():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3))
    assert found.mean - found.low == pytest.approx(4.302653 / math.sqrt(3))


def test_one_value_has_no_interval_and_none_no_estimate():
    assert estimate([2.0]).low is None
    assert estimate([]) is None


def test_paired_differences_use_shared_seeds_and_cancel_what_seeds_share():
    found = paired_difference({0: 11.0, 1: 21.0, 2: 99.0}, {0: 10.0, 1: 20.0, 3: 0.0})
    assert (found.mean, found.deviation, found.count) == (1.0, 0.0, 2)


def test_paired_ratios_are_geometric():
    found = paired_ratio({0: 2.0, 1: 8.0}, {0: 1.0, 1: 1.0})
    assert found.mean == pytest.approx(4.0)
    assert found.low * found.high == pytest.approx(16.0)


def test_the_tables_show_means_and_paired_differences(rows):
    text = tables(rows)
    assert "| GRPO | 3 | 53.0 ± 0.0 |" in text
    assert "| full MAPO | 3 | 57.0 ± 2.0 [52.0, 61.9] |" in text
    assert "| full MAPO | 3 | +4.0 [-1.0, +9.0] |" in text
    assert "| 1.50 |" in text
    assert "Accuracy on the test split." in text


def test_the_page_holds_both_tables_and_the_plots_and_loads_nothing(rows, tmp_path):
    path = write_comparison(rows, tmp_path / "out")
    assert path == tmp_path / "out" / "comparison.html"
    assert (tmp_path / "out" / "comparison.md").read_text() == tables(rows)
    text = path.read_text()
    assert text.count("<table>") == 2
    assert text.count("<figure>") == text.count("</figcaption>") == 10
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]* (?:src|href)=", text)


def test_the_baseline_is_found_in_any_case_and_may_be_missing(rows):
    assert "minus GRPO" in tables(rows, baseline="grpo")
    assert "minus" not in tables(rows[3:])


def test_one_seed_each_has_the_paired_interval_of_its_questions(rows):
    text = tables([rows[0], rows[3]])
    assert "| GRPO | 1 | 53.0 |" in text
    # 20 of 1,000 questions are right with MAPO only.
    assert "| full MAPO | 1 | +2.0 [+1.3, +3.1] |" in text
    assert "- Accuracy of full MAPO against GRPO: higher, by at least 1.3 points." in text


def test_runs_over_other_questions_are_not_paired(rows):
    path = rows[3].run_dir / "test.jsonl"
    path.write_text(path.read_text().replace('"q7"', '"other"'))
    assert "| full MAPO | 1 | +2.0 |" in tables([rows[0], rows[3]])


def test_the_note_states_chance_and_the_start(rows):
    assert "Chance is 25.0 %, the start 43.0 %." in tables(rows)
    assert "not settled; excluded are a loss of more than 1.0 and a gain of more than" in tables(rows)


def test_different_splits_are_pointed_out(rows, make_run, tmp_path):
    untested = make_run(seed=3, steps=20)
    del untested.run["test"]
    row = AblationRun(variant="GRPO", seed=3, run_dir=untested.write(tmp_path / "untested"))
    assert "Warning: accuracy is from different splits (test, validation)" in tables([*rows, row])


def test_runs_without_audio_mass_leave_a_dash(make_run, tmp_path):
    run = make_run(steps=20)
    run.drop("mapo/audio_mass")
    run.drop("val/audio_mass")
    del run.run["test"]
    row = AblationRun(variant="GRPO", seed=0, run_dir=run.write(tmp_path / "run"))
    write_comparison([row], tmp_path)
    assert f"| {MISSING} |" in (tmp_path / "comparison.md").read_text()


def test_a_seed_twice_and_no_runs_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="variant 'GRPO' has seed 0 twice"):
        write_comparison([rows[0], rows[0]], tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        write_comparison([], tmp_path)


def test_variant_names_are_escaped(rows, tmp_path):
    odd = AblationRun(variant="<b>|x", seed=0, run_dir=rows[0].run_dir)
    text = write_comparison([odd], tmp_path).read_text()
    assert "<b>" not in text
    assert "| <b>\\|x | 1 |" in (tmp_path / "comparison.md").read_text()
