"""Signs in the metrics that a run is not doing what its reward curve suggests.

Every check is a pure function of the metric records and of the config's `objective` section. It returns a `Finding`,
or None if nothing is wrong or its metrics were not recorded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_mapo.reports.loading import Record, Series, series
from nemo_mapo.reports.outcome import edge_steps

MIN_TREND_STEPS = 10
"""Fewest training steps for comparing start and end: with fewer, a trend is noise."""

COLLAPSED_LENGTH_SHARE = 0.5
"""Reasoning at less than half of its first length has lost content, not filler: in the paper's Appendix G it falls from
63 words to 2, while harmless shortening (its Figure 4, mask only) is about a tenth."""

CLIMB_MIN = 0.02
"""Least rise (accuracy, or reward as a share of its first value) that counts as climbing."""

VANISHED_TERM = 1e-4
"""With MAPO's additive term below this, what remains is plain GRPO: Appendix G reports 4e-5 on the runs it calls
ungrounded."""

FLAT_MASK_PEAK = 1.5
"""Mean over completions of the highest token weight. A flat mask peaks at 1, the cap is 5; below 1.5 no token gets even
half again its credit under GRPO."""

FLAT_MASK_ENTROPY = 0.99
"""Entropy of the mask over ln T: above, the weights of a 60-token completion differ from 1 by less than 0.3 (standard
deviation, from entropy deficit = variance / 2), even if a single token peaks."""

GATE_FALLBACK_NOTE = 0.0
"""Any fallback of the part-of-speech gate is reported: it steers attention on every token, even function words."""

HIGH_MASS = 0.2
"""Audio mass from which the audio is expected to matter: a fifth of the strongest head's attention."""

SILENT_GAP_MIN = 0.05
"""If silence costs less accuracy than this, the audio is not used: three standard errors of a 1,000-question test."""

KL_HIGH_NATS = 0.5
"""KL to the reference per token, above which the policy has left it: a token is then on average e^0.5 = 1.6 times more
likely than under the reference."""

KL_GROWTH = 3.0
"""Growth of the KL from the run's middle to its end that counts as running away; steady training grows it linearly,
about twofold over this stretch."""

KL_GROWTH_FLOOR_NATS = 0.1
"""Below this KL, growth by any factor is harmless."""

HALF = 0.5
"""Above this accuracy, groups have equal rewards mostly because questions are too easy; below it, too hard."""

EQUAL_GROUP_SHARE = 0.5
"""Groups whose rewards are all equal give no policy gradient; above one half, most of the rollouts are wasted."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One warning: what was observed, and what to do about it."""

    key: str
    title: str
    detail: str
    advice: str


Objective = Mapping[str, Any]
Check = Callable[[Sequence[Record], Objective, float], Finding | None]


def find_warnings(records: Sequence[Record], objective: Objective, *, chance: float) -> list[Finding]:
    """Run every check over the metrics of a run.

    Args:
        records: Metric records by step.
        objective: The config's `objective` section; missing keys stand for the defaults of `ObjectiveConfig`.
        chance: Accuracy of guessing.
    """
    return [finding for check in CHECKS if (finding := check(records, objective, chance)) is not None]


def check_finite(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """NaN or infinite metrics: whatever produced them may have gone into later updates."""
    broken: dict[str, int] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, float) and not np.isfinite(value):
                broken.setdefault(key, int(record["step"]))
    if not broken:
        return None
    listed = ", ".join(f"{key} (from step {step})" for key, step in broken.items())
    return Finding(
        key="not_finite",
        title="Some metrics are NaN or infinite",
        detail=f"{listed}. The curves leave these steps out.",
        advice="Inspect the first such step; lower model.optim.lr or gradient_clip_val.",
    )


