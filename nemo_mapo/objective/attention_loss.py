"""Attention loss (Eq. 4): raise the audio attention mass of tokens that should listen and do not."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def attention_prefactor(
    advantages: Float[Tensor, " batch"],
    accuracy_rewards: Float[Tensor, " batch"],
    *,
    fail_threshold: float,
    fail_gate_floor: float,
    advantage_floor: float,
    clip: float,
) -> Float[Tensor, " batch"]:
    """How hard a completion is pulled towards the audio: fully when it failed, a little otherwise.

    Eq. 4, first factor: min(f |A|', clip), with f = 1 and |A|' = max(|A|, advantage_floor) on a failed completion
    (accuracy reward at most `fail_threshold`), f = `fail_gate_floor` and |A|' = |A| on any other.

    The floor keeps the pull alive in a group that failed as a whole, where every advantage is 0. Detached.
    """
    failed = accuracy_rewards <= fail_threshold
    size = advantages.detach().abs()
    pull = torch.where(failed, size.clamp(min=advantage_floor), fail_gate_floor * size)
    return pull.clamp(max=clip)


def attention_loss(
    audio_mass: Float[Tensor, "batch time"],
    token_weights: Float[Tensor, "batch time"],
    gate: Bool[Tensor, "batch time"],
    prefactor: Float[Tensor, " batch"],
    *,
    epsilon: float,
) -> Float[Tensor, " batch"]:
    """Attention loss of each completion, differentiable in the audio mass.

    Eq. 4: L_attn = prefactor (1 / T_pos) sum_t (t / T)^kappa nu_t (-log(a_t + epsilon)),  T_pos = sum_t gate_t.

    Args:
        audio_mass: a_t, the share of attention on audio keys, in [0, 1]; read only on gated tokens.
        token_weights: (t / T)^kappa nu_t.
        gate: tokens that count; nothing outside it enters the value or the gradient.
        prefactor: `attention_prefactor`.
        epsilon: keeps the logarithm finite at mass 0.

    Returns:
        One value per row; 0 for a row without a gated token.
    """
    # Filled before the logarithm: its derivative at a NaN on padding would survive a mask applied afterwards.
    surprise = -(audio_mass.masked_fill(~gate, 1.0) + epsilon).log()
    gated_tokens = gate.sum(-1).clamp(min=1)
    return prefactor * (token_weights.masked_fill(~gate, 0.0) * surprise).sum(-1) / gated_tokens
