"""Truncated importance weights, for tokens sampled from a distribution other than the policy being trained."""

from jaxtyping import Bool, Float
from torch import Tensor


def behaviour_weights(
    old_log_probs: Float[Tensor, "batch time"],
    behaviour_log_probs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    clip: float,
) -> Float[Tensor, "batch time"]:
    """Weight w_t = min(pi_old(y_t) / mu(y_t), C) of each completion token, detached; 0 on padding.

    The surrogate's expectation is over pi_old, but the samples are from mu, which differs in weights, temperature,
    top-k or top-p. The cap bounds the variance at the price of a bias (truncated importance sampling, Ionides 2008).

    Args:
        old_log_probs: log pi_old(y_t) in nats, of the policy at the start of the step.
        behaviour_log_probs: log mu(y_t) in nats, normalised over the tokens that could be drawn.
        response_mask: True on completion tokens; nothing outside it enters.
        clip: C, the largest weight.
    """
    log_ratio = (old_log_probs - behaviour_log_probs).detach().masked_fill(~response_mask, 0.0)
    return log_ratio.exp().clamp(max=clip).masked_fill(~response_mask, 0.0)
