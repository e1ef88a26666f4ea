"""PAPO's terms: by hand, by finite differences, and whatever stands beside them."""

import math
from collections.abc import Callable

import pytest
import torch

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.mapo import mapo_loss
from nemo_mapo.objective.perception import entropy_estimate, perception_kl
from nemo_mapo.types import ObjectiveInputs

Build = Callable[..., ObjectiveInputs]
PLAIN = {"mask": "none", "eta": 0.0, "beta": 0.0}
PER_ROW = (
    *("log_probs", "old_log_probs", "ref_log_probs", "entropy_nats", "text_ref_entropy_nats", "audio_mass"),
    *("pos_gate", "response_mask", "advantages", "accuracy_rewards", "finished", "text_only_log_probs"),
)
KEPT = torch.tensor([[True, True, False]])


def test_perception_kl_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, 5.0]], dtype=torch.float64)
    text_only = torch.tensor([[-3.0, -2.0, math.nan]], dtype=torch.float64)
    expected = torch.tensor([[math.exp(-2) + 2 - 1, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(perception_kl(log_probs, text_only, KEPT), expected, rtol=1e-14, atol=1e-16)
    assert entropy_estimate(log_probs, KEPT).tolist() == [[1.0, 2.0, 0.0]]


def test_gradients_are_those_of_finite_differences() -> None:
    log_probs = -torch.rand(2, 3, dtype=torch.float64).add(0.1).requires_grad_()
    text_only, kept = -torch.rand(2, 3, dtype=torch.float64), KEPT.expand(2, 3)
    assert torch.autograd.gradcheck(lambda x: perception_kl(x, text_only, kept), log_probs)
    assert torch.autograd.gradcheck(lambda x: entropy_estimate(x, kept), log_probs)
    assert not perception_kl(log_probs.detach(), text_only.requires_grad_(), kept).requires_grad


def test_beyond_ten_nats_there_is_nothing_to_gain() -> None:
    log_probs = torch.tensor([[-0.1, -30.0]], dtype=torch.float64, requires_grad=True)
    kl = perception_kl(log_probs, torch.tensor([[-20.0, -0.1]], dtype=torch.float64), KEPT[:, :2])
    assert kl.tolist() == [[10.0, 10.0]]
    assert torch.autograd.grad(kl.sum(), log_probs)[0].tolist() == [[0.0, 0.0]]


def test_the_loss_is_grpo_less_the_perception_term_and_with_the_entropy_term(make_inputs: Build) -> None:
    text_only = torch.tensor([[-2.0, -0.5, -2.0], [-1.5, -3.0, 7.0]], dtype=torch.float64)
    inputs = make_inputs(text_only_log_probs=text_only)
    grpo = mapo_loss(make_inputs(), ObjectiveConfig(**PLAIN)).loss
    papo = mapo_loss(inputs, ObjectiveConfig(**PLAIN, perception_weight=0.02, entropy_weight=0.05))
    # d = -1 at the first token of three, -2 at the second of two; -log pi is 1, 0.5, 2 and 1.5, 1.
    perception = (math.exp(-1) / 3 + (math.exp(-2) + 1) / 2) / 2
    entropy = (3.5 / 3 + 2.5 / 2) / 2
    assert float((papo.loss - grpo).detach()) == pytest.approx(-0.02 * perception + 0.05 * entropy, rel=1e-12)
    assert float(papo.metrics["train/perception_kl"].total) == pytest.approx(perception, rel=1e-12)
    assert float(papo.metrics["train/entropy_loss"].total) == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_shares_of_micro_batches_add_up(make_inputs: Build, aggregation: str) -> None:
    whole = make_inputs(text_only_log_probs=-torch.rand(2, 3, dtype=torch.float64))
    cfg = ObjectiveConfig(mask="vppo", aggregation=aggregation, perception_weight=0.02, entropy_weight=0.05)  # type: ignore[arg-type]
    parts = [make_inputs(**{name: getattr(whole, name)[row : row + 1] for name in PER_ROW}) for row in (0, 1)]
    expected = mapo_loss(whole, cfg).loss
    torch.testing.assert_close(sum(mapo_loss(part, cfg).loss for part in parts), expected, rtol=1e-12, atol=1e-14)


def test_a_weight_of_zero_changes_nothing_and_one_without_its_pass_is_refused(make_inputs: Build) -> None:
    plain = mapo_loss(make_inputs(), ObjectiveConfig())
    with_pass = mapo_loss(make_inputs(text_only_log_probs=torch.zeros(2, 3)), ObjectiveConfig())
    assert torch.equal(plain.loss, with_pass.loss) and "train/perception_kl" not in with_pass.metrics
    with pytest.raises(ValueError, match=r"objective\.perception_weight=0\.02 needs the policy's log-probabilities"):
        mapo_loss(make_inputs(), ObjectiveConfig(perception_weight=0.02))
