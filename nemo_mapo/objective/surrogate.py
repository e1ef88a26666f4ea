"""Clipped policy-gradient surrogate of GRPO and its variants."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """Token losses of the policy gradient, and what the clip did; all 0 (False) on padding."""

    token_losses: Float[Tensor, "batch time"]
    """Differentiable in the log-probabilities."""
    ratio: Float[Tensor, "batch time"]
    """Importance ratio, detached."""
    clipped: Bool[Tensor, "batch time"]
    """True where the clip removed the gradient."""


def clipped_surrogate(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    ratio: Literal["token", "sequence"] = "token",
) -> Surrogate:
    """PPO's pessimistic surrogate for each token.

    l_t = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A),  rho_t = pi(y_t) / pi_old(y_t).

    Args:
        log_probs: log pi(y_t) in nats, differentiable.
        old_log_probs: log pi_old(y_t) in nats.
        advantages: A, one per row.
        response_mask: True on completion tokens; nothing outside it enters values or gradients.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1; above `clip_low` this is DAPO's clip-higher.
        dual_clip: c > 1; for A < 0 the loss is at most c |A|, however large the ratio (Ye et al. 2020).
        ratio: `sequence` takes GSPO's ratio rho = exp(mean_t log(pi / pi_old)) for every token, in its per-token form:
            the value is the sequence's, but the gradient of token t flows through y_t only, so that token weights act
            on it. Without token weights the gradient of a row's mean is exactly GSPO's.
    """
    log_ratio = (log_probs - old_log_probs).masked_fill(~response_mask, 0.0)
    if ratio == "sequence":
        lengths = response_mask.sum(-1, keepdim=True).clamp(min=1)
        sequence_log_ratio = log_ratio.detach().sum(-1, keepdim=True) / lengths
        log_ratio = sequence_log_ratio + (log_ratio - log_ratio.detach())
    importance = log_ratio.exp()
    advantage = advantages.detach().unsqueeze(-1)
    unclipped = importance * advantage
    gain = torch.min(unclipped, importance.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.max(gain, dual_clip * advantage), gain)
    return Surrogate(
        token_losses=(-gain).masked_fill(~response_mask, 0.0),
        ratio=importance.detach().masked_fill(~response_mask, 0.0),
        clipped=(gain != unclipped).detach() & response_mask,
    )
