"""Each warning fires on the run it is about, and a healthy run has none."""

import pytest

from nemo_mapo.reports.warnings import FLAT_MASK_PEAK, SILENT_GAP_MIN, VANISHED_TERM, find_warnings


def keys(run):
    return [finding.key for finding in find_warnings(run.metrics, run.objective, chance=0.25)]


def test_a_healthy_run_has_no_warnings(make_run):
    assert keys(make_run()) == []


def test_no_metrics_give_no_warnings():
    assert find_warnings([], {}, chance=0.25) == []
    assert find_warnings([{"step": step} for step in range(50)], {}, chance=0.25) == []


def test_reasoning_that_shrinks_while_accuracy_climbs_is_reported_with_both_numbers(make_run):
    run = make_run()
    run.change("rollout/reasoning_words", lambda progress: 60 - 57 * progress)
    run.change("rollout/accuracy", lambda progress: 0.4 + 0.2 * progress)
    (finding,) = find_warnings(run.metrics, run.objective, chance=0.25)
    assert finding.key == "reasoning_collapse"
    assert "from 56 to 5.1" in finding.detail
    assert "accuracy rose from 0.41 to 0.59" in finding.detail


def test_a_rising_reward_is_enough_where_accuracy_stands_still(make_run):
    run = make_run()
    run.change("rollout/reasoning_words", lambda progress: 60 - 57 * progress)
    run.change("rollout/accuracy", lambda progress: 0.4)
    run.change("rollout/reward_mean", lambda progress: 2 + progress)
    assert keys(run) == ["reasoning_collapse"]


def test_reasoning_that_shrinks_with_a_falling_reward_is_no_hidden_collapse(make_run):
    run = make_run()
    run.change("rollout/reasoning_words", lambda progress: 60 - 57 * progress)
    run.change("rollout/accuracy", lambda progress: 0.5 - 0.3 * progress)
    run.change("rollout/reward_mean", lambda progress: 3 - progress)
    assert keys(run) == []


def test_a_tenth_less_reasoning_is_fine(make_run):
    run = make_run()
    run.change("rollout/reasoning_words", lambda progress: 60 - 6 * progress)
    assert keys(run) == []


@pytest.mark.parametrize(("size", "expected"), [(0.9 * VANISHED_TERM, ["mapo_vanished"]), (1.1 * VANISHED_TERM, [])])
def test_vanishing_terms_are_reported_by_size_whatever_their_sign(make_run, size, expected):
    run = make_run()
    run.change("mapo/term", lambda progress: -size)
    assert keys(run) == expected


def test_plain_grpo_has_no_terms_and_no_mask_to_warn_about(make_run):
    run = make_run(eta=0)
    run.objective |= {"mask": "none", "eta": 0}
    run.change("mapo/term", lambda progress: 0.0)
    run.change("mapo/mask_mean_max", lambda progress: 1.0)
    assert keys(run) == []


@pytest.mark.parametrize(("peak", "expected"), [(FLAT_MASK_PEAK - 0.01, ["flat_masks"]), (FLAT_MASK_PEAK + 0.01, [])])
def test_flat_masks_are_reported_with_what_to_do(make_run, peak, expected):
    run = make_run(eta=0)
    run.change("mapo/mask_mean_max", lambda progress: peak)
    findings = find_warnings(run.metrics, run.objective, chance=0.25)
    assert [finding.key for finding in findings] == expected
    for finding in findings:
        assert "objective.tau_base" in finding.advice
        assert "objective.normalize_delta_h=true" in finding.advice


def test_a_lone_peak_in_an_even_mask_is_still_flat(make_run):
    run = make_run(eta=0)
    run.change("mapo/mask_mean_max", lambda progress: 1.6)
    run.change("mapo/mask_entropy", lambda progress: 0.9988)
    (finding,) = find_warnings(run.metrics, run.objective, chance=0.25)
    assert finding.key == "flat_masks"
    assert "99.9% of the entropy" in finding.detail


