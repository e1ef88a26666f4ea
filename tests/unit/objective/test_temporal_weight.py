import pytest
import torch

from nemo_mapo.objective import temporal_weight


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [(0.0, [1.0, 1.0, 1.0, 1.0]), (1.0, [0.25, 0.5, 0.75, 1.0]), (2.0, [0.0625, 0.25, 0.5625, 1.0])],
)
def test_power_of_the_relative_position_by_hand(kappa: float, expected: list[float]) -> None:
    weight = temporal_weight(torch.ones(1, 4, dtype=torch.bool), kappa=kappa, dtype=torch.float64)
    assert weight.tolist() == [pytest.approx(expected, rel=1e-15)]


def test_each_row_ends_at_one_and_padding_is_zero_wherever_it_stands() -> None:
    response_mask = torch.tensor([[True, True, False, False], [False, False, True, True], [False] * 4])
    assert temporal_weight(response_mask, kappa=1.0).tolist() == [[0.5, 1, 0, 0], [0, 0, 0.5, 1], [0, 0, 0, 0]]


def test_padding_is_zero_even_where_every_token_counts_the_same() -> None:
    assert temporal_weight(torch.tensor([[True, False]]), kappa=0.0).tolist() == [[1.0, 0.0]]
