"""The MAPO objective (Eq. 5), composed from its terms."""

from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.aggregation import aggregate, loss_denominator, row_losses
from nemo_mapo.objective.attention_loss import attention_loss
from nemo_mapo.objective.behaviour import behaviour_weights
from nemo_mapo.objective.cispo import cispo_surrogate
from nemo_mapo.objective.kl import k3_kl
from nemo_mapo.objective.metrics import LossTerms, objective_metrics
from nemo_mapo.objective.perception import entropy_estimate, perception_kl
from nemo_mapo.objective.surrogate import Surrogate, clipped_surrogate
from nemo_mapo.objective.weights import Weights, build_weights, token_weights
from nemo_mapo.types import LossOutput, ObjectiveInputs

__all__ = ["mapo_loss", "token_weights"]


def mapo_loss(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> LossOutput:
    """One micro-batch's share of the MAPO loss; the shares of an optimiser step add up to its loss.

    Eq. 5: L = L_PG + beta L_KL + eta L_attn, where

    - L_PG is the clipped surrogate (or CISPO's), its tokens weighted by the mask omega (Eq. 1, Eq. 2); with
      `behaviour_clip` a token's loss is multiplied by its truncated importance weight as well,
    - L_KL is the k3 estimate, aggregated like L_PG but without omega,
    - L_attn is the attention loss (Eq. 4), a mean over completions under every aggregation.

    `perception_weight` subtracts PAPO's term, `entropy_weight` adds its entropy term; both are aggregated like L_KL.

    A term with coefficient 0 is left out rather than multiplied by 0: eta = 0 is exactly mask-only, and with
    mask = none it is exactly GRPO. The overlong filter removes unfinished rows from L_PG only and does not change the
    denominators. Differentiable in `log_probs` and `audio_mass`; every weight is detached.

    Metrics are listed in `objective_metrics`.

    Raises:
        ValueError: eta > 0 without an audio mass or without its gradient, `behaviour_clip` without behaviour
            log-probabilities, or a denominator below 1.
    """
    _check(inputs, cfg)
    weights = build_weights(inputs, cfg) if _needs_weights(inputs, cfg) else None
    surrogate = _surrogate(inputs, cfg)
    behaviour = _behaviour_weights(inputs, cfg)
    if behaviour is not None:
        surrogate = replace(surrogate, token_losses=behaviour * surrogate.token_losses)
    policy_mask = _policy_mask(inputs, cfg)

    policy_loss = _aggregate(
        surrogate.token_losses, policy_mask, inputs, cfg, None if weights is None else weights.omega
    )
    kl_tokens = k3_kl(inputs.log_probs, inputs.ref_log_probs, inputs.response_mask)
    kl_loss = _aggregate(kl_tokens, inputs.response_mask, inputs, cfg)
    attention = _attention_loss(inputs, cfg, weights)

    loss = policy_loss
    if cfg.beta > 0:
        loss = loss + cfg.beta * kl_loss
    if cfg.eta > 0 and attention is not None:
        loss = loss + cfg.eta * attention

    perception, entropy = _perception_loss(inputs, cfg), None
    if perception is not None:
        loss = loss - cfg.perception_weight * perception
    if cfg.entropy_weight > 0:
        entropy = _aggregate(
            entropy_estimate(inputs.log_probs, inputs.response_mask), inputs.response_mask, inputs, cfg
        )
        loss = loss + cfg.entropy_weight * entropy

    terms = LossTerms(
        policy_loss=policy_loss.detach(),
        kl_loss=kl_loss.detach(),
        attention_loss=None if attention is None else attention.detach(),
        loss=loss.detach(),
        perception_kl=None if perception is None else perception.detach(),
        entropy=None if entropy is None else entropy.detach(),
        mask_effect=_mask_effect(surrogate, policy_mask, inputs, cfg, weights),
    )
    return LossOutput(loss=loss, metrics=objective_metrics(inputs, cfg, weights, surrogate, terms, behaviour))


def _check(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> None:
    if cfg.eta > 0 and inputs.audio_mass is None:
        raise ValueError(
            f"objective.eta={cfg.eta} needs the audio attention mass, but none was captured: "
            "measure it on the target layers, or set objective.eta=0"
        )
    mass = inputs.audio_mass
    if cfg.eta > 0 and mass is not None and inputs.log_probs.requires_grad and not mass.requires_grad:
        raise ValueError(
            f"objective.eta={cfg.eta} needs the gradient of the audio mass, but the mass has none: a target layer ran "
            "without gradient, as under activation recompute"
        )
    if inputs.global_sequences < 1:
        raise ValueError(f"global_sequences={inputs.global_sequences} must be at least 1")


def _perception_loss(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> Float[Tensor, ""] | None:
    if cfg.perception_weight == 0:
        return None
    if inputs.text_only_log_probs is None:
        raise ValueError(
            f"objective.perception_weight={cfg.perception_weight} needs the policy's log-probabilities without the "
            "audio, but none were given"
        )
    tokens = perception_kl(inputs.log_probs, inputs.text_only_log_probs, inputs.response_mask)
    return _aggregate(tokens, inputs.response_mask, inputs, cfg)


def _surrogate(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> Surrogate:
    clip_high = cfg.clip_ratio if cfg.clip_ratio_high is None else cfg.clip_ratio_high
    if cfg.surrogate == "cispo":
        return cispo_surrogate(
            inputs.log_probs, inputs.old_log_probs, inputs.advantages, inputs.response_mask, clip_high=clip_high
        )
    return clipped_surrogate(
        inputs.log_probs,
        inputs.old_log_probs,
        inputs.advantages,
        inputs.response_mask,
        clip_low=cfg.clip_ratio,
        clip_high=clip_high,
        dual_clip=cfg.dual_clip,
        ratio=cfg.ratio,
    )


def _behaviour_weights(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> Float[Tensor, "batch time"] | None:
    if cfg.behaviour_clip is None:
        return None
    if inputs.behaviour_log_probs is None:
        raise ValueError(
            f"objective.behaviour_clip={cfg.behaviour_clip} needs the log-probabilities of the distribution sampled "
            "from, but there are none: set it to null"
        )
    return behaviour_weights(
        inputs.old_log_probs, inputs.behaviour_log_probs, inputs.response_mask, clip=cfg.behaviour_clip
    )


def _policy_mask(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> Bool[Tensor, "batch time"]:
    if not cfg.overlong_filter:
        return inputs.response_mask
    return inputs.response_mask & inputs.finished.unsqueeze(-1)


def _aggregate(
    token_losses: Float[Tensor, "batch time"],
    kept: Bool[Tensor, "batch time"],
    inputs: ObjectiveInputs,
    cfg: ObjectiveConfig,
    weights: Float[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    return aggregate(
        token_losses,
        kept,
        weights,
        kind=cfg.aggregation,
        global_sequences=inputs.global_sequences,
        global_tokens=inputs.global_tokens,
        constant_length=cfg.dr_grpo_length,
    )


def _needs_weights(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> bool:
    """Plain GRPO needs none, but they are built for the curves if their inputs exist."""
    return cfg.mask != "none" or cfg.eta > 0 or inputs.text_ref_entropy_nats is not None


def _attention_loss(inputs: ObjectiveInputs, cfg: ObjectiveConfig, weights: Weights | None) -> Float[Tensor, ""] | None:
    if inputs.audio_mass is None or weights is None:
        return None
    rows = attention_loss(
        inputs.audio_mass,
        weights.temporal * weights.nu,
        weights.gate,
        weights.prefactor,
        epsilon=cfg.attention_epsilon,
    )
    return rows.sum() / inputs.global_sequences


def _mask_effect(
    surrogate: Surrogate,
    policy_mask: Bool[Tensor, "batch time"],
    inputs: ObjectiveInputs,
    cfg: ObjectiveConfig,
    weights: Weights | None,
) -> Float[Tensor, ""]:
    """|L_PG(mask) - L_PG(uniform)|, taken per row, so that it adds up and advantages of both signs do not cancel."""
    losses = surrogate.token_losses.detach()
    if weights is None:
        return losses.new_zeros(())
    masked = row_losses(losses, policy_mask, weights.omega, kind=cfg.aggregation)
    uniform = row_losses(losses, policy_mask, kind=cfg.aggregation)
    denominator = loss_denominator(cfg.aggregation, inputs.global_sequences, inputs.global_tokens, cfg.dr_grpo_length)
    return (masked - uniform).abs().sum() / denominator
