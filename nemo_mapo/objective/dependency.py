"""VPPO (arXiv 2510.09285): dependency on the audio decides which tokens learn, and how much a completion counts."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nemo_mapo.objective.entropy_mask import top_share
from nemo_mapo.objective.kl import k3_kl

LARGEST_NATS = 10.0
"""Cap on the estimate of a single token, which is noisy when large; the authors' code has the same cap."""
_SAME = 1e-6
"""Completions whose means differ by less depend on the audio equally."""


def audio_dependency(
    old_log_probs: Float[Tensor, "batch time"],
    text_only_log_probs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Dependency S_t of each token on the audio in nats, detached, at most 10; 0 on padding.

    S_t = min(e^d - d - 1, 10),  d = log pi_old(y_t | text) - log pi_old(y_t | text, audio): the k3 estimate of
    KL(pi_old(. | text, audio) || pi_old(. | text)), both of the policy at the start of the step.
    """
    return k3_kl(old_log_probs.detach(), text_only_log_probs, response_mask).clamp(max=LARGEST_NATS)


def dependency_mask(
    dependency_nats: Float[Tensor, "batch time"], response_mask: Bool[Tensor, "batch time"], *, share: float
) -> Float[Tensor, "batch time"]:
    """Weight 1 on the `share` of a completion's tokens that depend most on the audio, 0 on the others.

    m_t = 1[rank of S_t among the T tokens of its completion <= k],  k = max(1, ceil(share T)); the earlier of equal
    tokens ranks first.
    """
    return top_share(dependency_nats, response_mask, share=share)


def completion_scales(mean_dependency: Float[Tensor, " completions"], *, floor: float) -> Float[Tensor, " completions"]:
    """Factor on each completion's advantage: `floor` for the least dependent completion, with mean 1 over all.

    alpha_i = floor + n_i (1 - floor) / mean(n),  n_i = (S_i - min S) / (max S - min S), S_i the mean of S_t over
    completion i. All are 1 if all S_i are equal.

    Args:
        mean_dependency: S_i of every completion of the rollout batch, on all ranks, so that no value depends on how a
            batch is split; the authors' code uses those of a micro-batch.
        floor: the smallest factor, at most 1.
    """
    spread = mean_dependency.max() - mean_dependency.min()
    if spread < _SAME:
        return torch.ones_like(mean_dependency)
    normalised = (mean_dependency - mean_dependency.min()) / spread
    return floor + normalised * (1 - floor) / normalised.mean()
