"""Eq. 16: the gradient of the attention loss at the attention logits, against autograd through a plain softmax."""

import pytest
import torch
from torch import Tensor

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective import mapo_loss
from nemo_mapo.types import ObjectiveInputs

BATCH, TIME, LAYERS, HEADS, KEYS, AUDIO_KEYS = 2, 3, 2, 4, 6, 3
ETA, EPSILON = 0.1, 1e-6
RESPONSE_MASK = torch.tensor([[True, True, True], [True, True, False]])
POS_GATE = torch.tensor([[True, False, True], [True, True, True]])


def inputs_with_mass(audio_mass: Tensor) -> ObjectiveInputs:
    zeros = torch.zeros(BATCH, TIME, dtype=audio_mass.dtype)
    delta_h = torch.tensor([[0.3, 1.0, 0.9], [0.0, 0.4, 0.0]], dtype=audio_mass.dtype)
    return ObjectiveInputs(
        log_probs=zeros,
        old_log_probs=zeros,
        ref_log_probs=zeros,
        entropy_nats=zeros,
        text_ref_entropy_nats=delta_h,
        audio_mass=audio_mass,
        pos_gate=POS_GATE,
        response_mask=RESPONSE_MASK,
        advantages=torch.tensor([1.5, -0.8], dtype=audio_mass.dtype),
        accuracy_rewards=torch.tensor([1.0, 0.0], dtype=audio_mass.dtype),
        finished=torch.tensor([True, True]),
        global_sequences=BATCH,
        global_tokens=5,
    )


def gamma(dtype: torch.dtype) -> Tensor:
    """Gamma_t: everything that multiplies -log a_t, worked out token by token with plain numbers."""
    # Row 1 passed: prefactor 0.1 * 1.5, gated tokens 1 and 3 of 3. Row 2 failed: prefactor 0.8, tokens 1 and 2 of 2.
    rows = []
    for prefactor, sizes, positions, length in [
        (0.15, [0.3, 0.9], [1, 3], 3),
        (0.8, [0.0, 0.4], [1, 2], 2),
    ]:
        temperature = torch.tensor(float(length), dtype=torch.float64).log()
        odds = torch.exp(-torch.tensor(sizes, dtype=torch.float64) / temperature)
        nu = len(sizes) * odds / odds.sum()
        row = torch.zeros(TIME, dtype=torch.float64)
        row[torch.tensor(positions) - 1] = prefactor / len(sizes) * torch.tensor(positions).double() / length * nu
        rows.append(row)
    return (torch.stack(rows) * ETA / BATCH).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_closed_form_equals_autograd(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, LAYERS, HEADS, TIME, KEYS, generator=generator, dtype=torch.float64).to(dtype)
    logits.requires_grad_()
    alpha = logits.softmax(-1)
    head_mass = alpha[..., :AUDIO_KEYS].sum(-1)
    audio_mass = head_mass.amax(2).mean(1)
    loss = mapo_loss(inputs_with_mass(audio_mass), ObjectiveConfig(eta=ETA, attention_epsilon=EPSILON)).loss
    (gradient,) = torch.autograd.grad(loss, logits)

    with torch.no_grad():
        pull = (gamma(dtype) / (LAYERS * (audio_mass + EPSILON)))[:, None, None, :, None]
        is_audio = torch.arange(KEYS) < AUDIO_KEYS
        mass = head_mass.unsqueeze(-1)
        on_argmax = torch.where(is_audio, -pull * alpha * (1 - mass), pull * alpha * mass)
        is_argmax = torch.nn.functional.one_hot(head_mass.argmax(2), HEADS).movedim(-1, 2).bool().unsqueeze(-1)
        closed_form = on_argmax.masked_fill(~is_argmax, 0.0)
    assert closed_form.abs().max() > 1e-4
    torch.testing.assert_close(gradient, closed_form, rtol=0, atol=tolerance)


def test_the_pull_is_zero_in_sum_over_the_keys_of_a_query() -> None:
    logits = torch.randn(BATCH, LAYERS, HEADS, TIME, KEYS, dtype=torch.float64, requires_grad=True)
    audio_mass = logits.softmax(-1)[..., :AUDIO_KEYS].sum(-1).amax(2).mean(1)
    (gradient,) = torch.autograd.grad(mapo_loss(inputs_with_mass(audio_mass), ObjectiveConfig()).loss, logits)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros_like(gradient[..., 0]), rtol=0, atol=1e-15)
    assert (gradient[..., :AUDIO_KEYS] <= 0).all()
    assert (gradient[..., AUDIO_KEYS:] >= 0).all()
