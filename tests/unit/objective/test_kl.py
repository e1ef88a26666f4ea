import math

import pytest
import torch

from nemo_mapo.objective.kl import k3_kl


def test_k3_by_hand() -> None:
    # d = ln 2: 2 - ln 2 - 1.  d = -ln 2: 1/2 + ln 2 - 1.
    log_probs = torch.tensor([[-2.0, -2.0, -2.0]], dtype=torch.float64)
    ref = log_probs + torch.tensor([[math.log(2), -math.log(2), 0.0]], dtype=torch.float64)
    kl = k3_kl(log_probs, ref, torch.ones(1, 3, dtype=torch.bool))
    assert kl[0].tolist() == pytest.approx([0.3068528194400547, 0.1931471805599453, 0.0], abs=1e-15)


def test_its_mean_under_the_policy_is_the_divergence() -> None:
    policy, ref = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    tokens = k3_kl(policy.log()[None], ref.log()[None], torch.ones(1, 3, dtype=torch.bool))[0]
    divergence = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    assert (policy * tokens).sum().item() == pytest.approx(divergence, rel=1e-7)


def test_never_negative_in_float32() -> None:
    difference = torch.logspace(-9, 0, 200)
    for sign in (1, -1):
        kl = k3_kl(torch.zeros(1, 200), sign * difference[None], torch.ones(1, 200, dtype=torch.bool))
        assert (kl >= 0).all()


def test_small_differences_keep_their_square() -> None:
    kl = k3_kl(torch.zeros(1, 1), torch.full((1, 1), 1e-3), torch.ones(1, 1, dtype=torch.bool))
    assert kl.item() == pytest.approx(1e-3**2 / 2 + 1e-3**3 / 6, rel=1e-3)


def test_padding_with_nan_touches_neither_value_nor_gradient() -> None:
    log_probs = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    kl = k3_kl(log_probs, torch.tensor([[-1.0 + math.log(2), 0.0]]), torch.tensor([[True, False]]))
    kl.sum().backward()
    assert kl[0, 1].item() == 0.0
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([-1.0, 0.0])  # -(e^d - 1)
