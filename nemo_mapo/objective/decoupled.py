"""GDPO: each reward is normalised within its group before the rewards are added (arXiv 2601.05242)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.objective.advantages import group_advantages


def decoupled_advantages(
    rewards: Mapping[str, Sequence[float]], weights: Mapping[str, float], group_size: int, *, epsilon: float
) -> Float[Tensor, " batch"]:
    """Advantage of each completion, before division by the batch's scale.

    A = sum_k w_k (r_k - mean_G r_k) / (std_G r_k + epsilon): completions with the same total but different rewards get
    different advantages, and a reward that varies little counts as much as its weight says. GDPO then divides by the
    deviation over the whole rollout batch; A has mean 0 over every group, so that is `batch_scale`.

    Args:
        rewards: values of each reward, one per completion; the rows of one prompt are adjacent.
        weights: weight of each reward.
        group_size: G, completions per prompt.
        epsilon: added to each standard deviation.

    Raises:
        ValueError: as in `group_advantages`.
    """
    parts = [
        weights[name] * group_advantages(torch.tensor(values), group_size, use_std=True, epsilon=epsilon)
        for name, values in rewards.items()
        if weights[name] > 0
    ]
    return torch.stack(parts).sum(0)


def batch_scale(mean_square: float, *, epsilon: float) -> float:
    """Divisor of advantages with mean 0 and this mean square over the rollout batch: std + epsilon."""
    return float(mean_square**0.5 + epsilon)
