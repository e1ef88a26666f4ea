"""Log-probs of what was drawn, from those that TensorRT-LLM reports: by hand, and by drawing as it draws."""

import math

import pytest
import torch
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.sampling import sampling_distribution
from nemo_mapo.rollout.trtllm.scoring import completed_log_probs, restriction

NONE = torch.zeros(0, dtype=torch.int64)
PROBABILITIES = [0.4, 0.3, 0.2, 0.1]
DRAWS = 40_000


def logs(probabilities: list[float]) -> Tensor:
    return torch.tensor([probabilities]).log()


def shares(*, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """The probability of each token as it is drawn."""
    log_probs = logs(PROBABILITIES).expand(4, -1)
    changed = log_probs.gather(1, torch.arange(4)[:, None])[:, 0]
    return (changed + restriction(log_probs, torch.arange(4), top_k=top_k, top_p=top_p)).exp().tolist()


def test_nothing_is_added_where_nothing_is_left_out():
    assert shares() == pytest.approx(PROBABILITIES)


def test_top_k_renormalises_over_its_tokens():
    assert shares(top_k=2)[:2] == pytest.approx([4 / 7, 3 / 7])


def test_the_last_token_below_top_p_has_what_is_left():
    assert shares(top_p=0.8)[:3] == pytest.approx([0.5, 0.375, 0.125])


def test_top_p_counts_within_top_k():
    # Kept are 0.9 of the mass, drawn from are 0.72 of it.
    assert shares(top_k=3, top_p=0.8)[:3] == pytest.approx([0.4 / 0.72, 0.3 / 0.72, 0.02 / 0.72])


def test_a_token_that_only_the_engine_would_have_kept_counts_as_any_other():
    assert shares(top_p=0.6)[3] == pytest.approx(0.1 / 0.6)


def as_the_kernel_draws(uniforms: Tensor, *, top_k: int, top_p: float) -> list[float]:
    """TensorRT-LLM's loop: subtract ranked probabilities from a uniform number below top_p of the kept mass."""
    kept = PROBABILITIES[:top_k] if top_k else PROBABILITIES
    counts = [0] * len(PROBABILITIES)
    for uniform in uniforms.tolist():
        remaining = uniform * top_p * sum(kept)
        for token, probability in enumerate(kept):
            remaining -= probability
            if remaining <= 0 or token == len(kept) - 1:
                counts[token] += 1
                break
    return [count / len(uniforms) for count in counts]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.75), (3, 0.8)])
def test_shares_are_the_frequencies_of_drawing_so(top_k: int, top_p: float):
    uniforms = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = as_the_kernel_draws(uniforms, top_k=top_k, top_p=top_p)
    for token, (expected, frequency) in enumerate(zip(shares(top_k=top_k, top_p=top_p), seen, strict=True)):
        if frequency > 0:
            error = math.sqrt(expected * (1 - expected) / DRAWS)
            assert abs(frequency - expected) < 4 * error, token


def random_logits(rows: int = 6, vocab: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(rows, vocab, generator=generator), torch.randint(2, vocab, (rows,), generator=generator)


def reported_by(logits: Tensor, tokens: Tensor, sampling: SamplingConfig, forbidden: Tensor) -> Tensor:
    """What an engine with these logits says."""
    scaled = logits.index_fill(1, forbidden, -torch.inf) / (sampling.temperature or 1.0)
    return scaled.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=1.3),
        SamplingConfig(temperature=0.7, top_k=5),
    ],
)
def test_with_the_policys_logits_both_log_probs_are_those_of_our_own_sampling(sampling: SamplingConfig):
    logits, tokens = random_logits()
    if sampling.top_k:
        tokens = logits.index_fill(1, torch.tensor([0, 1]), -torch.inf).argmax(-1)
    forbidden = torch.tensor([0, 1])
    both = completed_log_probs(
        reported_by(logits, tokens, sampling, forbidden), logits, tokens, sampling, forbidden_ids=forbidden
    )
    ours = sampling_distribution(
        logits,
        sampling,
        generated=torch.zeros(len(logits), 0, dtype=torch.int64),
        forbidden_ids=forbidden,
        stop_ids=NONE,
    )
    torch.testing.assert_close(both.model, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close(both.sampling, ours.gather(1, tokens[:, None])[:, 0])


def test_greedy_tokens_are_certain():
    logits, tokens = random_logits()
    greedy = SamplingConfig(temperature=0)
    both = completed_log_probs(reported_by(logits, tokens, greedy, NONE), logits, tokens, greedy, forbidden_ids=NONE)
    assert both.sampling.tolist() == [0.0] * len(tokens)
    torch.testing.assert_close(both.model, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_where_the_engine_computes_otherwise_its_difference_is_kept():
    logits, tokens = random_logits()
    sampling = SamplingConfig(temperature=1.2, top_k=8, top_p=0.95)
    reported = reported_by(logits, tokens, sampling, NONE)
    right = completed_log_probs(reported, logits, tokens, sampling, forbidden_ids=NONE)
    off = completed_log_probs(reported - 0.25, logits, tokens, sampling, forbidden_ids=NONE)
    torch.testing.assert_close(off.model, right.model - 0.25)
    torch.testing.assert_close(off.sampling, right.sampling - 0.25)
