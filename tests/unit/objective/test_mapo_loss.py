import math
from collections.abc import Callable

import pytest
import torch

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective import mapo_loss
from nemo_mapo.objective.mapo import token_weights
from nemo_mapo.types import ObjectiveInputs

Build = Callable[..., ObjectiveInputs]


def grad(loss: torch.Tensor, leaf: torch.Tensor | None) -> torch.Tensor:
    assert leaf is not None
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True, materialize_grads=True)
    return gradient


def test_whole_objective_by_hand(make_inputs: Build) -> None:
    """Eq. 1 to Eq. 5 worked through with plain numbers.

    The ratio is 1, so every token loss of row 1 is -1 and of row 2 is +1, and L_PG = (-1 + 1) / 2 = 0.
    d = ln 2 on one token of row 1: L_KL = (1 - ln 2) / 3 / 2.
    Row 1 passed with |A| = 1: prefactor 0.1; gated tokens 1 and 3 with |delta h| = 0.5 each: nu = 1, 1.
    Row 2 failed with |A| = 1: prefactor 1; gated token 2: nu = 1.
    """
    ref = torch.tensor([[-1.0 + math.log(2), -0.5, -2.0], [-1.5, -1.0, 0.0]], dtype=torch.float64)
    output = mapo_loss(make_inputs(ref_log_probs=ref), ObjectiveConfig(eta=0.5, beta=0.2))
    first = 0.1 / 2 * (1 / 3 * -math.log(0.5 + 1e-6) + 1.0 * -math.log(0.1 + 1e-6))
    second = 1.0 / 1 * (1.0 * -math.log(0.4 + 1e-6))
    attention, kl = (first + second) / 2, (1 - math.log(2)) / 3 / 2
    assert output.metrics["train/policy_loss"].total.item() == pytest.approx(0.0, abs=1e-15)
    assert output.metrics["train/kl_loss"].total.item() == pytest.approx(kl, rel=1e-13)
    assert output.metrics["train/attention_loss"].total.item() == pytest.approx(attention, rel=1e-13)
    assert output.loss.item() == pytest.approx(0.2 * kl + 0.5 * attention, rel=1e-13)


def test_policy_gradient_by_hand_follows_the_relevance_mask(make_inputs: Build) -> None:
    inputs = make_inputs()
    output = mapo_loss(inputs, ObjectiveConfig(eta=0.0, beta=0.0))
    # Row 1: |delta h| = 0.5, 1, 0.5 at temperature ln 3; row 2: 0, 2 at ln 2. Gradient: -A omega / sum omega / 2.
    low, high = math.exp(0.5 / math.log(3)), math.exp(1.0 / math.log(3))
    late = math.exp(2 / math.log(2))
    expected = [
        [-low / (2 * low + high) / 2, -high / (2 * low + high) / 2, -low / (2 * low + high) / 2],
        [1 / (1 + late) / 2, late / (1 + late) / 2, 0.0],
    ]
    torch.testing.assert_close(
        grad(output.loss, inputs.log_probs), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0
    )


