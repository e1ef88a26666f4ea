"""Metrics of what the objective did to one micro-batch."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.surrogate import Surrogate
from nemo_mapo.objective.temporal import part_of_token
from nemo_mapo.objective.weights import Weights, omega_or_ones
from nemo_mapo.types import Metric, ObjectiveInputs

SHORTEST_WITH_ENTROPY = 2
"""A distribution over one token has a normalised entropy of 0 / 0: no metric."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The terms of Eq. 5, detached, each the share of this micro-batch."""

    policy_loss: Float[Tensor, ""]
    kl_loss: Float[Tensor, ""]
    """Without beta."""
    attention_loss: Float[Tensor, ""] | None
    """Without eta; None if no audio mass was captured."""
    loss: Float[Tensor, ""]
    perception_kl: Float[Tensor, ""] | None
    """PAPO's term without its weight; None if it is off."""
    entropy: Float[Tensor, ""] | None
    """The entropy term without its weight; None if it is off."""
    mask_effect: Float[Tensor, ""]
    """|L_PG(mask) - L_PG(uniform)|, per row."""


def objective_metrics(
    inputs: ObjectiveInputs,
    cfg: ObjectiveConfig,
    weights: Weights | None,
    surrogate: Surrogate,
    terms: LossTerms,
    behaviour: Float[Tensor, "batch time"] | None = None,
) -> dict[str, Metric]:
    """All metrics of the objective.

    - Losses (`train/policy_loss`, `train/kl_loss`, `train/attention_loss`, `train/loss`, `mapo/term`,
      `mapo/term_attention`, `mapo/term_mask`): totals add up over micro-batches to the value of the step.
      With PAPO's terms also `train/perception_kl` and `train/entropy_loss`.
      `mapo/term` = eta L_attn + |L_PG(mask) - L_PG(uniform)| is all that MAPO adds to GRPO.
    - Token means: `train/clip_share`, `train/entropy_nats`, `mapo/delta_h_abs_nats`, `mapo/gate_share`,
      `mapo/mask_capped_share`, `mapo/audio_mass` and its first and last third of the completion.
    - Means over completions: `mapo/mask_mean_max`, `mapo/mask_entropy` (1 is flat), `mapo/gate_fallbacks_empty`,
      `mapo/prefactor`.
    - With behaviour weights, token means: `train/behaviour_weight`, `train/behaviour_clip_share` (capped ones).
    - Maxima: `train/ratio_max`, `mapo/mask_max`, `mapo/inverse_mask_max`.

    Without an audio mass, or without weights, the metrics that need them are left out.
    """
    return {
        **_loss_metrics(inputs, cfg, terms),
        **_policy_metrics(inputs, surrogate),
        **({} if weights is None else _mask_metrics(inputs, cfg, weights)),
        **_audio_mass_metrics(inputs),
        **({} if behaviour is None else _behaviour_metrics(inputs, cfg, behaviour)),
    }


def _loss_metrics(inputs: ObjectiveInputs, cfg: ObjectiveConfig, terms: LossTerms) -> dict[str, Metric]:
    rows = inputs.response_mask.shape[0]
    share = torch.tensor(rows / inputs.global_sequences, device=terms.loss.device)
    values = {
        "train/policy_loss": terms.policy_loss,
        "train/kl_loss": terms.kl_loss,
        "train/loss": terms.loss,
        "mapo/term_mask": terms.mask_effect,
    }
    if terms.perception_kl is not None:
        values["train/perception_kl"] = terms.perception_kl
    if terms.entropy is not None:
        values["train/entropy_loss"] = terms.entropy
    pull = torch.zeros_like(terms.mask_effect)
    if terms.attention_loss is not None:
        values["train/attention_loss"] = terms.attention_loss
        if cfg.eta > 0:
            pull = cfg.eta * terms.attention_loss
    values["mapo/term_attention"] = pull
    values["mapo/term"] = pull + terms.mask_effect
    return {name: Metric(total=value, weight=share) for name, value in values.items()}


def _policy_metrics(inputs: ObjectiveInputs, surrogate: Surrogate) -> dict[str, Metric]:
    kept = inputs.response_mask
    return {
        "train/clip_share": _mean(surrogate.clipped, kept),
        "train/ratio_max": _max(surrogate.ratio, kept),
        "train/entropy_nats": _mean(inputs.entropy_nats, kept),
    }


def _mask_metrics(inputs: ObjectiveInputs, cfg: ObjectiveConfig, weights: Weights) -> dict[str, Metric]:
    kept = inputs.response_mask
    lengths = kept.sum(-1)
    omega = omega_or_ones(weights, kept)
    row_max = omega.amax(-1) if omega.shape[-1] else omega.new_zeros(omega.shape[0])
    fallbacks = ~(inputs.pos_gate & kept).any(-1)
    return {
        "mapo/delta_h_abs_nats": _mean(weights.delta_h_nats.abs(), kept),
        "mapo/mask_max": _max(omega, kept),
        "mapo/mask_mean_max": _mean(row_max, lengths > 0),
        "mapo/mask_entropy": _mean(_normalised_entropy(omega, lengths), lengths >= SHORTEST_WITH_ENTROPY),
        "mapo/mask_capped_share": _mean(omega >= cfg.mask_clip, kept),
        "mapo/inverse_mask_max": _max(weights.nu, kept),
        "mapo/gate_share": _mean(inputs.pos_gate, kept),
        "mapo/gate_fallbacks_empty": _mean(fallbacks, lengths > 0),
        "mapo/prefactor": _mean(weights.prefactor, lengths > 0),
    }


def _audio_mass_metrics(inputs: ObjectiveInputs) -> dict[str, Metric]:
    if inputs.audio_mass is None:
        return {}
    kept = inputs.response_mask
    third = part_of_token(kept, 3)
    return {
        "mapo/audio_mass": _mean(inputs.audio_mass, kept),
        "mapo/audio_mass_early": _mean(inputs.audio_mass, kept & (third == 0)),
        "mapo/audio_mass_late": _mean(inputs.audio_mass, kept & (third == 2)),
    }


def _behaviour_metrics(
    inputs: ObjectiveInputs, cfg: ObjectiveConfig, behaviour: Float[Tensor, "batch time"]
) -> dict[str, Metric]:
    assert cfg.behaviour_clip is not None, "there are weights"
    kept = inputs.response_mask
    return {
        "train/behaviour_weight": _mean(behaviour, kept),
        "train/behaviour_clip_share": _mean(behaviour >= cfg.behaviour_clip, kept),
    }


def _normalised_entropy(omega: Float[Tensor, "batch time"], lengths: Tensor) -> Float[Tensor, " batch"]:
    """Entropy of omega / sum omega over ln T: 1 for a flat mask, 0 for all weight on one token."""
    total = omega.sum(-1, keepdim=True)
    shares = omega / total.masked_fill(total == 0, 1.0)
    entropy_nats: Tensor = torch.special.entr(shares).sum(-1)
    return entropy_nats / lengths.clamp(min=SHORTEST_WITH_ENTROPY).to(omega.dtype).log()


def _mean(values: Tensor, kept: Bool[Tensor, "..."]) -> Metric:
    floats = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return Metric(total=floats.masked_fill(~kept, 0.0).sum(), weight=kept.sum())


def _max(values: Tensor, kept: Bool[Tensor, "..."]) -> Metric:
    """The largest of non-negative values; 0 if none is kept."""
    inside = values.detach().masked_fill(~kept, 0.0)
    greatest = inside.amax() if inside.numel() else inside.new_zeros(())
    return Metric(total=greatest, weight=kept.sum(), reduce="max")
