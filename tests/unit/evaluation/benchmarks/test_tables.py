"""Tables: groups as the papers have them, denominators, and their text."""

from nemo_mapo.config.evaluation import StatisticsConfig
from nemo_mapo.evaluation.benchmarks.scoring import Scorer
from nemo_mapo.evaluation.benchmarks.tables import build_results, comparison_markdown
from nemo_mapo.statistics import compare_paired
from tests.unit.evaluation.benchmarks.published import answers, loaded, mmar_record, mmau_pro_record, mmau_record

FEW = StatisticsConfig(bootstrap_samples=200)


def results_of(benchmark, **texts):
    return build_results(benchmark, Scorer(benchmark, template="none")(answers(**texts)), FEW)


def rows(results, *fields):
    (table,) = [table for table in results.tables if table.fields == fields]
    return {row.group: (row.items, row.score, row.missing, row.unparsable) for row in table.rows}


def test_groups_count_all_their_items(tmp_path):
    records = [
        mmau_record("a"),
        mmau_record("b", difficulty="hard"),
        mmau_record("c", task="music", difficulty="hard"),
        mmau_record("d", task="music", difficulty="hard"),
    ]
    results = results_of(loaded(tmp_path / "mmau.json", "mmau", records), a="Dog", b="Cat", c="nothing")
    overall = results.overall
    assert (overall.items, overall.score, overall.missing, overall.unparsable) == (4, 0.25, 1, 1)
    assert rows(results, "task") == {("music",): (2, 0.0, 1, 1), ("sound",): (2, 0.5, 0, 0)}
    assert rows(results, "difficulty") == {("easy",): (1, 1.0, 0, 0), ("hard",): (3, 0.0, 1, 1)}
    assert rows(results, "category", "sub-category") == {("Reasoning", "Acoustic Source Inference"): (4, 0.25, 1, 1)}


def test_an_item_with_several_skills_counts_under_each(tmp_path):
    records = [mmau_pro_record("a"), mmau_pro_record("b", perceptual_skills=["Texture"])]
    results = results_of(loaded(tmp_path / "pro.json", "mmau_pro", records), a="Tea", b="Soup")
    assert rows(results, "perceptual_skills") == {("Source",): (1, 1.0, 0, 0), ("Texture",): (2, 0.5, 0, 0)}
    assert rows(results, "part") == {("closed",): (2, 0.5, 0, 0)}


def test_the_text_shows_scores_intervals_and_what_is_missing(tmp_path):
    benchmark = loaded(
        tmp_path / "mmar.json", "mmar", [mmar_record("a"), mmar_record("b", answer="Elsewhere")], keep_defective=True
    )
    text = results_of(benchmark, a="At sea").markdown()
    assert text.startswith("# MMAR\n")
    assert "|  | items | score % | interval | missing | unparsable |" in text
    assert "| all | 2 | 50.00 | 9.45 to 90.55 | 1 | 0 |" in text
    assert "| modality | items |" in text and "| mix-sound-speech | 2 |" in text
    assert "- items whose published answer is not among two or more choices" in text and ": 1 (b)" in text
    assert "- chance is 50.00 % over the 2 items with choices" in text
    assert "- not a published set: 2 items, published are 1000 (MMAR)" in text


def test_the_comparison_in_words():
    comparison = compare_paired([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0], samples=200, seed=0, confidence=0.95)
    text = comparison_markdown(comparison)
    assert "difference +25.00 points" in text
    assert "first against second: not settled; excluded are a loss of more than" in text
    assert "right in the first run only: 2, in the second only: 1; exact McNemar p = 1.0000" in text
    assert "ratings" in comparison_markdown(
        compare_paired([0.8, 1.0], [1.0, 1.0], samples=200, seed=0, confidence=0.95)
    )
