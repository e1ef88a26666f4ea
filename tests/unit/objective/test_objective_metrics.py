import json
import math
from collections.abc import Callable

import pytest
import torch

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective import mapo_loss
from nemo_mapo.types import Maximum, Metric, ObjectiveInputs, merge_metrics, reduced

Build = Callable[..., ObjectiveInputs]

NAMES = {
    "train/policy_loss",
    "train/kl_loss",
    "train/attention_loss",
    "train/loss",
    "train/clip_share",
    "train/ratio_max",
    "train/entropy_nats",
    "mapo/audio_mass",
    "mapo/audio_mass_early",
    "mapo/audio_mass_late",
    "mapo/delta_h_abs_nats",
    "mapo/mask_max",
    "mapo/mask_mean_max",
    "mapo/mask_entropy",
    "mapo/mask_capped_share",
    "mapo/inverse_mask_max",
    "mapo/gate_share",
    "mapo/gate_fallbacks_empty",
    "mapo/prefactor",
    "mapo/term",
    "mapo/term_attention",
    "mapo/term_mask",
}


def figures(inputs: ObjectiveInputs, **options: object) -> dict[str, float]:
    return merge_metrics([mapo_loss(inputs, ObjectiveConfig(**options)).metrics])


def test_every_figure_is_there_detached_and_scalar(make_inputs: Build) -> None:
    metrics = mapo_loss(make_inputs(), ObjectiveConfig()).metrics
    assert metrics.keys() == NAMES
    for metric in metrics.values():
        assert metric.total.shape == metric.weight.shape == ()
        assert not metric.total.requires_grad


def test_token_means_by_hand(make_inputs: Build) -> None:
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]], dtype=torch.float64)
    text_ref = torch.tensor([[1.5, 1.0, 3.0], [6.0, 5.0, 0.0]], dtype=torch.float64)
    found = figures(make_inputs(entropy_nats=entropy, text_ref_entropy_nats=text_ref))
    assert found["train/entropy_nats"] == pytest.approx(15 / 5)
    assert found["mapo/delta_h_abs_nats"] == pytest.approx((0.5 + 1 + 0 + 2 + 0) / 5)
    assert found["mapo/gate_share"] == pytest.approx(3 / 5)
    assert found["mapo/prefactor"] == pytest.approx((0.1 + 1.0) / 2)


def test_audio_mass_by_thirds(make_inputs: Build) -> None:
    # Three tokens: first and last. Two tokens: their middles lie at 1/4 and 3/4.
    found = figures(make_inputs())
    assert found["mapo/audio_mass"] == pytest.approx((0.5 + 0.25 + 0.1 + 0.2 + 0.4) / 5)
    assert found["mapo/audio_mass_early"] == pytest.approx((0.5 + 0.2) / 2)
    assert found["mapo/audio_mass_late"] == pytest.approx((0.1 + 0.4) / 2)


def test_thirds_of_six_tokens_are_two_tokens_each() -> None:
    mass = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    zeros, every = torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool)
    inputs = ObjectiveInputs(
        log_probs=zeros,
        old_log_probs=zeros,
        ref_log_probs=zeros,
        entropy_nats=zeros,
        text_ref_entropy_nats=zeros,
        audio_mass=mass,
        pos_gate=every,
        response_mask=every,
        advantages=torch.ones(1),
        accuracy_rewards=torch.ones(1),
        finished=torch.ones(1, dtype=torch.bool),
        global_sequences=1,
        global_tokens=6,
    )
    found = figures(inputs)
    assert found["mapo/audio_mass_early"] == pytest.approx(0.15)
    assert found["mapo/audio_mass_late"] == pytest.approx(0.55)


def test_ratio_and_clip_share_by_hand(make_inputs: Build) -> None:
    # Ratios 1.5, 1, 1 with A = 1 and 1, 0.5 with A = -1: the first and the last token are clipped.
    old = torch.tensor([[-1.0 - math.log(1.5), -0.5, -2.0], [-1.5, -1.0 + math.log(2), -9.0]], dtype=torch.float64)
    found = figures(make_inputs(old_log_probs=old))
    assert found["train/ratio_max"] == pytest.approx(1.5)
    assert found["train/clip_share"] == pytest.approx(2 / 5)


