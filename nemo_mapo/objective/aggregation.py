"""From token losses to one number, with denominators over the whole optimiser step."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "dr_grpo"]


def aggregate(
    token_losses: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    weights: Float[Tensor, "batch time"] | None = None,
    *,
    kind: Aggregation,
    global_sequences: int,
    global_tokens: int,
    constant_length: int | None = None,
) -> Float[Tensor, ""]:
    """These rows' share of the loss of the optimiser step; the shares of all micro-batches and ranks add up to it.

    With w_t the weights and v_t = T w_t / sum_s w_s the same scaled to mean 1 over a completion:

    - `sequence_mean` (Eq. 2): sum over rows of (sum_t w_t l_t / sum_t w_t), over `global_sequences`.
    - `token_mean` (DAPO): sum over rows and tokens of v_t l_t, over `global_tokens`.
    - `dr_grpo` (Dr.GRPO): sum over rows and tokens of v_t l_t, over `constant_length * global_sequences`.

    Scaling to mean 1 lets a mask move weight between the tokens of a completion, never between completions, which is
    what Eq. 2 does. Without weights every w_t is 1, and nothing is multiplied. A row without completion tokens adds 0.

    Args:
        token_losses: finite on completion tokens; read only there.
        response_mask: True on tokens that count.
        weights: token weights, not negative; None for none.
        kind: which mean.
        global_sequences: completions of the whole optimiser step.
        global_tokens: completion tokens of the whole optimiser step.
        constant_length: tokens that `dr_grpo` divides by.

    Raises:
        ValueError: `dr_grpo` without `constant_length`.
    """
    rows = row_losses(token_losses, response_mask, weights, kind=kind)
    denominator = loss_denominator(kind, global_sequences, global_tokens, constant_length)
    return rows.sum() / denominator


def row_losses(
    token_losses: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    weights: Float[Tensor, "batch time"] | None = None,
    *,
    kind: Aggregation,
) -> Float[Tensor, " batch"]:
    """Numerator that each row contributes to `aggregate`."""
    kept = token_losses.masked_fill(~response_mask, 0.0)
    lengths = response_mask.sum(-1)
    if weights is None:
        sums = kept.sum(-1)
        return sums / lengths.clamp(min=1) if kind == "sequence_mean" else sums
    kept_weights = weights.masked_fill(~response_mask, 0.0)
    total_weight = kept_weights.sum(-1)
    # Only a row without tokens has no weight; its sum of losses is 0 whatever it is divided by.
    means = (kept_weights * kept).sum(-1) / total_weight.masked_fill(total_weight == 0, 1.0)
    return means if kind == "sequence_mean" else means * lengths


def loss_denominator(kind: Aggregation, global_sequences: int, global_tokens: int, constant_length: int | None) -> int:
    """What the sum of `row_losses` over the whole optimiser step is divided by."""
    if kind == "sequence_mean":
        return global_sequences
    if kind == "token_mean":
        return max(global_tokens, 1)
    if constant_length is None:
        raise ValueError("aggregation dr_grpo needs a constant length")
    return constant_length * global_sequences
