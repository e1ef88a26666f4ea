"""KL penalty against the frozen reference policy."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def k3_kl(
    log_probs: Float[Tensor, "batch time"],
    ref_log_probs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Schulman's k3 estimate of KL(pi || pi_ref) for each token, in nats, never negative; 0 on padding.

    k3 = e^d - d - 1,  d = log pi_ref(y_t) - log pi(y_t). Differentiable in `log_probs`.
    """
    difference = (ref_log_probs.detach() - log_probs).masked_fill(~response_mask, 0.0)
    # expm1, because e^d - 1 cancels for the small d of early training and the estimate turns negative.
    return torch.expm1(difference) - difference
