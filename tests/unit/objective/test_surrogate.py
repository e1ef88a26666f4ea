import math

import pytest
import torch

from nemo_mapo.objective.surrogate import Surrogate, clipped_surrogate


def surrogate(ratios: list[list[float]], advantages: list[float], **options: object) -> tuple[Surrogate, torch.Tensor]:
    """Surrogate of completions with these importance ratios (0 marks padding), and the log-probability leaf."""
    ratio = torch.tensor(ratios, dtype=torch.float64)
    response_mask = ratio > 0
    log_probs = ratio.log().masked_fill(~response_mask, torch.nan).requires_grad_()
    values = {"clip_low": 0.2, "clip_high": 0.2} | options
    advantage = torch.tensor(advantages, dtype=torch.float64)
    return (
        clipped_surrogate(log_probs, torch.zeros_like(ratio), advantage, response_mask, **values),  # type: ignore[arg-type]
        log_probs,
    )


def test_token_losses_by_hand() -> None:
    # A = 2: 0.5 and 1.1 unclipped, 1.5 clipped to 1.2.  A = -2: 0.5 clipped to 0.8, 1.1 and 1.5 unclipped.
    result, _ = surrogate([[0.5, 1.1, 1.5], [0.5, 1.1, 1.5]], [2.0, -2.0])
    expected = torch.tensor([[-1.0, -2.2, -2.4], [1.6, 2.2, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(result.token_losses, expected, rtol=1e-14, atol=0)
    assert result.clipped.tolist() == [[False, False, True], [True, False, False]]
    torch.testing.assert_close(result.ratio, torch.tensor([[0.5, 1.1, 1.5]] * 2, dtype=torch.float64))


def test_gradient_by_hand_is_minus_ratio_times_advantage_or_zero_where_clipped() -> None:
    result, log_probs = surrogate([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]], [2.0, -2.0])
    result.token_losses.sum().backward()
    expected = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 2.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-14, atol=0)


def test_clip_higher_moves_only_the_upper_bound() -> None:
    result, _ = surrogate([[1.5, 1.1], [0.5, 1.1]], [1.0, -1.0], clip_high=0.28)
    expected = torch.tensor([[-1.28, -1.1], [0.8, 1.1]], dtype=torch.float64)
    torch.testing.assert_close(result.token_losses, expected, rtol=1e-14, atol=0)


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    result, log_probs = surrogate([[2.0, 10.0], [0.5, 10.0]], [-1.5, 1.5], dual_clip=3.0)
    expected = torch.tensor([[3.0, 4.5], [-0.75, -1.8]], dtype=torch.float64)
    torch.testing.assert_close(result.token_losses, expected, rtol=1e-14, atol=0)
    assert result.clipped.tolist() == [[False, True], [False, True]]
    result.token_losses.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([3.0, 0.0])


def test_sequence_ratio_by_hand_is_the_geometric_mean() -> None:
    result, _ = surrogate([[0.5, 2.0, 1.0], [1.1, 1.3, 0.0]], [1.0, 1.0], ratio="sequence")
    mean = math.sqrt(1.1 * 1.3)
    expected = torch.tensor([[-1.0, -1.0, -1.0], [-mean, -mean, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(result.token_losses, expected, rtol=1e-14, atol=1e-15)


def test_sequence_ratio_has_the_gradient_of_gspo() -> None:
    ratios, advantages = [[0.9, 1.1, 1.2], [1.5, 1.4, 1.6]], [1.0, 2.0]
    result, log_probs = surrogate(ratios, advantages, ratio="sequence")
    result.token_losses.mean(-1).sum().backward()

    leaf = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    sequence_ratio = leaf.mean(-1).exp()
    advantage = torch.tensor(advantages, dtype=torch.float64)
    gspo = -torch.min(sequence_ratio * advantage, sequence_ratio.clamp(0.8, 1.2) * advantage)
    gspo.sum().backward()
    torch.testing.assert_close(result.token_losses.mean(-1), gspo, rtol=1e-14, atol=0)
    torch.testing.assert_close(log_probs.grad, leaf.grad, rtol=1e-13, atol=1e-16)


def test_sequence_ratio_lets_token_weights_act() -> None:
    result, log_probs = surrogate([[1.0, 1.0]], [1.0], ratio="sequence")
    (torch.tensor([[1.5, 0.5]], dtype=torch.float64) * result.token_losses).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.5, -0.5]]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_padding_with_nan_touches_neither_value_nor_gradient(ratio: str) -> None:
    result, log_probs = surrogate([[1.1, 0.0], [0.0, 0.0]], [1.0, 1.0], ratio=ratio)
    result.token_losses.sum().backward()
    assert result.token_losses.isfinite().all()
    assert log_probs.grad is not None
    assert log_probs.grad[0, 0].item() == pytest.approx(-1.1)
    assert log_probs.grad.flatten()[1:].tolist() == [0.0] * 3
