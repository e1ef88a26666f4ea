"""GDPO: every reward is normalised within its group before they are added (arXiv 2601.05242)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.objective.advantages import group_advantages


def decoupled_advantages(
    rewards: Mapping[str, Sequence[float]], weights: Mapping[str, float], group_size: int, *, epsilon: float
) -> Float[Tensor, " batch"]:
    """Advantage of each completion, before the batch's scale is taken out.

    A = sum_k w_k (r_k - mean_G r_k) / (std_G r_k + epsilon): two completions with the same total and other rewards
    differ, and a reward that varies little counts as much as its weight says. GDPO divides by the deviation over the
    whole rollout batch next; A has mean 0 over every group, so that is `batch_scale`.

    Args:
        rewards: values of each reward, one per completion; the rows of one prompt are adjacent.
        weights: of each reward.
        group_size: G, completions per prompt.
        epsilon: added to each standard deviation.

    Raises:
        ValueError: as `group_advantages`.
    """
    parts = [
        weights[name] * group_advantages(torch.tensor(values), group_size, use_std=True, epsilon=epsilon)
        for name, values in rewards.items()
        if weights[name] > 0
    ]
    return torch.stack(parts).sum(0)


def batch_scale(mean_square: float, *, epsilon: float) -> float:
    """What advantages of mean 0 and this mean square over the rollout batch are divided by: std + epsilon."""
    return float(mean_square**0.5 + epsilon)
