import math

import pytest
import torch

from nemo_mapo.objective import attention_prefactor
from nemo_mapo.objective.attention_loss import attention_loss


def prefactor(advantages: list[float], rewards: list[float], **options: float) -> list[float]:
    values = {"fail_threshold": 0.0, "fail_gate_floor": 0.1, "advantage_floor": 0.1, "clip": 3.0} | options
    double = torch.float64
    return attention_prefactor(
        torch.tensor(advantages, dtype=double), torch.tensor(rewards, dtype=double), **values
    ).tolist()


def test_prefactor_by_hand() -> None:
    # failed with |A| 2; failed with |A| below the floor; passed with |A| 2; passed with |A| below the floor
    assert prefactor([-2.0, 0.0, 2.0, 0.05], [0.0, 0.0, 1.0, 1.0]) == pytest.approx([2.0, 0.1, 0.2, 0.005], rel=1e-14)


def test_prefactor_is_capped_after_the_gate() -> None:
    assert prefactor([-40.0, -40.0], [0.0, 1.0]) == pytest.approx([3.0, 3.0])
    assert prefactor([-20.0], [1.0]) == pytest.approx([2.0])


def test_the_threshold_itself_counts_as_failed() -> None:
    assert prefactor([1.0, 1.0], [0.5, 0.6], fail_threshold=0.5) == pytest.approx([1.0, 0.1])


def test_a_group_that_failed_as_a_whole_is_still_pulled() -> None:
    assert prefactor([0.0] * 4, [0.0] * 4, advantage_floor=0.1) == pytest.approx([0.1] * 4)
    assert prefactor([0.0] * 4, [1.0] * 4, advantage_floor=0.1) == [0.0] * 4


def test_prefactor_is_detached() -> None:
    advantages = torch.ones(2, requires_grad=True)
    options = {"fail_threshold": 0.0, "fail_gate_floor": 0.1, "advantage_floor": 0.1, "clip": 3.0}
    assert not attention_prefactor(advantages, torch.zeros(2), **options).requires_grad


def test_attention_loss_by_hand() -> None:
    # Row 1: two gated tokens, 2 * (0.5 * 1.2 * ln 4 + 1 * 0.8 * ln 2) / 2. Row 2: one, 3 * 1 * 1 * ln 10 / 1.
    loss = attention_loss(
        torch.tensor([[0.25, 0.9, 0.5], [0.1, 0.7, 0.3]], dtype=torch.float64),
        torch.tensor([[0.5 * 1.2, 0.0, 1.0 * 0.8], [1.0, 0.0, 0.0]], dtype=torch.float64),
        torch.tensor([[True, False, True], [True, False, False]]),
        torch.tensor([2.0, 3.0], dtype=torch.float64),
        epsilon=1e-300,
    )
    assert loss.tolist() == pytest.approx([0.6 * math.log(4) + 0.8 * math.log(2), 3 * math.log(10)], rel=1e-14)


def test_epsilon_keeps_zero_mass_finite() -> None:
    mass = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = attention_loss(mass, one, one.bool(), one[0], epsilon=1e-6)
    loss.sum().backward()
    assert loss.item() == pytest.approx(6 * math.log(10), rel=1e-14)
    assert mass.grad is not None
    assert mass.grad.item() == pytest.approx(-1e6, rel=1e-12)


def test_nothing_outside_the_gate_enters_value_or_gradient() -> None:
    mass = torch.tensor([[0.5, torch.nan, -1.0], [torch.nan] * 3], requires_grad=True)
    gate = torch.tensor([[True, False, False], [False, False, False]])
    loss = attention_loss(mass, torch.full((2, 3), torch.nan).masked_fill(gate, 1.0), gate, torch.ones(2), epsilon=1e-6)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2), 0.0], rel=1e-5)
    assert mass.grad is not None
    assert mass.grad[0].tolist() == pytest.approx([-2.0, 0.0, 0.0], rel=1e-5)
    assert mass.grad[1].tolist() == [0.0] * 3


def test_nan_mass_inside_the_gate_is_not_turned_into_a_value() -> None:
    one = torch.ones(1, 1)
    assert attention_loss(torch.full((1, 1), torch.nan), one, one.bool(), one[0], epsilon=1e-6).isnan().all()
