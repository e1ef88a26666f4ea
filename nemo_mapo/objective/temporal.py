"""Temporal weight: the attention loss leans on late tokens, where listening fades."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def temporal_weight(
    response_mask: Bool[Tensor, "batch time"], *, kappa: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch time"]:
    """Weight (t / T)^kappa of the t-th of T completion tokens, t = 1..T; 0 on padding.

    Tokens are counted by `response_mask`, so padding may stand anywhere. kappa = 0 gives weight 1.
    """
    lengths = response_mask.sum(-1, keepdim=True).clamp(min=1)
    relative = token_positions(response_mask).to(dtype) / lengths.to(dtype)
    return relative.pow(kappa).masked_fill(~response_mask, 0.0)


def part_of_token(response_mask: Bool[Tensor, "*batch time"], parts: int) -> Int[Tensor, "*batch time"]:
    """Which of `parts` equal parts of its completion each token is in, from 0, by its middle (2 t - 1) / (2 T)."""
    lengths = response_mask.sum(-1, keepdim=True).clamp(min=1)
    # Integer arithmetic, so that borders are exact.
    return (2 * token_positions(response_mask) - 1) * parts // (2 * lengths)


def token_positions(response_mask: Bool[Tensor, "*batch time"]) -> Int[Tensor, "*batch time"]:
    """1 for a row's first completion token, T for its last; padding repeats its predecessor."""
    return response_mask.cumsum(-1)
