"""PAPO: the policy is rewarded for differing from what it says without the audio (arXiv 2507.06448)."""

from jaxtyping import Bool, Float
from torch import Tensor

from nemo_mapo.objective.dependency import LARGEST_NATS
from nemo_mapo.objective.kl import k3_kl


def perception_kl(
    log_probs: Float[Tensor, "batch time"],
    text_only_log_probs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Implicit perception term of each token in nats, at most 10; 0 on padding.

    KL_prcp = min(e^d - d - 1, 10),  d = log pi_old(y_t | text) - log pi_theta(y_t | text, audio): the k3 estimate of
    KL(pi_theta(. | text, audio) || pi(. | text)). The objective maximises it: L = L_GRPO - gamma mean KL_prcp. The
    second policy is that at the start of the step, without gradient, as is the default in the authors' code.
    Differentiable in `log_probs`, except where the cap applies.
    """
    return k3_kl(log_probs, text_only_log_probs, response_mask).clamp(max=LARGEST_NATS)


def entropy_estimate(
    log_probs: Float[Tensor, "batch time"], response_mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Entropy of the policy estimated at the drawn token, -log pi_theta(y_t), in nats; 0 on padding.

    PAPO adds eta times its mean to the loss (of the two terms of its double entropy loss, only this one has a
    gradient); VPPO adds it with another coefficient. Without it, noise would maximise the perception term.
    """
    return (-log_probs).masked_fill(~response_mask, 0.0)
