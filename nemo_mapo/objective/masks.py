"""Token weights built on the differential entropy: relevance mask (Eq. 1) and inverse relevance (Eq. 3)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHORTEST_LENGTH = 2
"""Smallest length in the temperature, because ln 1 = 0 is not a valid temperature."""


def relevance_mask(
    delta_h: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    tau_base: float,
    clip: float,
    normalize: bool = False,
) -> Float[Tensor, "batch time"]:
    """Weight of each token in the policy gradient: high where hearing the audio changed the prediction most.

    Eq. 1: omega_t = min(T softmax_t(|delta h_t| / tau_T), clip),  tau_T = tau_base ln(max(T, 2)).

    Args:
        delta_h: differential entropy in nats; read only on completion tokens.
        response_mask: True on completion tokens.
        tau_base: base temperature; smaller is sharper.
        clip: C_mask, the cap.
        normalize: divide |delta h| by its mean over the completion first (not in the paper), which makes the sharpness
            independent of the scale of delta h.

    Returns:
        Detached weights, 0 on padding; before the cap they have mean 1 over a completion. A NaN stays NaN.
    """
    lengths = response_mask.sum(-1, keepdim=True)
    scores = _scores(delta_h, response_mask, tau_base=tau_base, normalize=normalize)
    return _scaled_softmax(scores, response_mask, lengths, clip)


def inverse_relevance(
    delta_h: Float[Tensor, "batch time"],
    pos_gate: Bool[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    tau_base: float,
    clip: float,
    normalize: bool = False,
) -> Float[Tensor, "batch time"]:
    """Weight of each substantive token in the attention loss: high where the audio changed the prediction least.

    Eq. 3: nu_t = min(T_pos g_t e^{-|delta h_t| / tau_T} / sum_s g_s e^{-|delta h_s| / tau_T}, clip),  T_pos = sum g_t.

    The temperature is that of `relevance_mask` (T counts all completion tokens). A row without a substantive token has
    every completion token gated in (`effective_gate`).

    Args:
        delta_h: differential entropy in nats; read only on completion tokens.
        pos_gate: True on substantive tokens.
        response_mask: True on completion tokens.
        tau_base: base temperature; smaller is sharper.
        clip: C_mask, the cap.
        normalize: divide |delta h| by its mean over the completion first.

    Returns:
        Detached weights, 0 on padding and outside the gate; before the cap they have mean 1 over the gated tokens.
    """
    gate = effective_gate(pos_gate, response_mask)
    scores = _scores(delta_h, response_mask, tau_base=tau_base, normalize=normalize)
    return _scaled_softmax(-scores, gate, gate.sum(-1, keepdim=True), clip)


def effective_gate(
    pos_gate: Bool[Tensor, "batch time"], response_mask: Bool[Tensor, "batch time"]
) -> Bool[Tensor, "batch time"]:
    """The gate within the completion, or the whole completion for a row without a gated token."""
    gate = pos_gate & response_mask
    return torch.where(gate.any(-1, keepdim=True), gate, response_mask)


def _scores(delta_h: Tensor, response_mask: Tensor, *, tau_base: float, normalize: bool) -> Tensor:
    """|delta h_t| / tau_T, 0 on padding."""
    lengths = response_mask.sum(-1, keepdim=True)
    size = delta_h.detach().abs().masked_fill(~response_mask, 0.0)
    if normalize:
        mean = size.sum(-1, keepdim=True) / lengths.clamp(min=1)
        # A completion without any differential entropy keeps its flat mask.
        size = size / mean.clamp(min=torch.finfo(size.dtype).tiny)
    temperature = tau_base * lengths.clamp(min=SHORTEST_LENGTH).to(size.dtype).log()
    return size / temperature


def _scaled_softmax(scores: Tensor, kept: Tensor, count: Tensor, clip: float) -> Tensor:
    """min(count softmax(scores over kept), clip), 0 elsewhere; a row that keeps nothing is all 0, not NaN."""
    # The lowest finite score, because a softmax over -inf alone is NaN.
    lowest = torch.finfo(scores.dtype).min
    shares = scores.masked_fill(~kept, lowest).softmax(-1)
    return (count * shares).clamp(max=clip).masked_fill(~kept, 0.0)
