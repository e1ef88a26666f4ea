"""gradcheck in float64 for everything that autograd passes through, one seed and random, ragged inputs."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from nemo_mapo.objective.aggregation import Aggregation, aggregate
from nemo_mapo.objective.attention_loss import attention_loss
from nemo_mapo.objective.kl import k3_kl
from nemo_mapo.objective.logprobs import log_probs_and_entropy
from nemo_mapo.objective.surrogate import clipped_surrogate

BATCH, TIME, VOCAB = 3, 4, 7
RESPONSE_MASK = torch.arange(TIME).expand(BATCH, TIME) < torch.tensor([[4], [2], [0]])
ADVANTAGES = torch.tensor([1.3, -0.7, 2.0], dtype=torch.float64)


def random(*shape: int, seed: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_log_probs(chunk_size: int) -> None:
    targets = torch.randint(0, VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(0))
    logits = random(BATCH, TIME, VOCAB, seed=1, low=-3, high=3).requires_grad_()
    assert gradcheck(lambda x: log_probs_and_entropy(x, targets, chunk_size=chunk_size)[0], logits)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("clip_high", [0.2, 0.4])
def test_token_surrogate(clip_high: float, dual_clip: float | None) -> None:
    old = random(BATCH, TIME, seed=2)

    def losses(log_probs: Tensor) -> Tensor:
        result = clipped_surrogate(
            log_probs, old, ADVANTAGES, RESPONSE_MASK, clip_low=0.2, clip_high=clip_high, dual_clip=dual_clip
        )
        return result.token_losses

    assert gradcheck(losses, random(BATCH, TIME, seed=3).requires_grad_())


def test_sequence_surrogate_of_whole_rows() -> None:
    # Per token the gradient is GSPO's stop-gradient form on purpose; a row's sum is an ordinary function again.
    old = random(BATCH, TIME, seed=4, low=-0.05, high=0.05)

    def rows(log_probs: Tensor) -> Tensor:
        result = clipped_surrogate(
            log_probs, old, ADVANTAGES, RESPONSE_MASK, clip_low=0.2, clip_high=0.2, ratio="sequence"
        )
        return result.token_losses.sum(-1)

    assert gradcheck(rows, random(BATCH, TIME, seed=5, low=-0.05, high=0.05).requires_grad_())


def test_k3() -> None:
    ref = random(BATCH, TIME, seed=6)
    assert gradcheck(lambda x: k3_kl(x, ref, RESPONSE_MASK), random(BATCH, TIME, seed=7).requires_grad_())


def test_attention_loss() -> None:
    weights, prefactor = random(BATCH, TIME, seed=8, low=0, high=2), random(BATCH, seed=9, low=0, high=3)
    mass = random(BATCH, TIME, seed=10, low=0.05, high=0.95).requires_grad_()
    assert gradcheck(lambda x: attention_loss(x, weights, RESPONSE_MASK, prefactor, epsilon=1e-6), mass)


@pytest.mark.parametrize("kind", ["sequence_mean", "token_mean", "dr_grpo"])
@pytest.mark.parametrize("weighted", [False, True])
def test_aggregation(kind: Aggregation, weighted: bool) -> None:
    weights = random(BATCH, TIME, seed=11, low=0.1, high=3) if weighted else None

    def share(losses: Tensor) -> Tensor:
        return aggregate(
            losses, RESPONSE_MASK, weights, kind=kind, global_sequences=5, global_tokens=9, constant_length=8
        )

    assert gradcheck(share, random(BATCH, TIME, seed=12).requires_grad_())
