"""From rewards to group-relative advantages."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_GROUP = 2
"""A group of one has no spread to be relative to."""


def group_advantages(
    rewards: Float[Tensor, " batch"], group_size: int, *, use_std: bool, epsilon: float
) -> Float[Tensor, " batch"]:
    """Advantage of each completion within the group of its prompt.

    A = (r - mean_G r) / (std_G r + epsilon), std with Bessel's correction; A = r - mean_G r without `use_std`.

    Args:
        rewards: one per completion; the `group_size` rows of one prompt are adjacent.
        group_size: G, completions per prompt.
        use_std: divide by the group's standard deviation.
        epsilon: added to the standard deviation; a group of equal rewards has advantages 0.

    Raises:
        ValueError: a group size below 2, a batch that is not made of whole groups, or a reward that is not finite.
    """
    if group_size < SMALLEST_GROUP:
        raise ValueError(f"group_size={group_size} must be at least {SMALLEST_GROUP}")
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards are not whole groups of {group_size}")
    if not bool(torch.isfinite(rewards).all()):
        rows = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        raise ValueError(f"rewards of rows {rows} are not finite")
    groups = rewards.detach().view(-1, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    if use_std:
        centred = centred / (groups.std(-1, keepdim=True) + epsilon)
    return centred.flatten()


def soft_overlong_penalty(
    completion_lengths: Int[Tensor, " batch"], *, max_length: int, buffer: int
) -> Float[Tensor, " batch"]:
    """Term to add to the reward of a completion that comes close to the length limit (DAPO).

    p = -clamp((length - (max_length - buffer)) / buffer, 0, 1): 0 up to `buffer` tokens before the limit, -1 at the
    limit. A buffer of 0 switches it off.

    Raises:
        ValueError: a buffer that is negative or longer than the limit.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must lie between 0 and max_length={max_length}")
    if buffer == 0:
        return torch.zeros(completion_lengths.shape, device=completion_lengths.device)
    excess = (completion_lengths - (max_length - buffer)).to(torch.float32) / buffer
    return -excess.clamp(0, 1)
