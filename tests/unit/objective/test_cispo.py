"""CISPO: a capped, detached importance weight, and a gradient for every token."""

import math

import torch

from nemo_mapo.objective.cispo import cispo_surrogate
from nemo_mapo.objective.surrogate import clipped_surrogate

LN2 = math.log(2)
RATIOS = torch.tensor([[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
OLD = torch.full((2, 3), -LN2, dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -2.0], dtype=torch.float64)
ALL = torch.ones(2, 3, dtype=torch.bool)


def losses(log_probs: torch.Tensor, response_mask: torch.Tensor = ALL, clip_high: float = 0.5) -> torch.Tensor:
    return cispo_surrogate(log_probs, OLD, ADVANTAGES, response_mask, clip_high=clip_high).token_losses


def test_token_losses_and_gradients_by_hand() -> None:
    # log pi = log rho - ln 2 = -2 ln 2, -ln 2, 0; the weights are 0.5, 1 and 2 capped to 1.5.
    log_probs = (OLD + RATIOS.log()).requires_grad_()
    result = cispo_surrogate(log_probs, OLD, ADVANTAGES, ALL, clip_high=0.5)
    expected = torch.tensor([[2 * LN2, 2 * LN2, 0.0], [-2 * LN2, -2 * LN2, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(result.token_losses, expected, rtol=0, atol=1e-14)
    assert result.clipped.tolist() == [[False, False, True]] * 2
    torch.testing.assert_close(result.ratio, RATIOS)
    result.token_losses.sum().backward()
    gradient = torch.tensor([[-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(log_probs.grad, gradient, rtol=1e-14, atol=0)


def test_gradcheck_where_the_weights_do_not_move() -> None:
    """The weight is detached, so finite differences see it constant only at a cap below every ratio."""
    log_probs = (OLD + RATIOS.log() + 2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses(x, clip_high=0.1), (log_probs,))


def test_on_policy_the_gradient_is_that_of_the_clipped_surrogate() -> None:
    ours, theirs = OLD.clone().requires_grad_(), OLD.clone().requires_grad_()
    losses(ours).sum().backward()
    clipped_surrogate(theirs, OLD, ADVANTAGES, ALL, clip_low=0.2, clip_high=0.2).token_losses.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-14, atol=0)


def test_padding_has_no_value_and_no_gradient() -> None:
    kept = torch.tensor([[True, False, False], [False, False, False]])
    log_probs = (OLD + RATIOS.log()).masked_fill(~kept, torch.nan).requires_grad_()
    result = losses(log_probs, kept)
    assert result.masked_fill(kept, 0.0).eq(0).all()
    result.sum().backward()
    assert log_probs.grad is not None and log_probs.grad.masked_fill(kept, 0.0).eq(0).all()
