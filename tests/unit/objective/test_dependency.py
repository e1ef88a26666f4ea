"""VPPO: dependency on the audio by hand, the tokens it keeps, and the factors of completions."""

import math
from collections.abc import Callable

import pytest
import torch

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.dependency import LARGEST_NATS, audio_dependency, completion_scales, dependency_mask
from nemo_mapo.objective.mapo import mapo_loss
from nemo_mapo.types import ObjectiveInputs

Build = Callable[..., ObjectiveInputs]
OLD = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_dependency_by_hand() -> None:
    text_only = torch.tensor([[-1.0, -3.0, -0.25]], dtype=torch.float64)
    expected = torch.tensor([[0.0, math.exp(-1) + 1 - 1, math.exp(0.25) - 0.25 - 1]], dtype=torch.float64)
    torch.testing.assert_close(audio_dependency(OLD, text_only, ALL), expected, rtol=1e-14, atol=1e-16)


def test_one_token_counts_ten_nats_at_most_and_padding_nothing() -> None:
    text_only = torch.tensor([[-40.0, math.nan, 60.0]], dtype=torch.float64)
    kept = torch.tensor([[True, False, True]])
    assert audio_dependency(OLD, text_only, kept).tolist() == [[LARGEST_NATS, 0.0, LARGEST_NATS]]


def test_nothing_carries_gradient() -> None:
    leaves = [OLD.clone().requires_grad_(), (OLD - 1).requires_grad_()]
    dependency = audio_dependency(leaves[0], leaves[1], ALL)
    assert not dependency.requires_grad and not dependency_mask(dependency, ALL, share=0.4).requires_grad


@pytest.mark.parametrize(("share", "expected"), [(0.01, [0, 0, 1]), (0.4, [1, 0, 1]), (1.0, [1, 1, 1])])
def test_the_most_dependent_tokens_learn(share: float, expected: list[int]) -> None:
    assert dependency_mask(torch.tensor([[0.2, 0.1, 3.0]]), ALL, share=share).tolist() == [expected]


def test_factors_by_hand_have_the_floor_and_mean_1() -> None:
    scales = completion_scales(torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64), floor=0.9)
    # n = 0, 0.5, 1 with mean 0.5: the largest is 0.9 + 0.1 / 0.5.
    torch.testing.assert_close(scales, torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64), rtol=1e-14, atol=0)
    assert completion_scales(torch.full((3,), 0.2), floor=0.9).tolist() == [1.0, 1.0, 1.0]
    assert completion_scales(torch.tensor([0.2]), floor=0.9).tolist() == [1.0]


def test_factors_follow_their_completions_and_not_the_unit() -> None:
    means, order = torch.rand(6, dtype=torch.float64), torch.randperm(6)
    scales = completion_scales(means, floor=0.5)
    torch.testing.assert_close(completion_scales(means[order], floor=0.5), scales[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(completion_scales(7 * means, floor=0.5), scales, rtol=1e-12, atol=0)
    torch.testing.assert_close(scales.mean(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_policy_gradient_by_hand_follows_the_vppo_mask(make_inputs: Build) -> None:
    # One token of each completion learns, the one whose log-prob falls most without the audio.
    text_only = torch.tensor([[-1.0, -3.0, -2.5], [-4.0, -1.0, 9.0]], dtype=torch.float64)
    inputs = make_inputs(text_only_log_probs=text_only)
    loss = mapo_loss(inputs, ObjectiveConfig(mask="vppo", vppo_share=0.2, eta=0.0, beta=0.0)).loss
    expected = torch.tensor([[0.0, -0.5, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs.log_probs)[0], expected, rtol=1e-14, atol=0)


def test_a_vppo_mask_of_all_tokens_is_exactly_grpo_and_one_without_its_pass_is_refused(make_inputs: Build) -> None:
    inputs = make_inputs(text_only_log_probs=torch.randn(2, 3, dtype=torch.float64))
    whole = mapo_loss(inputs, ObjectiveConfig(mask="vppo", vppo_share=1.0, eta=0.0)).loss
    assert torch.equal(whole, mapo_loss(make_inputs(), ObjectiveConfig(mask="none", eta=0.0)).loss)
    with pytest.raises(
        ValueError, match=r"objective\.mask=vppo needs the policy's log-probabilities without the audio"
    ):
        mapo_loss(make_inputs(), ObjectiveConfig(mask="vppo"))
