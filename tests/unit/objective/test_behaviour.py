"""Truncated importance weights against the distribution sampled from, by hand."""

import math
from collections.abc import Callable

import pytest
import torch

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.objective import mapo_loss
from nemo_mapo.objective.behaviour import behaviour_weights
from nemo_mapo.rollout.sampling import sampling_distribution
from nemo_mapo.types import ObjectiveInputs, merge_metrics

GRPO = ObjectiveConfig(mask="none", eta=0.0, beta=0.0)
CAPPED = ObjectiveConfig(mask="none", eta=0.0, beta=0.0, behaviour_clip=2.0)


def test_weights_by_hand() -> None:
    old = torch.tensor([[0.5, 0.2, 0.9, 0.3]], dtype=torch.float64).log()
    drawn_from = torch.tensor([[0.5, 0.8, 0.3, 0.1]], dtype=torch.float64).log()
    there = torch.tensor([[True, True, True, False]])
    weights = behaviour_weights(old, drawn_from, there, clip=2.0)
    expected = torch.tensor([[1.0, 0.25, 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_token_losses_are_multiplied_and_denominators_stay(make_inputs: Callable[..., ObjectiveInputs]) -> None:
    # The policy has not moved, so the ratio is 1 and a token's loss is -A; the weights of the rows are 1/2, 2 (capped
    # from 4), 1 and 1, 1/4.
    old = make_inputs().old_log_probs
    weights = torch.tensor([[0.5, 4.0, 1.0], [1.0, 0.25, 9.0]], dtype=torch.float64)
    inputs = make_inputs(behaviour_log_probs=old - weights.log())
    output = mapo_loss(inputs, CAPPED)
    expected = (-1.0 * (0.5 + 2.0 + 1.0) / 3 + 1.0 * (1.0 + 0.25) / 2) / 2
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-14)
    metrics = merge_metrics([output.metrics])
    assert metrics["train/behaviour_weight"] == pytest.approx((0.5 + 2.0 + 1.0 + 1.0 + 0.25) / 5)
    assert metrics["train/behaviour_clip_share"] == pytest.approx(1 / 5)


def test_on_its_own_samples_it_is_the_loss_without_weights(make_inputs: Callable[..., ObjectiveInputs]) -> None:
    inputs = make_inputs(behaviour_log_probs=make_inputs().old_log_probs)
    assert torch.equal(mapo_loss(inputs, CAPPED).loss, mapo_loss(inputs, GRPO).loss)


def test_the_weights_have_no_gradient(make_inputs: Callable[..., ObjectiveInputs]) -> None:
    inputs = make_inputs(behaviour_log_probs=make_inputs().old_log_probs - math.log(1.5))
    (gradient,) = torch.autograd.grad(mapo_loss(inputs, CAPPED).loss, inputs.log_probs)
    (plain,) = torch.autograd.grad(mapo_loss(inputs, GRPO).loss, inputs.log_probs)
    torch.testing.assert_close(gradient, 1.5 * plain)


def test_the_weights_undo_temperature_and_top_k_on_average() -> None:
    """The mean of w f over mu is that of f over pi on the tokens that can be drawn, with mu renormalised over them."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
    sampling = SamplingConfig(temperature=1.7, top_k=3)
    none = torch.tensor([], dtype=torch.int64)
    log_mu = sampling_distribution(
        logits, sampling, generated=none[None], forbidden_ids=none, stop_ids=torch.tensor([3])
    ).double()[0, :3]
    log_pi = logits.log_softmax(-1)[0, :3]
    assert float(log_mu.exp().sum()) == pytest.approx(1.0)
    weights = behaviour_weights(log_pi[None], log_mu[None], torch.ones(1, 3, dtype=torch.bool), clip=100.0)[0]
    values = torch.tensor([3.0, -1.0, 7.0], dtype=torch.float64)
    assert float((log_mu.exp() * weights * values).sum()) == pytest.approx(float((log_pi.exp() * values).sum()))


def test_without_behaviour_log_probs_it_is_refused(make_inputs: Callable[..., ObjectiveInputs]) -> None:
    with pytest.raises(ValueError, match=r"objective\.behaviour_clip=2\.0 needs"):
        mapo_loss(make_inputs(), CAPPED)


def test_a_sequence_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match=r"behaviour_clip=2\.0 weights tokens one by one"):
        ObjectiveConfig(behaviour_clip=2.0, ratio="sequence")
