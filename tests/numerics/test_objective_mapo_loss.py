"""The composed objective: identities, gradcheck, invariances, precision."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective import mapo_loss
from nemo_mapo.types import ObjectiveInputs, merge_metrics

GROUP, GROUPS, TIME = 4, 3, 7
BATCH = GROUP * GROUPS
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "attention only": {"mask": "none"},
    "mask only": {"eta": 0.0},
    "GRPO": {"mask": "none", "eta": 0.0},
    "sharp mask": {"tau_base": 0.05},
    "normalised": {"normalize_delta_h": True},
    "token mean": {"aggregation": "token_mean"},
    "Dr.GRPO": {"aggregation": "dr_grpo", "dr_grpo_length": 9},
    "GSPO": {"ratio": "sequence", "mask": "none"},
    "behaviour weights": {"behaviour_clip": 1.2},
    "clip-higher, dual clip, overlong": {"clip_ratio_high": 0.28, "dual_clip": 3.0, "overlong_filter": True},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def random_inputs(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> ObjectiveInputs:
    """Three groups of four completions of random length, one empty, one with an empty gate, two cut at the limit."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=generator).to(dtype)

    lengths = torch.tensor([7, 3, 0, 5, 1, 2, 7, 6, 4, 4, 3, 7])
    response_mask = torch.arange(TIME).expand(BATCH, TIME) < lengths.unsqueeze(-1)
    pos_gate = torch.rand(BATCH, TIME, generator=generator) < 0.5
    pos_gate[3] = False
    log_probs = uniform(-2.0, -0.1, BATCH, TIME)
    return ObjectiveInputs(
        log_probs=log_probs.clone().requires_grad_(),
        old_log_probs=log_probs + uniform(-0.4, 0.4, BATCH, TIME),
        ref_log_probs=log_probs + uniform(-0.4, 0.4, BATCH, TIME),
        entropy_nats=uniform(0.0, 2.0, BATCH, TIME),
        text_ref_entropy_nats=uniform(0.0, 4.0, BATCH, TIME),
        audio_mass=uniform(0.05, 0.95, BATCH, TIME).requires_grad_(),
        pos_gate=pos_gate,
        response_mask=response_mask,
        advantages=uniform(-2.0, 2.0, BATCH),
        accuracy_rewards=torch.randint(0, 2, (BATCH,), generator=generator).to(dtype),
        finished=torch.arange(BATCH) % 6 != 0,
        global_sequences=BATCH,
        global_tokens=int(lengths.sum()),
        behaviour_log_probs=log_probs + uniform(-0.6, 0.6, BATCH, TIME),
    )


def map_tensors(inputs: ObjectiveInputs, transform: Any) -> ObjectiveInputs:
    """The same inputs with `transform(name, tensor)` in place of each tensor; floating leaves are leaves again."""
    found = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    changed = {name: transform(name, value.detach()) for name, value in found.items() if isinstance(value, Tensor)}
    for name in ("log_probs", "audio_mass"):
        changed[name] = changed[name].clone().requires_grad_()
    return replace(inputs, **changed)


