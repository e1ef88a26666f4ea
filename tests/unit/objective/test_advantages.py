import math

import pytest
import torch

from nemo_mapo.objective import group_advantages
from nemo_mapo.objective.advantages import soft_overlong_penalty


def test_two_groups_by_hand() -> None:
    # Group 1: mean 2, deviations -2, 0, 2, std sqrt(8 / 2) = 2. Group 2: mean 1, deviations -1, -1, 2, std sqrt(6 / 2).
    rewards = torch.tensor([0.0, 2.0, 4.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    advantages = group_advantages(rewards, 3, use_std=True, epsilon=0.5)
    root = math.sqrt(3)
    expected = [-2 / 2.5, 0.0, 2 / 2.5, -1 / (root + 0.5), -1 / (root + 0.5), 2 / (root + 0.5)]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-14)


def test_without_std_only_the_mean_is_taken_off() -> None:
    rewards = torch.tensor([0.0, 2.0, 4.0, 0.0, 0.0, 3.0])
    assert group_advantages(rewards, 3, use_std=False, epsilon=1e-4).tolist() == [-2.0, 0.0, 2.0, -1.0, -1.0, 2.0]


def test_equal_rewards_have_no_advantage() -> None:
    assert group_advantages(torch.full((4,), 3.0), 4, use_std=True, epsilon=1e-4).tolist() == [0.0] * 4


def test_a_constant_added_to_a_group_changes_nothing() -> None:
    rewards = torch.tensor([0.0, 1.0, 5.0, 2.0], dtype=torch.float64)
    offset = torch.tensor([7.0, 7.0, -3.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(
        group_advantages(rewards + offset, 2, use_std=True, epsilon=1e-4),
        group_advantages(rewards, 2, use_std=True, epsilon=1e-4),
    )


def test_advantages_follow_a_permutation_of_groups_and_of_rows_within_one() -> None:
    rewards = torch.tensor([0.0, 1.0, 4.0, 3.0, 3.0, 9.0], dtype=torch.float64)
    order = torch.tensor([4, 3, 5, 2, 0, 1])
    plain = group_advantages(rewards, 3, use_std=True, epsilon=1e-4)
    torch.testing.assert_close(group_advantages(rewards[order], 3, use_std=True, epsilon=1e-4), plain[order])


def test_bad_groups_and_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size=1"):
        group_advantages(torch.zeros(4), 1, use_std=True, epsilon=1e-4)
    with pytest.raises(ValueError, match="5 rewards are not whole groups of 2"):
        group_advantages(torch.zeros(5), 2, use_std=True, epsilon=1e-4)
    with pytest.raises(ValueError, match=r"rows \[1, 2\] are not finite"):
        group_advantages(torch.tensor([0.0, torch.nan, torch.inf, 1.0]), 2, use_std=True, epsilon=1e-4)


def test_soft_overlong_penalty_by_hand() -> None:
    lengths = torch.tensor([0, 80, 85, 95, 100, 120])
    penalty = soft_overlong_penalty(lengths, max_length=100, buffer=20)
    assert penalty.tolist() == pytest.approx([0.0, 0.0, -0.25, -0.75, -1.0, -1.0])


def test_no_buffer_no_penalty() -> None:
    assert soft_overlong_penalty(torch.tensor([5, 100]), max_length=100, buffer=0).tolist() == [0.0, 0.0]


def test_a_buffer_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer=101"):
        soft_overlong_penalty(torch.tensor([5]), max_length=100, buffer=101)