def check_reasoning_collapse(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """Reasoning shrinks while accuracy or reward climbs (paper, Appendix G): the curve looks good, the model guesses.

    Rewards check the answer and the tags, so the shortest text that has both is an attractor.
    """
    words = series(records, "rollout/reasoning_words")
    if len(words) < MIN_TREND_STEPS:
        return None
    before, after = _edges(words)
    if before <= 0 or after >= COLLAPSED_LENGTH_SHARE * before:
        return None
    climbing = _climbing(records)
    if climbing is None:
        return None
    return Finding(
        key="reasoning_collapse",
        title="Reasoning collapses while the reward climbs",
        detail=f"Words of reasoning fell from {before:.0f} to {after:.1f} while {climbing}.",
        advice="Do not trust the accuracy curve. Raise objective.beta, lower model.optim.lr, set "
        "rollout.sampling.min_new_tokens, or start from a policy that reasons.",
    )


def check_vanished_terms(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """MAPO's own terms shrink to nothing: the run has become GRPO, whatever its config says (Appendix G)."""
    if not _uses_mapo(objective):
        return None
    term = series(records, "mapo/term")
    if len(term) < MIN_TREND_STEPS:
        return None
    size = float(np.abs(term.values[-edge_steps(len(term)) :]).mean())
    if size >= VANISHED_TERM:
        return None
    return Finding(
        key="mapo_vanished",
        title="MAPO's terms have vanished",
        detail=f"Over the last steps they change the loss by {size:.1e} on average (limit {VANISHED_TERM:.0e}).",
        advice="Completions may lack words to ground (see reasoning length and the gate's share), or the mask is flat: "
        "raise objective.eta, lower objective.tau_base.",
    )


def check_flat_masks(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """The relevance mask hardly differs from 1: with tau = tau_base ln T, a small |delta h| makes it nearly uniform.

    This is a fault only if the run relies on the mask alone: with an attention loss, as in the paper, it is usual.
    """
    if objective.get("mask", "relevance") == "none" or objective.get("eta") != 0:
        return None
    peak, entropy = series(records, "mapo/mask_mean_max"), series(records, "mapo/mask_entropy")
    seen = []
    if len(peak) and (height := peak.last(edge_steps(len(peak)))) < FLAT_MASK_PEAK:
        cap = objective.get("mask_clip", 5)
        seen.append(f"the highest token weight of a completion is {height:.2f} on average (flat is 1, the cap {cap:g})")
    if len(entropy) and (evenness := entropy.last(edge_steps(len(entropy)))) > FLAT_MASK_ENTROPY:
        seen.append(f"the mask has {evenness:.1%} of the entropy of a flat one")
    if not seen:
        return None
    return Finding(
        key="flat_masks",
        title="The masks are nearly flat",
        detail=f"Over the last steps {', and '.join(seen)}: with objective.eta=0 the run is close to plain GRPO.",
        advice="Lower objective.tau_base, or set objective.normalize_delta_h=true.",
    )


def check_gate_fallbacks(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """The part-of-speech gate was replaced by all ones: an unusable tagging, or no substantive word at all."""
    fallbacks = series(records, "mapo/gate_fallbacks")
    if not len(fallbacks) or float(fallbacks.values.sum()) <= GATE_FALLBACK_NOTE:
        return None
    prefix = "mapo/gate_fallback_"
    reasons = sorted({key for record in records for key in record if key.startswith(prefix)})
    named = ", ".join(reason.removeprefix(prefix).replace("_", " ") for reason in reasons)
    return Finding(
        key="gate_fallbacks",
        title="The part-of-speech gate let all tokens pass",
        detail=f"In {fallbacks.values.mean():.1%} of the completions, at {int((fallbacks.values > 0).sum())} of "
        f"{len(fallbacks)} steps{f' ({named})' if named else ''}.",
        advice="Read the samples: text without nouns or verbs is degenerate. If the text is fine, the tagger failed; "
        "see the log.",
    )


def check_not_listening(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """Attention to the audio is high but silence costs no accuracy: mass is not listening.

    Checked only above chance: a model that guesses has nothing to lose to silence.
    """
    accuracy, silent = series(records, "val/accuracy"), series(records, "val/accuracy_silent")
    mass = series(records, "val/audio_mass")
    if not len(mass):
        mass = series(records, "mapo/audio_mass")
    if not (len(accuracy) and len(silent) and len(mass)) or accuracy.last() < chance + SILENT_GAP_MIN:
        return None
    gap = accuracy.last() - silent.last()
    if mass.last() < HIGH_MASS or gap >= SILENT_GAP_MIN:
        return None
    return Finding(
        key="not_listening",
        title="The model attends to the audio but does not listen",
        detail=f"Audio mass is {mass.last():.2f}, yet silence costs only {100 * gap:.1f} points of accuracy "
        f"({accuracy.last():.1%} with, {silent.last():.1%} without audio).",
        advice="Lower objective.eta; check that the questions need the audio and that the perception encoder is "
        "trained.",
    )


def check_kl(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """The policy runs away from its reference: the KL is high or accelerates."""
    kl = series(records, "train/kl_loss")
    if len(kl) < MIN_TREND_STEPS:
        return None
    edge = edge_steps(len(kl))
    middle, recent = float(kl.values[len(kl) // 4 : -len(kl) // 4].mean()), kl.last(edge)
    growing = recent > KL_GROWTH_FLOOR_NATS and recent > KL_GROWTH * middle
    if recent <= KL_HIGH_NATS and not growing:
        return None
    return Finding(
        key="kl_runaway",
        title="The KL to the reference runs away",
        detail=f"{recent:.2f} nats per token over the last steps, {middle:.2f} in the middle of the run.",
        advice="Raise objective.beta or lower model.optim.lr; read the late samples for broken text.",
    )


def check_no_reward(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """No completion earns a reward: there is nothing to learn from, and harder questions would not help."""
    reward = series(records, "rollout/reward_mean")
    if not len(reward) or reward.values[-edge_steps(len(reward)) :].any():
        return None
    finished, form = series(records, "rollout/finished_share"), series(records, "rollout/format")
    if len(finished) and finished.last(edge_steps(len(finished))) == 0:
        advice = "Every completion is truncated: raise rollout.sampling.max_new_tokens."
    elif len(form) and form.last(edge_steps(len(form))) == 0:
        advice = (
            "None has the format that the rewards expect. Compare a sample below with rewards.template, and describe "
            "the format in data.prompt.instruction, or start from a model that has learned it (examples/sft.py)."
        )
    else:
        advice = "The format is right, the answers are not: use easier questions, or start from a stronger policy."
    return Finding(
        key="no_reward",
        title="No completion earns a reward",
        detail=f"All were 0 over the last {edge_steps(len(reward))} steps, so every advantage is zero.",
        advice=advice,
    )


def check_equal_groups(records: Sequence[Record], objective: Objective, chance: float) -> Finding | None:
    """Most groups have equal rewards, hence zero advantage: questions are too easy or hard, or sampling is too cold."""
    equal, accuracy = series(records, "rollout/equal_reward_groups"), series(records, "rollout/accuracy")
    if not len(equal) or check_no_reward(records, objective, chance) is not None:
        return None
    recent = equal.last(edge_steps(len(equal)))
    if recent <= EQUAL_GROUP_SHARE:
        return None
    right = accuracy.last(edge_steps(len(accuracy))) if len(accuracy) else None
    return Finding(
        key="equal_groups",
        title="Most groups teach nothing",
        detail=f"In {recent:.0%} of the groups all completions got the same reward, so their advantage is zero.",
        advice="Raise rollout.sampling.temperature or trainer.mapo.num_rollouts_per_prompt"
        + (
            "."
            if right is None
            else f"; {right:.0%} are right: use {'harder' if right > HALF else 'easier'} questions."
        ),
    )


CHECKS: tuple[Check, ...] = (
    check_finite,
    check_reasoning_collapse,
    check_vanished_terms,
    check_flat_masks,
    check_gate_fallbacks,
    check_not_listening,
    check_kl,
    check_no_reward,
    check_equal_groups,
)

CHECKED_IN_WORDS = (
    "finite metrics, length of reasoning against reward, size of MAPO's terms, flatness of the masks, gate fallbacks, "
    "listening against silence, KL to the reference, any reward at all, groups with equal rewards"
)


def _uses_mapo(objective: Objective) -> bool:
    eta = objective.get("eta")
    return objective.get("mask", "relevance") != "none" or eta is None or eta > 0


def _edges(curve: Series) -> tuple[float, float]:
    edge = edge_steps(len(curve))
    return curve.first(edge), curve.last(edge)


def _climbing(records: Iterable[Record]) -> str | None:
    kept = tuple(records)
    accuracy, reward = series(kept, "rollout/accuracy"), series(kept, "rollout/reward_mean")
    if len(accuracy) >= MIN_TREND_STEPS:
        before, after = _edges(accuracy)
        if after - before >= CLIMB_MIN:
            return f"accuracy rose from {before:.2f} to {after:.2f}"
    if len(reward) >= MIN_TREND_STEPS:
        before, after = _edges(reward)
        if after - before >= CLIMB_MIN * abs(before):
            return f"the reward rose from {before:.2f} to {after:.2f}"
    return None
