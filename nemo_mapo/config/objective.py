"""Settings of the objective: MAPO's own (paper Table 5) and the GRPO variants that compose with it."""

from typing import Annotated, Literal

from pydantic import Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import (
    AboveOne,
    Count,
    CountOrZero,
    Epsilon,
    Flag,
    Fraction,
    OneOrAbove,
    OpenFraction,
    Positive,
    PositiveFraction,
    Threshold,
    Weight,
)

UniversalTag = Literal["ADJ", "ADP", "ADV", "CONJ", "DET", "NOUN", "NUM", "PRON", "PRT", "VERB", "X"]
Signal = Literal["delta_entropy", "kl", "jsd", "log_ratio"]


@config_class
class ObjectiveConfig:
    """L = L_PG(mask) + beta * L_KL + eta * L_attn (paper Eq. 5)."""

    mask: Literal["relevance", "entropy", "vppo", "none"] = "relevance"
    """`relevance` weights the policy gradient by Eq. 1; `entropy` keeps the `entropy_share` of a completion's tokens at
    which the policy is least certain, `vppo` the `vppo_share` that depend most on the audio (arXiv 2510.09285); `none`
    gives every token weight 1 (plain GRPO)."""
    entropy_share: PositiveFraction = 0.2
    """Share of tokens that `mask=entropy` keeps (arXiv 2506.01939 keeps 20 %)."""
    vppo_share: PositiveFraction = 0.4
    """Share of tokens that `mask=vppo` keeps; the authors use 0.4."""
    vppo_scale_floor: Fraction | None = None
    """Smallest factor of VPPO's scaling of advantages by a completion's mean dependency on the audio (the authors use
    0.9); null does not scale."""
    perception_weight: Weight = 0.0
    """gamma of PAPO's perception term (arXiv 2507.06448; the authors use 0.01 to 0.02); 0 is off."""
    entropy_weight: Weight = 0.0
    """Weight of an entropy penalty: eta of PAPO (the authors use 0.03 to 0.05), 0.06 in VPPO; 0 is off."""
    eta: Weight = 0.1
    """Weight of the attention loss; 0 is exactly mask-only."""
    beta: Weight = 0.002
    """Weight of the KL penalty against the frozen reference."""
    tau_base: Positive = 1.0
    """Base temperature of both masks; the temperature is tau_base * ln(max(T, 2))."""
    signal: Signal = "delta_entropy"
    """What both masks use as the relevance of the audio to a token. `delta_entropy` is the paper's delta h; the others
    are ours and compare the policy at rollout with the text-only reference: `kl` and `jsd` of the full distributions,
    which see a change of mode at equal entropy, and `log_ratio` of the sampled token (docs/equations.md)."""
    normalize_delta_h: Flag = False
    """Divide |delta h| by its mean over the completion before the masks (ours; sharpens masks at small delta h)."""
    kappa: Weight = 1.0
    """Exponent of the temporal weight (t / T)^kappa."""
    mask_clip: Positive = 5.0
    """C_mask, the cap of both masks."""
    prefactor_clip: Positive = 3.0
    """C_pref, the cap of gate times |advantage| in the attention loss."""
    fail_gate_floor: Fraction = 0.1
    """alpha, the gate's value on completions that did not fail."""
    fail_threshold: Threshold = 0.0
    """theta_fail: a completion failed when its accuracy reward is at most this."""
    advantage_floor: Weight = 0.1
    """Smallest |advantage| in the attention loss on failed completions."""
    attention_epsilon: Epsilon = 1e-6
    """Added to the audio mass inside the logarithm."""
    clip_ratio: OpenFraction = 0.2
    """epsilon, the lower (and by default upper) clip of the importance ratio."""
    clip_ratio_high: Positive | None = None
    """Upper clip if it differs from `clip_ratio` (clip-higher, DAPO)."""
    surrogate: Literal["ppo", "cispo"] = "ppo"
    """`ppo` clips the objective; `cispo` caps the detached importance weight at 1 + `clip_ratio_high` and keeps every
    token's gradient (arXiv 2506.13585)."""
    dual_clip: AboveOne | None = None
    """Bound c of the dual clip: for negative advantages the loss is at most c * |A|; null switches it off."""
    behaviour_clip: OneOrAbove | None = None
    """C, the cap of the importance weight pi_old / mu of a token, where mu is the distribution that it was sampled from
    (earlier weights, temperature, top-k, top-p); null treats every token as sampled from pi_old."""
    truncation_clip: OneOrAbove | None = 2.0
    """C if `behaviour_clip` is null and rollout.sampling truncates the distribution (top_k, top_p); null is none."""
    aggregation: Literal["sequence_mean", "token_mean", "dr_grpo"] = "sequence_mean"
    """How token losses become one number: mean per completion then over completions (paper), one mean over all
    tokens (DAPO), or the sum over a constant length (Dr.GRPO)."""
    dr_grpo_length: Count | None = None
    """Constant length of `dr_grpo`, which requires it."""
    ratio: Literal["token", "sequence"] = "token"
    """`sequence` uses GSPO's length-normalised sequence ratio."""
    advantages: Literal["total", "per_reward"] = "total"
    """What is compared within a group: the total reward, or each reward on its own, normalised before the rewards are
    added and again over the rollout batch (GDPO, arXiv 2601.05242)."""
    advantage_std: Flag = True
    """Divide centred rewards by the group's standard deviation."""
    advantage_epsilon: Epsilon = 1e-4
    """Added to the standard deviation."""
    overlong_filter: Flag = False
    """Leave completions that were truncated at the length limit out of the policy gradient."""
    overlong_buffer: CountOrZero = 0
    """Soft overlong penalty: reward falls linearly by up to 1 over this many tokens before the limit; 0 is off."""
    head_reduction: Literal["max", "mean"] = "max"
    """How the audio mass of a layer's heads becomes one number."""
    keep_placeholders: Flag = False
    """The text-only reference keeps the audio positions (without embeddings) instead of dropping span and markers."""
    log_grounding: Flag = True
    """Measure audio mass and differential entropy for the curves even if no term of the loss needs them."""
    pos_tags: Annotated[tuple[UniversalTag, ...], Field(min_length=1)] = ("NOUN", "VERB", "ADJ", "ADV", "NUM", "X")
    """Universal part-of-speech tags that count as substantive."""
    gate_words: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Words that count as substantive whatever their tag, in any case: [yes, no] keeps both answers of a yes-no
    question in the gate; taggers call one of them an adverb or noun and the other a determiner (ours)."""

    def __post_init__(self) -> None:
        if (self.aggregation == "dr_grpo") != (self.dr_grpo_length is not None):
            raise ValueError(
                f"dr_grpo_length={self.dr_grpo_length} with aggregation={self.aggregation}: "
                "set dr_grpo_length (tokens, e.g. rollout.sampling.max_new_tokens) exactly when aggregation=dr_grpo"
            )
        if self.behaviour_clip is not None and self.ratio == "sequence":
            raise ValueError(
                f"behaviour_clip={self.behaviour_clip} weights tokens one by one, which is incompatible with "
                "ratio=sequence: set it to null, or ratio=token"
            )
        if self.surrogate == "cispo" and (self.ratio == "sequence" or self.dual_clip is not None):
            raise ValueError(
                f"surrogate=cispo weights tokens one by one and has no clipped objective: set ratio=token (is "
                f"{self.ratio}) and dual_clip=null (is {self.dual_clip})"
            )
        if self.advantages == "per_reward" and (self.overlong_buffer > 0 or not self.advantage_std):
            raise ValueError(
                f"advantages=per_reward divides every reward by its deviation: set advantage_std=true (is "
                f"{self.advantage_std}) and overlong_buffer=0 (is {self.overlong_buffer}), which is not a reward"
            )
        if self.clip_ratio_high is not None and self.clip_ratio_high < self.clip_ratio:
            raise ValueError(f"clip_ratio_high={self.clip_ratio_high} is below clip_ratio={self.clip_ratio}")

    @property
    def captures_audio_mass(self) -> bool:
        """Whether any consumer needs the audio attention mass."""
        return self.eta > 0 or self.log_grounding

    @property
    def compares_without_audio(self) -> bool:
        """Whether any consumer needs the policy's log-probs without the audio: one more pass over the rollouts."""
        return self.mask == "vppo" or self.vppo_scale_floor is not None or self.perception_weight > 0

    @property
    def uses_text_reference(self) -> bool:
        """Whether any consumer needs the differential entropy (and the gate)."""
        return self.mask != "none" or self.eta > 0 or self.log_grounding