def loss_and_gradients(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> tuple[Tensor, Tensor, Tensor]:
    loss = mapo_loss(inputs, cfg).loss
    assert inputs.audio_mass is not None
    gradients = torch.autograd.grad(loss, (inputs.log_probs, inputs.audio_mass), materialize_grads=True)
    return loss.detach(), *gradients


def plain_grpo(inputs: ObjectiveInputs, clip: float, beta: float) -> Tensor:
    """GRPO as one would write it without this package."""
    mask = inputs.response_mask.float()
    advantages = inputs.advantages[:, None]
    ratio = torch.exp(inputs.log_probs - inputs.old_log_probs)
    clipped_ratio = torch.clamp(ratio, 1 - clip, 1 + clip)
    policy_tokens = -torch.min(ratio * advantages, clipped_ratio * advantages)
    difference = inputs.ref_log_probs - inputs.log_probs
    kl_tokens = torch.expm1(difference) - difference
    lengths = mask.sum(dim=1).clamp(min=1)
    policy = ((policy_tokens * mask).sum(dim=1) / lengths).mean()
    kl = ((kl_tokens * mask).sum(dim=1) / lengths).mean()
    return policy + beta * kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_without_mask_and_attention_it_is_plain_grpo_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    inputs = random_inputs(dtype=dtype, seed=seed)
    loss, gradient, mass_gradient = loss_and_gradients(inputs, ObjectiveConfig(mask="none", eta=0.0, beta=0.04))
    expected = plain_grpo(inputs, clip=0.2, beta=0.04)
    (expected_gradient,) = torch.autograd.grad(expected, inputs.log_probs)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(mass_gradient, torch.zeros_like(mass_gradient))


def test_eta_zero_is_exactly_mask_only() -> None:
    inputs = random_inputs()
    mask_only = loss_and_gradients(inputs, ObjectiveConfig(eta=0.0))
    no_mass = replace(inputs, audio_mass=None)
    loss = mapo_loss(no_mass, ObjectiveConfig(eta=0.0)).loss
    (gradient,) = torch.autograd.grad(loss, no_mass.log_probs)
    assert torch.equal(mask_only[0], loss)
    assert torch.equal(mask_only[1], gradient)


def test_the_attention_loss_adds_to_the_loss_and_leaves_the_policy_gradient_alone() -> None:
    inputs = random_inputs()
    without, policy_gradient, _ = loss_and_gradients(inputs, ObjectiveConfig(eta=0.0))
    output = mapo_loss(inputs, ObjectiveConfig(eta=0.3))
    torch.testing.assert_close(output.loss, without + 0.3 * output.metrics["train/attention_loss"].total)
    assert torch.equal(loss_and_gradients(inputs, ObjectiveConfig(eta=0.3))[1], policy_gradient)


def test_the_mask_changes_the_gradient() -> None:
    inputs = random_inputs()
    masked = loss_and_gradients(inputs, ObjectiveConfig(eta=0.0))[1]
    uniform = loss_and_gradients(inputs, ObjectiveConfig(eta=0.0, mask="none"))[1]
    assert (masked - uniform).abs().max() > 1e-2 * uniform.abs().max()


@every_variant
def test_gradcheck(options: dict[str, Any]) -> None:
    inputs, cfg = random_inputs(), ObjectiveConfig(**options)

    def loss(log_probs: Tensor, audio_mass: Tensor) -> Tensor:
        return mapo_loss(replace(inputs, log_probs=log_probs, audio_mass=audio_mass), cfg).loss

    assert gradcheck(loss, (inputs.log_probs, inputs.audio_mass))


@every_variant
@pytest.mark.parametrize("poison", [0.0, 1e6, torch.nan])
def test_padding_changes_nothing(options: dict[str, Any], poison: float) -> None:
    inputs, cfg = random_inputs(), ObjectiveConfig(**options)
    extra = 5

    def pad(name: str, value: Tensor) -> Tensor:
        if value.dim() == 1:
            return value
        if value.dtype == torch.bool:
            # The gate may say anything about padding; the response mask is what ends a completion.
            return torch.cat([value, torch.full((BATCH, extra), name == "pos_gate")], dim=1)
        value = value.masked_fill(~inputs.response_mask, poison)
        return torch.cat([value, torch.full((BATCH, extra), poison, dtype=value.dtype)], dim=1)

    loss, *gradients = loss_and_gradients(inputs, cfg)
    padded_loss, *padded_gradients = loss_and_gradients(map_tensors(inputs, pad), cfg)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-13, atol=1e-15)
    for padded, plain in zip(padded_gradients, gradients, strict=True):
        torch.testing.assert_close(padded[:, :TIME], plain, rtol=1e-13, atol=1e-15)
        assert torch.equal(padded[:, TIME:], torch.zeros(BATCH, extra, dtype=padded.dtype))


@every_variant
def test_order_of_rows_does_not_matter(options: dict[str, Any]) -> None:
    inputs, cfg = random_inputs(), ObjectiveConfig(**options)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    loss, *gradients = loss_and_gradients(inputs, cfg)
    shuffled_loss, *shuffled = loss_and_gradients(map_tensors(inputs, lambda _, value: value[order]), cfg)
    torch.testing.assert_close(shuffled_loss, loss, rtol=1e-13, atol=1e-15)
    for found, plain in zip(shuffled, gradients, strict=True):
        torch.testing.assert_close(found, plain[order], rtol=1e-13, atol=1e-15)


@every_variant
@pytest.mark.parametrize("sizes", [(1,) * BATCH, (4, 4, 4), (1, 5, 6)])
def test_micro_batches_add_up_to_the_step(options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    inputs, cfg = random_inputs(), ObjectiveConfig(**options)
    whole = mapo_loss(inputs, cfg)
    _, *gradients = loss_and_gradients(inputs, cfg)
    parts, part_gradients, start = [], [], 0
    for size in sizes:
        rows = slice(start, start + size)
        part = map_tensors(inputs, lambda _, value, rows=rows: value[rows])
        parts.append(mapo_loss(part, cfg))
        part_gradients.append(loss_and_gradients(part, cfg)[1:])
        start += size
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-13, atol=1e-15)
    for pieces, plain in zip(zip(*part_gradients, strict=True), gradients, strict=True):
        torch.testing.assert_close(torch.cat(pieces), plain, rtol=1e-13, atol=1e-15)
    merged, expected = merge_metrics([part.metrics for part in parts]), merge_metrics([whole.metrics])
    # The share of rows that weighs the losses is float32.
    assert merged == pytest.approx(expected, rel=1e-6, abs=1e-12)


@every_variant
def test_float32_agrees_with_float64(options: dict[str, Any]) -> None:
    cfg = ObjectiveConfig(**options)
    exact = random_inputs(dtype=torch.float32)

    def widen(_: str, value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    found, expected = loss_and_gradients(exact, cfg), loss_and_gradients(map_tensors(exact, widen), cfg)
    for single, double in zip(found, expected, strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-7)


def test_a_policy_gradient_step_raises_good_completions_and_lowers_bad_ones() -> None:
    inputs = random_inputs()
    on_policy = replace(inputs, old_log_probs=inputs.log_probs.detach())
    _, gradient, mass_gradient = loss_and_gradients(on_policy, ObjectiveConfig(beta=0.0))
    kept = inputs.response_mask
    assert ((gradient.sign() == -inputs.advantages.sign().unsqueeze(-1)) | ~kept).all()
    assert (mass_gradient <= 0).all()
    assert (mass_gradient < 0).any()