def test_the_shipped_default_is_not_called_plain_grpo_for_its_flat_mask(make_run):
    run = make_run()
    run.change("mapo/mask_mean_max", lambda progress: 1.05)
    run.change("mapo/mask_entropy", lambda progress: 0.999)
    assert keys(run) == []


def test_one_gate_fallback_is_enough_and_its_reason_is_named(make_run):
    run = make_run()
    run.metrics[20] |= {"mapo/gate_fallbacks": 0.25, "mapo/gate_fallback_misaligned": 0.25}
    (finding,) = find_warnings(run.metrics, run.objective, chance=0.25)
    assert finding.key == "gate_fallbacks"
    assert "at 1 of 40 steps (misaligned)" in finding.detail


@pytest.mark.parametrize(("gap", "expected"), [(SILENT_GAP_MIN - 0.01, ["not_listening"]), (SILENT_GAP_MIN + 0.01, [])])
def test_high_mass_without_loss_under_silence_is_not_listening(make_run, gap, expected):
    run = make_run()
    run.metrics[-1] |= {"val/accuracy": 0.6, "val/accuracy_silent": 0.6 - gap, "val/audio_mass": 0.5}
    assert keys(run) == expected


@pytest.mark.parametrize(("accuracy", "expected"), [(0.29, []), (0.31, ["not_listening"])])
def test_at_chance_there_is_nothing_to_lose_to_silence(make_run, accuracy, expected):
    run = make_run()
    run.metrics[-1] |= {"val/accuracy": accuracy, "val/accuracy_silent": accuracy, "val/audio_mass": 0.5}
    assert keys(run) == expected


def test_low_mass_without_loss_under_silence_is_another_matter(make_run):
    run = make_run()
    run.metrics[-1] |= {"val/accuracy": 0.6, "val/accuracy_silent": 0.6, "val/audio_mass": 0.02}
    assert keys(run) == []


def test_kl_is_reported_when_high_and_when_it_bends_upwards(make_run):
    high, bent, steady = make_run(), make_run(), make_run()
    high.change("train/kl_loss", lambda progress: 0.6)
    bent.change("train/kl_loss", lambda progress: 0.4 * progress**4)
    steady.change("train/kl_loss", lambda progress: 0.4 * progress)
    assert keys(high) == ["kl_runaway"]
    assert keys(bent) == ["kl_runaway"]
    assert keys(steady) == []


@pytest.mark.parametrize(("accuracy", "advice"), [(0.95, "harder"), (0.05, "easier")])
def test_many_equal_groups_are_reported_with_advice_that_fits_the_accuracy(make_run, accuracy, advice):
    run = make_run()
    run.change("rollout/equal_reward_groups", lambda progress: 0.7)
    run.change("rollout/accuracy", lambda progress: accuracy)
    (finding,) = find_warnings(run.metrics, run.objective, chance=0.25)
    assert finding.key == "equal_groups" and f"use {advice} questions" in finding.advice


@pytest.mark.parametrize(
    ("finished", "form", "advice"),
    [(0.0, 0.0, "max_new_tokens"), (1.0, 0.0, "data.prompt.instruction"), (1.0, 1.0, "easier questions")],
)
def test_a_run_without_any_reward_is_not_advised_to_use_harder_questions(make_run, finished, form, advice):
    run = make_run()
    nothing = {"rollout/reward_mean": 0.0, "rollout/accuracy": 0.0, "rollout/equal_reward_groups": 1.0}
    for key, value in (nothing | {"rollout/format": form, "rollout/finished_share": finished}).items():
        run.change(key, lambda progress, value=value: value)
    (finding,) = find_warnings(run.metrics, run.objective, chance=0.25)
    assert finding.key == "no_reward"
    assert advice in finding.advice and "harder" not in finding.advice


def test_the_first_step_with_a_nan_is_named(make_run):
    run = make_run()
    for record in run.metrics[12:]:
        record["train/loss"] = float("nan")
    (finding,) = find_warnings(run.metrics, run.objective, chance=0.25)
    assert finding.key == "not_finite"
    assert "train/loss (from step 12)" in finding.detail
