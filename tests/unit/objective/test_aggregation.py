import pytest
import torch

from nemo_mapo.objective.aggregation import Aggregation, aggregate

LOSSES = torch.tensor([[1.0, 3.0, 8.0], [5.0, 9.0, torch.nan], [torch.nan] * 3], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False], [False] * 3])
WEIGHTS = torch.tensor([[2.0, 1.0, 1.0], [1.5, 0.5, 4.0], [1.0] * 3], dtype=torch.float64)


def total(kind: Aggregation, weights: torch.Tensor | None = None) -> float:
    return aggregate(LOSSES, MASK, weights, kind=kind, global_sequences=6, global_tokens=20, constant_length=10).item()


def test_without_weights_by_hand() -> None:
    assert total("sequence_mean") == pytest.approx((4 + 7 + 0) / 6, rel=1e-15)
    assert total("token_mean") == pytest.approx((12 + 14 + 0) / 20, rel=1e-15)
    assert total("dr_grpo") == pytest.approx((12 + 14 + 0) / 60, rel=1e-15)


def test_with_weights_by_hand() -> None:
    # Weighted means: (2 + 3 + 8) / 4 and (7.5 + 4.5) / 2; as sums they count 3 and 2 tokens.
    assert total("sequence_mean", WEIGHTS) == pytest.approx((3.25 + 6) / 6, rel=1e-15)
    assert total("token_mean", WEIGHTS) == pytest.approx((3 * 3.25 + 2 * 6) / 20, rel=1e-15)
    assert total("dr_grpo", WEIGHTS) == pytest.approx((3 * 3.25 + 2 * 6) / 60, rel=1e-15)


@pytest.mark.parametrize("kind", ["sequence_mean", "token_mean", "dr_grpo"])
def test_weights_of_one_row_all_equal_are_no_weights(kind: Aggregation) -> None:
    equal = torch.tensor([[0.3], [7.0], [1.0]], dtype=torch.float64).expand(3, 3)
    assert total(kind, equal) == pytest.approx(total(kind), rel=1e-15)


def test_dr_grpo_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="constant length"):
        aggregate(LOSSES, MASK, kind="dr_grpo", global_sequences=6, global_tokens=20)
