"""Divergences of two distributions: values by hand, a slow reference, probability 0, and any chunking."""

import math

import pytest
import torch

from nemo_mapo.objective.divergence import divergence


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([[probabilities]], dtype=torch.float64).log()


def test_values_by_hand() -> None:
    heard, unheard = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(heard, unheard, kind="kl", chunk_size=1).item() == pytest.approx(kl, abs=1e-12)
    to_mean = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)
    from_other = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    jsd = (to_mean + from_other) / 2
    assert divergence(heard, unheard, kind="jsd", chunk_size=1).item() == pytest.approx(jsd, abs=1e-12)


def test_a_change_of_mode_at_equal_entropy_is_seen() -> None:
    yes, no = logits_of(0.9, 0.1), logits_of(0.1, 0.9)
    assert divergence(yes, no, kind="kl", chunk_size=1).item() == pytest.approx(0.8 * math.log(9), abs=1e-12)


def test_distributions_without_a_common_token_are_ln_2_apart_and_their_kl_is_infinite() -> None:
    one, other = logits_of(1.0, 0.0), logits_of(0.0, 1.0)
    assert divergence(one, other, kind="jsd", chunk_size=1).item() == pytest.approx(math.log(2), abs=1e-12)
    assert divergence(one, other, kind="kl", chunk_size=1).item() == math.inf


@pytest.mark.parametrize("kind", ["kl", "jsd"])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_any_chunking_gives_what_softmaxes_written_out_give(kind, chunk_size) -> None:
    generator = torch.Generator().manual_seed(0)
    heard, unheard = (3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    # Columns that only pad the vocabulary.
    heard[..., 6] = unheard[..., 6] = -torch.inf
    p, q = heard[..., :6].softmax(-1), unheard[..., :6].softmax(-1)
    mean = (p + q) / 2
    expected = {
        "kl": (p * (p / q).log()).sum(-1),
        "jsd": ((p * (p / mean).log()).sum(-1) + (q * (q / mean).log()).sum(-1)) / 2,
    }[kind]
    found = divergence(heard, unheard, kind=kind, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    narrow = divergence(heard.bfloat16(), unheard.bfloat16(), kind=kind, chunk_size=chunk_size)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=0.05)


def test_equal_distributions_are_0_apart_and_broken_logits_stay_broken() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert divergence(logits, logits + 5, kind="kl", chunk_size=1).item() == pytest.approx(0, abs=1e-6)
    broken = logits.clone()
    broken[0, 0, 1] = torch.nan
    assert divergence(broken, logits, kind="jsd", chunk_size=1).isnan().all()


def test_logits_of_other_tokens_are_refused() -> None:
    with pytest.raises((ValueError, TypeError)):
        divergence(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), kind="kl", chunk_size=1)
    with pytest.raises(ValueError, match="chunk_size=0"):
        divergence(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), kind="kl", chunk_size=0)
