import math

import pytest
import torch
from torch import Tensor

from nemo_mapo.objective import inverse_relevance, relevance_mask
from nemo_mapo.objective.masks import effective_gate

LN2, LN4 = math.log(2), math.log(4)
# Four tokens: the temperature is ln 4, so the exponentials of |delta h| / tau are 1, 2, 2, 4.
DELTA_H = torch.tensor([[0.0, LN4 * LN2, -LN4 * LN2, LN4 * LN4]], dtype=torch.float64)
ALL_FOUR = torch.ones(1, 4, dtype=torch.bool)


def relevance(delta_h: Tensor, response_mask: Tensor, **options: object) -> Tensor:
    return relevance_mask(delta_h, response_mask, **({"tau_base": 1.0, "clip": 5.0} | options))  # type: ignore[arg-type]


def inverse(delta_h: Tensor, gate: Tensor, response_mask: Tensor, **options: object) -> Tensor:
    return inverse_relevance(delta_h, gate, response_mask, **({"tau_base": 1.0, "clip": 5.0} | options))  # type: ignore[arg-type]


def test_relevance_mask_by_hand() -> None:
    expected = torch.tensor([[4 / 9, 8 / 9, 8 / 9, 16 / 9]], dtype=torch.float64)
    torch.testing.assert_close(relevance(DELTA_H, ALL_FOUR), expected, rtol=1e-14, atol=0)


