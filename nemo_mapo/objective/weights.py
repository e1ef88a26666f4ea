"""All detached weights of one micro-batch, built once for the loss, its metrics and the report."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.attention_loss import attention_prefactor
from nemo_mapo.objective.dependency import audio_dependency, dependency_mask
from nemo_mapo.objective.entropy_mask import entropy_mask
from nemo_mapo.objective.masks import effective_gate, inverse_relevance, relevance_mask
from nemo_mapo.objective.temporal import temporal_weight
from nemo_mapo.types import ObjectiveInputs


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weight of each token and each completion."""

    delta_h_nats: Float[Tensor, "batch time"]
    """Differential entropy H(text reference) - H(policy)."""
    omega: Float[Tensor, "batch time"] | None
    """The mask of `objective.mask`; None if every token counts the same."""
    nu: Float[Tensor, "batch time"]
    """Inverse relevance."""
    gate: Bool[Tensor, "batch time"]
    """Substantive tokens, with the fallback for rows that have none."""
    temporal: Float[Tensor, "batch time"]
    prefactor: Float[Tensor, " batch"]


def build_weights(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> Weights:
    """Eq. 1 (or another mask), Eq. 3, the temporal weight and the first factor of Eq. 4, without gradient.

    Raises:
        ValueError: the text-only reference's entropies, the text-only log-probabilities of `mask=vppo` or the signal
            of `cfg.signal` are missing.
    """
    if inputs.text_ref_entropy_nats is None:
        raise ValueError("the differential entropy needs the text-only reference's entropies; none were given")
    delta_h = (inputs.text_ref_entropy_nats - inputs.entropy_nats).detach()
    relevance = delta_h if cfg.signal == "delta_entropy" else _given_signal(inputs, cfg)
    kept, tau_base, clip, normalize = inputs.response_mask, cfg.tau_base, cfg.mask_clip, cfg.normalize_delta_h
    omega = None
    if cfg.mask == "relevance":
        omega = relevance_mask(relevance, kept, tau_base=tau_base, clip=clip, normalize=normalize)
    elif cfg.mask == "entropy":
        omega = entropy_mask(inputs.entropy_nats, kept, share=cfg.entropy_share)
    elif cfg.mask == "vppo":
        if inputs.text_only_log_probs is None:
            raise ValueError("objective.mask=vppo needs the policy's log-probabilities without the audio; none given")
        dependency = audio_dependency(inputs.old_log_probs, inputs.text_only_log_probs, kept)
        omega = dependency_mask(dependency, kept, share=cfg.vppo_share)
    return Weights(
        delta_h_nats=delta_h,
        omega=omega,
        nu=inverse_relevance(relevance, inputs.pos_gate, kept, tau_base=tau_base, clip=clip, normalize=normalize),
        gate=effective_gate(inputs.pos_gate, kept),
        temporal=temporal_weight(kept, kappa=cfg.kappa, dtype=delta_h.dtype),
        prefactor=attention_prefactor(
            inputs.advantages,
            inputs.accuracy_rewards,
            fail_threshold=cfg.fail_threshold,
            fail_gate_floor=cfg.fail_gate_floor,
            advantage_floor=cfg.advantage_floor,
            clip=cfg.prefactor_clip,
        ),
    )


def _given_signal(inputs: ObjectiveInputs, cfg: ObjectiveConfig) -> Float[Tensor, "batch time"]:
    if inputs.audio_signal is None:
        raise ValueError(
            f"objective.signal={cfg.signal} is computed with the rollouts, but none is here: set it to delta_entropy"
        )
    return inputs.audio_signal.detach()


def token_weights(
    inputs: ObjectiveInputs, cfg: ObjectiveConfig
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Relevance mask and inverse relevance of each token, for colouring samples; 0 on padding."""
    weights = build_weights(inputs, cfg)
    return omega_or_ones(weights, inputs.response_mask), weights.nu


def omega_or_ones(weights: Weights, response_mask: Bool[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """The relevance mask, or 1 on every completion token if there is none."""
    return weights.omega if weights.omega is not None else response_mask.to(weights.nu.dtype)
