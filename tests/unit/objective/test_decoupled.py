"""GDPO: rewards are normalised one by one, so that combinations with equal totals stay apart."""

import math

import pytest
import torch

from nemo_mapo.objective import group_advantages
from nemo_mapo.objective.decoupled import batch_scale, decoupled_advantages

WEIGHTS = {"accuracy": 2.0, "format": 1.0}


def test_two_rewards_by_hand() -> None:
    # Accuracy 0, 1: deviations -1/2, 1/2, std sqrt(1/2). Format 1, 1 has none.
    advantages = decoupled_advantages({"accuracy": [0.0, 1.0], "format": [1.0, 1.0]}, WEIGHTS, 2, epsilon=0.5)
    one = 2 * 0.5 / (math.sqrt(0.5) + 0.5)
    assert advantages.tolist() == pytest.approx([-one, one], rel=1e-6)


def test_equal_totals_of_other_rewards_differ() -> None:
    """Totals 1, 1, 0: one completion is rare in what it gets right, and gains more."""
    rewards = {"accuracy": [1.0, 0.0, 0.0, 0.0], "format": [0.0, 1.0, 1.0, 0.0]}
    equal = {"accuracy": 1.0, "format": 1.0}
    decoupled = decoupled_advantages(rewards, equal, 4, epsilon=1e-4)
    coupled = group_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0]), 4, use_std=True, epsilon=1e-4)
    assert coupled[0] == coupled[1]
    assert decoupled[0] > decoupled[1] + 0.1


def test_one_reward_is_grpo_times_its_weight_and_weight_zero_is_left_out() -> None:
    values = [0.0, 1.0, 0.5, 0.5]
    plain = group_advantages(torch.tensor(values), 2, use_std=True, epsilon=1e-4)
    got = decoupled_advantages(
        {"accuracy": values, "format": [1.0, 0.0, 0.0, 1.0]}, WEIGHTS | {"format": 0.0}, 2, epsilon=1e-4
    )
    torch.testing.assert_close(got, 2 * plain)


def test_the_scale_of_a_reward_does_not_matter_and_groups_stay_centred() -> None:
    first = decoupled_advantages({"accuracy": [0.0, 1.0, 1.0, 0.2]}, WEIGHTS, 4, epsilon=1e-9)
    second = decoupled_advantages({"accuracy": [0.0, 0.1, 0.1, 0.02]}, WEIGHTS, 4, epsilon=1e-9)
    torch.testing.assert_close(first, second)
    assert float(first.sum()) == pytest.approx(0.0, abs=1e-6)


def test_the_batch_scale_makes_the_deviation_one() -> None:
    advantages = decoupled_advantages({"accuracy": [0.0, 1.0, 1.0, 0.2]}, WEIGHTS, 4, epsilon=1e-9)
    scaled = advantages / batch_scale(float((advantages**2).mean()), epsilon=1e-9)
    assert float((scaled**2).mean()) == pytest.approx(1.0, rel=1e-5)
    assert batch_scale(0.0, epsilon=1e-4) == 1e-4