def test_mask_metrics_by_hand(make_inputs: Build) -> None:
    # Row 1 flat: omega = 1, 1, 1. Row 2: odds 1 to 3, omega = 1/2, 3/2.
    delta_h = torch.tensor([[0.7, 0.7, 0.7], [0.0, math.log(2) * math.log(3), 50.0]], dtype=torch.float64)
    inputs = make_inputs(entropy_nats=torch.zeros(2, 3, dtype=torch.float64), text_ref_entropy_nats=delta_h)
    found = figures(inputs, mask_clip=1.25)
    assert found["mapo/mask_max"] == pytest.approx(1.25)
    assert found["mapo/mask_mean_max"] == pytest.approx((1 + 1.25) / 2)
    assert found["mapo/mask_capped_share"] == pytest.approx(1 / 5)
    low, high = 0.5 / 1.75, 1.25 / 1.75
    entropy = -(low * math.log(low) + high * math.log(high)) / math.log(2)
    assert found["mapo/mask_entropy"] == pytest.approx((1 + entropy) / 2)
    assert found["mapo/inverse_mask_max"] == pytest.approx(1.0)


def test_gate_fallbacks_count_completions_without_substantive_token(make_inputs: Build) -> None:
    gate = torch.tensor([[False, False, False], [False, False, True]])  # the second row's lies on padding
    assert figures(make_inputs(pos_gate=gate))["mapo/gate_fallbacks_empty"] == 1.0
    assert figures(make_inputs(pos_gate=gate))["mapo/gate_share"] == 0.0
    gate[0, 0] = True
    assert figures(make_inputs(pos_gate=gate))["mapo/gate_fallbacks_empty"] == 0.5


def test_the_mapo_term_is_its_two_parts(make_inputs: Build) -> None:
    old = torch.tensor([[-1.0, -0.4, -2.0], [-1.4, -1.0, 0.0]], dtype=torch.float64)
    found = figures(make_inputs(old_log_probs=old), eta=0.3)
    assert found["mapo/term_attention"] == pytest.approx(0.3 * found["train/attention_loss"], rel=1e-14)
    assert found["mapo/term_mask"] > 0
    assert found["mapo/term"] == pytest.approx(found["mapo/term_attention"] + found["mapo/term_mask"], rel=1e-14)


def test_the_mask_part_by_hand_does_not_cancel_between_rows(make_inputs: Build) -> None:
    # Ratios 1.1, 1 in both rows with A = 1 and -1 and omega odds 3 to 1 (delta h = ln 2 ln 3): each row moves by 0.025.
    two = {
        "log_probs": torch.zeros(2, 2, dtype=torch.float64),
        "old_log_probs": torch.tensor([[-math.log(1.1), 0.0]] * 2, dtype=torch.float64),
        "ref_log_probs": torch.zeros(2, 2, dtype=torch.float64),
        "entropy_nats": torch.zeros(2, 2, dtype=torch.float64),
        "text_ref_entropy_nats": torch.tensor([[math.log(2) * math.log(3), 0.0]] * 2, dtype=torch.float64),
        "audio_mass": None,
        "pos_gate": torch.ones(2, 2, dtype=torch.bool),
        "response_mask": torch.ones(2, 2, dtype=torch.bool),
    }
    found = figures(make_inputs(**two), eta=0.0)
    assert found["mapo/term_mask"] == pytest.approx(0.025, rel=1e-10)
    assert found["mapo/term_attention"] == 0.0


def test_plain_grpo_has_no_mapo_term_and_flat_masks(make_inputs: Build) -> None:
    found = figures(make_inputs(), mask="none", eta=0.0)
    assert found["mapo/term"] == found["mapo/term_mask"] == found["mapo/term_attention"] == 0.0
    assert found["mapo/mask_max"] == found["mapo/mask_mean_max"] == 1.0
    assert found["mapo/mask_entropy"] == pytest.approx(1.0)


def test_a_one_token_completion_has_no_mask_entropy(make_inputs: Build) -> None:
    inputs = make_inputs(response_mask=torch.tensor([[True, False, False]] * 2))
    assert "mapo/mask_entropy" not in figures(inputs)


def test_a_maximum_stays_one_over_micro_batches_steps_and_ranks_and_means_are_of_those_that_have_them():
    def part(mean, largest):
        one = torch.tensor(1.0)
        return {
            "mean": Metric(total=torch.tensor(mean), weight=one),
            "most": Metric(total=torch.tensor(largest), weight=one, reduce="max"),
        }

    steps = [merge_metrics([part(1.0, 4.0), part(3.0, 2.0)]), merge_metrics([part(4.0, 1.0)]) | {"once": 5.0}]
    assert reduced(steps) == {"mean": 3.0, "most": 4.0, "once": 5.0}
    assert reduced([reduced(steps), {"most": Maximum(7.0)}])["most"] == 7.0
    assert json.loads(json.dumps(reduced(steps))) == reduced(steps)