def test_policy_gradient_by_hand_follows_the_entropy_mask(make_inputs: Build) -> None:
    # One token of each completion learns: its row's mean is its own -A, its gradient -A, over 2 completions.
    inputs = make_inputs(entropy_nats=torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.0, 9.0]], dtype=torch.float64))
    output = mapo_loss(inputs, ObjectiveConfig(mask="entropy", entropy_share=0.2, eta=0.0, beta=0.0))
    expected = torch.tensor([[0.0, -0.5, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(grad(output.loss, inputs.log_probs), expected, rtol=1e-14, atol=0)


def test_an_entropy_mask_of_all_tokens_is_exactly_grpo(make_inputs: Build) -> None:
    whole = mapo_loss(make_inputs(), ObjectiveConfig(mask="entropy", entropy_share=1.0, eta=0.0))
    assert torch.equal(whole.loss, mapo_loss(make_inputs(), ObjectiveConfig(mask="none", eta=0.0)).loss)


@pytest.mark.parametrize("mask", ["relevance", "entropy", "none"])
def test_on_policy_cispo_has_the_gradient_of_the_clipped_surrogate(make_inputs: Build, mask: str) -> None:
    gradients = []
    for surrogate in ("ppo", "cispo"):
        inputs = make_inputs()
        cfg = ObjectiveConfig(mask=mask, surrogate=surrogate, entropy_share=0.5)  # type: ignore[arg-type]
        gradients.append(grad(mapo_loss(inputs, cfg).loss, inputs.log_probs))
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-16)


def test_eta_zero_needs_no_audio_mass(make_inputs: Build) -> None:
    with_mass = make_inputs()
    without = make_inputs(audio_mass=None)
    cfg = ObjectiveConfig(eta=0.0)
    first, second = mapo_loss(with_mass, cfg), mapo_loss(without, cfg)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(grad(first.loss, with_mass.log_probs), grad(second.loss, without.log_probs))
    assert torch.equal(grad(first.loss, with_mass.audio_mass), torch.zeros(2, 3, dtype=torch.float64))
    assert not [name for name in second.metrics if "audio_mass" in name or name == "train/attention_loss"]


def test_eta_above_zero_without_audio_mass_is_refused(make_inputs: Build) -> None:
    with pytest.raises(ValueError, match=r"objective\.eta=0\.1 needs the audio attention mass"):
        mapo_loss(make_inputs(audio_mass=None), ObjectiveConfig(eta=0.1))


def test_a_step_without_sequences_is_refused(make_inputs: Build) -> None:
    with pytest.raises(ValueError, match="global_sequences=0"):
        mapo_loss(make_inputs(global_sequences=0), ObjectiveConfig())


def test_no_weight_passes_gradient_to_entropies_or_advantages(make_inputs: Build) -> None:
    template = make_inputs()
    leaves = {
        name: getattr(template, name).clone().requires_grad_()
        for name in ("entropy_nats", "text_ref_entropy_nats", "advantages", "old_log_probs", "ref_log_probs")
    }
    frozen = leaves.keys() - {"old_log_probs"}
    loss = mapo_loss(make_inputs(**leaves), ObjectiveConfig()).loss
    for name in frozen:
        assert torch.equal(grad(loss, leaves[name]), torch.zeros_like(leaves[name])), name


def test_overlong_filter_takes_rows_out_of_the_policy_gradient_only(make_inputs: Build) -> None:
    ref = torch.full((2, 3), -3.0, dtype=torch.float64)
    kept, cut = make_inputs(ref_log_probs=ref), make_inputs(ref_log_probs=ref, finished=torch.tensor([True, False]))
    cfg = ObjectiveConfig(overlong_filter=True)
    whole, filtered = mapo_loss(kept, cfg), mapo_loss(cut, cfg)
    # Every token loss of row 1 is -1, of row 2 is +1.
    assert whole.metrics["train/policy_loss"].total.item() == pytest.approx(0.0, abs=1e-15)
    assert filtered.metrics["train/policy_loss"].total.item() == pytest.approx(-0.5, rel=1e-14)
    for name in ("train/kl_loss", "train/attention_loss"):
        assert torch.equal(whole.metrics[name].total, filtered.metrics[name].total)
    unfiltered = mapo_loss(cut, ObjectiveConfig(overlong_filter=False))
    assert torch.equal(unfiltered.loss, mapo_loss(kept, ObjectiveConfig()).loss)
    only_policy = mapo_loss(cut, ObjectiveConfig(overlong_filter=True, beta=0.0, eta=0.0))
    assert torch.equal(grad(only_policy.loss, cut.log_probs)[1], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "dr_grpo"])
@pytest.mark.parametrize("mask", ["relevance", "entropy", "none"])
def test_an_empty_completion_adds_nothing(make_inputs: Build, aggregation: str, mask: str) -> None:
    length = 10 if aggregation == "dr_grpo" else None
    cfg = ObjectiveConfig(aggregation=aggregation, dr_grpo_length=length, mask=mask)  # type: ignore[arg-type]
    inputs = make_inputs()
    empty = {"response_mask": torch.tensor([[True, True, True], [False, False, False]])}
    poison = {
        name: torch.stack([getattr(inputs, name).detach()[0], torch.full((3,), torch.nan, dtype=torch.float64)])
        for name in (
            "log_probs",
            "old_log_probs",
            "ref_log_probs",
            "entropy_nats",
            "text_ref_entropy_nats",
            "audio_mass",
        )
    }
    leaves = {name: poison[name].requires_grad_() for name in ("log_probs", "audio_mass")}
    padded = mapo_loss(make_inputs(**poison, **empty), cfg)
    alone = mapo_loss(
        make_inputs(
            **{name: value.detach()[:1] for name, value in poison.items()},
            **{
                name: getattr(inputs, name)[:1]
                for name in ("pos_gate", "response_mask", "advantages", "accuracy_rewards", "finished")
            },
        ),
        cfg,
    )
    assert padded.loss.item() == pytest.approx(alone.loss.item(), rel=1e-14)
    for leaf in leaves.values():
        assert torch.equal(grad(padded.loss, leaf)[1], torch.zeros(3, dtype=torch.float64))
    assert all(metric.total.isfinite() for metric in padded.metrics.values())


def test_a_batch_without_any_token_is_zero_with_zero_gradient(make_inputs: Build) -> None:
    inputs = make_inputs(response_mask=torch.zeros(2, 3, dtype=torch.bool), global_tokens=0)
    for aggregation in ("sequence_mean", "token_mean"):
        output = mapo_loss(inputs, ObjectiveConfig(aggregation=aggregation))  # type: ignore[arg-type]
        assert output.loss.item() == 0.0
        assert torch.equal(grad(output.loss, inputs.log_probs), torch.zeros(2, 3, dtype=torch.float64))


def test_nan_entropy_inside_a_completion_makes_the_loss_nan(make_inputs: Build) -> None:
    entropy = torch.tensor([[1.0, torch.nan, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    assert mapo_loss(make_inputs(entropy_nats=entropy), ObjectiveConfig(eta=0.0)).loss.isnan()


def test_token_weights_are_those_of_the_loss(make_inputs: Build) -> None:
    omega, nu = token_weights(make_inputs(), ObjectiveConfig())
    low, high = math.exp(0.5 / math.log(3)), math.exp(1.0 / math.log(3))
    assert omega[0].tolist() == pytest.approx(
        [3 * low / (2 * low + high), 3 * high / (2 * low + high), omega[0, 0].item()]
    )
    assert nu.tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    ones, _ = token_weights(make_inputs(), ObjectiveConfig(mask="none"))
    assert ones.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