def test_relevance_mask_is_capped() -> None:
    expected = torch.tensor([[4 / 9, 8 / 9, 8 / 9, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(relevance(DELTA_H, ALL_FOUR, clip=1.5), expected, rtol=1e-14, atol=0)


def test_inverse_relevance_by_hand_over_all_tokens() -> None:
    # e^{-|delta h| / tau} = 1, 1/2, 1/2, 1/4, their sum 9/4, times T = 4.
    expected = torch.tensor([[16 / 9, 8 / 9, 8 / 9, 4 / 9]], dtype=torch.float64)
    torch.testing.assert_close(inverse(DELTA_H, ALL_FOUR, ALL_FOUR), expected, rtol=1e-14, atol=0)


def test_inverse_relevance_by_hand_behind_a_gate() -> None:
    # Tokens 2 and 4 are substantive: 2 * (1/2, 1/4) / (3/4); the temperature still counts all four tokens.
    gate = torch.tensor([[False, True, False, True]])
    expected = torch.tensor([[0.0, 4 / 3, 0.0, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(inverse(DELTA_H, gate, ALL_FOUR), expected, rtol=1e-14, atol=0)
    capped = torch.tensor([[0.0, 1.2, 0.0, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(inverse(DELTA_H, gate, ALL_FOUR, clip=1.2), capped, rtol=1e-14, atol=0)


def test_one_token_takes_the_temperature_of_two() -> None:
    one = torch.tensor([[True, False]])
    delta_h = torch.tensor([[3.0, 100.0]], dtype=torch.float64)
    assert relevance(delta_h, one).tolist() == [[1.0, 0.0]]
    assert inverse(delta_h, one, one).tolist() == [[1.0, 0.0]]


def test_normalised_relevance_mask_by_hand() -> None:
    # |delta h| = 1, 3 has mean 2, so the scores are 0.5 / ln 2 and 1.5 / ln 2: the odds are e^{1 / ln 2}.
    both = torch.ones(1, 2, dtype=torch.bool)
    share = math.exp(1 / LN2) / (1 + math.exp(1 / LN2))
    for scale in (1.0, 1e-3):
        delta_h = scale * torch.tensor([[1.0, -3.0]], dtype=torch.float64)
        expected = torch.tensor([[2 * (1 - share), 2 * share]], dtype=torch.float64)
        torch.testing.assert_close(relevance(delta_h, both, normalize=True), expected, rtol=1e-12, atol=0)


def test_without_differential_entropy_masks_are_flat_normalised_or_not() -> None:
    for normalize in (False, True):
        assert relevance(torch.zeros(1, 4), ALL_FOUR, normalize=normalize).tolist() == [[1.0] * 4]
        assert inverse(torch.zeros(1, 4), ALL_FOUR, ALL_FOUR, normalize=normalize).tolist() == [[1.0] * 4]


def test_smaller_temperature_is_sharper() -> None:
    peaks = [relevance(DELTA_H, ALL_FOUR, tau_base=tau).max().item() for tau in (2.0, 1.0, 0.5, 0.1)]
    assert peaks == sorted(peaks)
    # exp(|delta h| / tau) to the 10th power: 1, 2^10, 2^10, 4^10.
    assert peaks[-1] == pytest.approx(4 * 4**10 / (1 + 2 * 2**10 + 4**10), rel=1e-12)


def test_halving_the_temperature_is_doubling_delta_h() -> None:
    torch.testing.assert_close(
        relevance(DELTA_H, ALL_FOUR, tau_base=0.5), relevance(2 * DELTA_H, ALL_FOUR), rtol=1e-14, atol=0
    )


def test_small_delta_h_makes_a_nearly_flat_mask_which_a_smaller_temperature_sharpens() -> None:
    # The finding that made `tau_base` worth a metric: 54 tokens of 0.12 nats on average.
    delta_h = 0.12 * torch.empty(1, 54).exponential_(generator=torch.Generator().manual_seed(0))
    whole = torch.ones(1, 54, dtype=torch.bool)
    assert relevance(delta_h, whole).max() < 1.3
    assert relevance(delta_h, whole, tau_base=0.05).max() > 3


def test_weights_average_to_one_before_the_cap() -> None:
    response_mask = torch.arange(7).expand(3, 7) < torch.tensor([[7], [4], [1]])
    delta_h = torch.randn(3, 7, dtype=torch.float64)
    sums = relevance(delta_h, response_mask, clip=100.0).sum(-1)
    torch.testing.assert_close(sums, torch.tensor([7.0, 4.0, 1.0], dtype=torch.float64))


def test_the_content_of_padding_does_not_matter() -> None:
    response_mask = torch.tensor([[True, True, True, False]])
    gate = torch.ones(1, 4, dtype=torch.bool)
    clean = torch.tensor([[0.3, -1.0, 0.1, 0.0]])
    for poison in (torch.nan, torch.inf, 7.0):
        dirty = clean.clone()
        dirty[0, 3] = poison
        assert torch.equal(relevance(dirty, response_mask), relevance(clean, response_mask))
        assert torch.equal(inverse(dirty, gate, response_mask), inverse(clean, gate, response_mask))
        assert torch.equal(relevance(clean, response_mask)[:, :3], relevance(clean[:, :3], response_mask[:, :3]))


def test_nan_inside_the_completion_is_not_turned_into_a_value() -> None:
    delta_h = torch.tensor([[0.0, torch.nan], [0.0, 1.0]])
    both = torch.ones(2, 2, dtype=torch.bool)
    assert relevance(delta_h, both).isnan().any(-1).tolist() == [True, False]
    assert inverse(delta_h, both, both).isnan().any(-1).tolist() == [True, False]


def test_a_completion_without_substantive_token_is_gated_in_whole() -> None:
    response_mask = torch.tensor([[True, True, False], [True, True, True]])
    # The first row's only substantive token lies on padding, where it does not count.
    gate = torch.tensor([[False, False, True], [False, True, False]])
    assert effective_gate(gate, response_mask).tolist() == [[True, True, False], [False, True, False]]
    nu = inverse(torch.zeros(2, 3), gate, response_mask)
    assert nu.tolist() == [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]


def test_an_empty_completion_has_weight_zero_and_no_nan() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    delta_h = torch.full((1, 3), torch.nan)
    for normalize in (False, True):
        assert relevance(delta_h, nothing, normalize=normalize).tolist() == [[0.0] * 3]
        assert inverse(delta_h, nothing, nothing, normalize=normalize).tolist() == [[0.0] * 3]


def test_masks_are_detached() -> None:
    delta_h = DELTA_H.clone().requires_grad_()
    assert not relevance(delta_h, ALL_FOUR).requires_grad
    assert not inverse(delta_h, ALL_FOUR, ALL_FOUR).requires_grad
