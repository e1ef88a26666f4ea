"""Token weights built on the policy's own entropy: only the forking tokens learn (arXiv 2506.01939)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def entropy_mask(
    entropy_nats: Float[Tensor, "batch time"], response_mask: Bool[Tensor, "batch time"], *, share: float
) -> Float[Tensor, "batch time"]:
    """Weight 1 on the tokens of a completion at which the policy is least certain, 0 on the others.

    omega_t = 1[rank of H_t among the T tokens of its completion <= k],  k = max(1, ceil(share T)).

    The paper takes the quantile over a batch; over a completion (as VPPO's entropy variant does, arXiv 2510.09285) no
    weight depends on how a batch is split. The earlier of tokens with equal entropy ranks first.

    Args:
        entropy_nats: H of the policy; read only on completion tokens.
        response_mask: True on completion tokens.
        share: share of a completion's tokens that learn, above 0 and at most 1; 1 is plain GRPO.

    Returns:
        Detached weights, 0 on padding. `entropy_mask(torch.tensor([[0.1, 2.0]]), kept, share=0.5)` is `[[0., 1.]]`.
    """
    return top_share(entropy_nats, response_mask, share=share)


def top_share(
    scores: Float[Tensor, "batch time"], response_mask: Bool[Tensor, "batch time"], *, share: float
) -> Float[Tensor, "batch time"]:
    """Weight 1 on the max(1, ceil(share T)) of the T tokens of a completion with the highest scores, 0 elsewhere.

    Detached; the earlier of tokens with equal scores ranks first.
    """
    lengths = response_mask.sum(-1, keepdim=True)
    # In float64, or 0.2 of 5 tokens would be more than one.
    counts = (lengths.to(torch.float64) * share - torch.finfo(torch.float32).eps).ceil().clamp(min=1)
    kept = scores.detach().masked_fill(~response_mask, -torch.inf)
    order = kept.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous()
    )
    return ((ranks < counts) & response_mask).to(scores.dtype)
