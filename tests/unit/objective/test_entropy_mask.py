"""The entropy mask: the least certain tokens of each completion, whatever stands beside them."""

import pytest
import torch

from nemo_mapo.objective.entropy_mask import entropy_mask

ENTROPY = torch.tensor([[0.1, 2.0, 0.3, 1.0, 0.2]], dtype=torch.float64)
ALL_FIVE = torch.ones(1, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.01, [0, 1, 0, 0, 0]),  # at least one
        (0.2, [0, 1, 0, 0, 0]),  # ceil(1.0)
        (0.21, [0, 1, 0, 1, 0]),
        (0.4, [0, 1, 0, 1, 0]),
        (0.6, [0, 1, 1, 1, 0]),
        (1.0, [1, 1, 1, 1, 1]),
    ],
)
def test_entropy_mask_by_hand(share: float, expected: list[int]) -> None:
    assert entropy_mask(ENTROPY, ALL_FIVE, share=share).tolist() == [expected]


def test_of_equal_entropies_the_earlier_token_learns() -> None:
    assert entropy_mask(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), share=0.5).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("padding", [0.0, 100.0, torch.nan, torch.inf])
def test_padding_and_other_completions_change_nothing(padding: float) -> None:
    beside = torch.full((3, 8), padding, dtype=torch.float64)
    beside[1, :5] = ENTROPY
    kept = torch.zeros(3, 8, dtype=torch.bool)
    kept[1, :5] = True
    mask = entropy_mask(beside, kept, share=0.4)
    assert mask[1, :5].tolist() == entropy_mask(ENTROPY, ALL_FIVE, share=0.4)[0].tolist()
    assert mask.sum() == 2


def test_the_order_of_tokens_and_the_scale_of_entropies_do_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    mask = entropy_mask(ENTROPY, ALL_FIVE, share=0.4)
    assert torch.equal(entropy_mask(ENTROPY[:, order], ALL_FIVE, share=0.4), mask[:, order])
    assert torch.equal(entropy_mask(1e-3 * ENTROPY, ALL_FIVE, share=0.4), mask)


def test_the_weights_carry_no_gradient() -> None:
    assert not entropy_mask(ENTROPY.clone().requires_grad_(), ALL_FIVE, share=0.4).requires_grad
