"""The paper's Eq. 16, the gradient of the attention loss on attention logits, through the real core attention.

With unit vectors as keys a logit is scale * query component, z_{t,j} = scale * q_{t,j}, so dL/dz = dL/dq / scale.
"""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_mapo.attention.core import SDPACoreAttention
from nemo_mapo.attention.dense import dense_attention_weights
from nemo_mapo.attention.session import AttentionSession

BATCH, TIME, HEADS, LAYERS = 2, 16, 3, 2
EPSILON = 1e-6
SCALE = 0.5
PACKED = torch.tensor([[1] * 9 + [2] * 7, [1] * 14 + [0] * 2])


def _queries(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(16)
    shape = (TIME, BATCH, HEADS, TIME)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(LAYERS)]


def _audio_key_mask() -> torch.Tensor:
    """Audio at the head of each sample, the first position included so that every real query hears some."""
    mask = torch.zeros(BATCH, TIME, dtype=torch.bool)
    mask[:, 0:5] = True
    mask[0, 9:11] = True
    return mask


def _gammas() -> torch.Tensor:
    """Gamma_t as in training: a temporal ramp times token weights, divided by the token count."""
    weights = torch.rand(BATCH, TIME, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return weights * torch.arange(1, TIME + 1) / TIME / TIME


def _autograd_logit_gradients(dtype: torch.dtype, segment_ids: torch.Tensor | None) -> list[torch.Tensor]:
    """dL/dz of each layer, `[batch, head, query, key]`, by backward through the modules and the session."""
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HEADS * TIME, num_attention_heads=HEADS, attention_dropout=0.0
    )
    session = AttentionSession(range(LAYERS))
    queries = [query.requires_grad_() for query in _queries(dtype)]
    unit_keys = torch.eye(TIME, dtype=dtype)[:, None, None, :].expand(TIME, BATCH, 1, TIME)
    with session.forward(audio_key_mask=_audio_key_mask()):
        for layer, query in enumerate(queries):
            module = SDPACoreAttention(
                config, layer + 1, AttnMaskType.causal, "self", softmax_scale=SCALE, session=session
            )
            module(query, unit_keys, torch.ones_like(unit_keys), segment_ids, attn_mask_type=AttnMaskType.causal)
    audio_mass = session.audio_mass("max")
    loss = (_gammas().to(dtype) * -torch.log(audio_mass + EPSILON)).masked_fill(_silent(segment_ids), 0).sum()
    gradients = torch.autograd.grad(loss, queries)
    return [(gradient / SCALE).permute(1, 2, 0, 3) for gradient in gradients]


def _silent(segment_ids: torch.Tensor | None) -> torch.Tensor:
    """Padding, which no loss reads."""
    return torch.zeros(BATCH, TIME, dtype=torch.bool) if segment_ids is None else segment_ids == 0


def _closed_form(dtype: torch.dtype, segment_ids: torch.Tensor | None) -> list[torch.Tensor]:
    """Eq. 16 in float64 on the very logits that autograd saw."""
    audio = _audio_key_mask()[:, None, None, :]
    unit_keys = torch.eye(TIME, dtype=torch.float64)[None, :, None, :].expand(BATCH, TIME, 1, TIME)
    weights = [
        dense_attention_weights(query.double().transpose(0, 1), unit_keys, segment_ids=segment_ids, softmax_scale=SCALE)
        for query in _queries(dtype)
    ]
    masses = [(alpha * audio).sum(-1, keepdim=True) for alpha in weights]
    audio_mass = torch.stack([mass.amax(1) for mass in masses]).mean(0)[:, None]
    gammas = _gammas().masked_fill(_silent(segment_ids), 0)[:, None, :, None]
    factor = gammas / (LAYERS * (audio_mass + EPSILON))
    gradients = []
    for alpha, mass in zip(weights, masses, strict=True):
        loudest_head = mass == mass.amax(1, keepdim=True)
        on_loudest = torch.where(audio, -factor * alpha * (1 - mass), factor * alpha * mass)
        gradients.append(on_loudest * loudest_head)
    return gradients


@pytest.mark.parametrize("segment_ids", [None, PACKED], ids=["one sample", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_autograd_through_the_core_attention_is_eq_16(
    dtype: torch.dtype, tolerance: float, segment_ids: torch.Tensor | None
) -> None:
    autograd = _autograd_logit_gradients(dtype, segment_ids)
    closed_form = _closed_form(dtype, segment_ids)
    for gradient, expected in zip(autograd, closed_form, strict=True):
        assert expected.abs().max() > 1e-3, "a gradient this small would agree with anything"
        torch.testing.assert_close(gradient.double(), expected, atol=tolerance, rtol=0)


def test_descent_raises_audio_logits_and_lowers_the_others() -> None:
    for gradient in _autograd_logit_gradients(torch.float64, None):
        audio = _audio_key_mask()[:, None, None, :].expand_as(gradient)
        assert (gradient[audio] <= 0).all() and (gradient[audio] < 0).any()
        assert (gradient[~audio] >= 0).all() and (gradient[~audio] > 0).any()
