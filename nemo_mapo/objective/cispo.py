"""CISPO's surrogate: every token keeps a gradient, and its importance weight is capped instead (MiniMax-M1)."""

from jaxtyping import Bool, Float
from torch import Tensor

from nemo_mapo.objective.surrogate import Surrogate


def cispo_surrogate(
    log_probs: Float[Tensor, "batch time"],
    old_log_probs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    clip_high: float,
) -> Surrogate:
    """REINFORCE with a capped, detached importance weight for each token (arXiv 2506.13585, Eq. 4).

    l_t = -sg(min(rho_t, 1 + clip_high)) A log pi(y_t),  rho_t = pi(y_t) / pi_old(y_t).

    There is no lower bound, as in the paper's experiments. PPO's clip removes a token's gradient; this cap only bounds
    its size: dl/dlog pi = -min(rho_t, 1 + clip_high) A.

    Args:
        log_probs: log pi(y_t) in nats, differentiable.
        old_log_probs: log pi_old(y_t) in nats.
        advantages: A, one per row.
        response_mask: True on completion tokens; nothing outside it enters values or gradients.
        clip_high: how far the weight may rise above 1.

    Returns:
        Its `clipped` is True where the cap acts.
    """
    kept = log_probs.masked_fill(~response_mask, 0.0)
    importance = (kept - old_log_probs.masked_fill(~response_mask, 0.0)).detach().exp()
    weight = importance.clamp(max=1 + clip_high)
    losses = -weight * advantages.detach().unsqueeze(-1) * kept
    return Surrogate(
        token_losses=losses.masked_fill(~response_mask, 0.0),
        ratio=importance.masked_fill(~response_mask, 0.0),
        clipped=(importance > weight) & response_mask,
    )
