"""The charts of a run report: what they show and how to read them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from nemo_mapo.reports import theme
from nemo_mapo.reports.charts import Scale
from nemo_mapo.reports.loading import is_supervised, section
from nemo_mapo.reports.theme import NU, OMEGA, Colour


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of a chart, and its appearance."""

    key: str
    label: str
    colour: Colour
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart of metrics over training steps."""

    name: str
    title: str
    curves: tuple[Curve, ...]
    scale: Scale
    caption: str
    level: str = ""
    """Config key under `objective`, or "chance", of a horizontal reference line."""
    only_if_positive: bool = False
    """Leave the chart out while its metrics are zero, as they should be."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts that answer one question."""

    name: str
    title: str
    lead: str
    panels: tuple[Panel, ...]


LEARNING = Section(
    name="learning",
    title="Does it learn?",
    lead="Rewards of the sampled training completions, and accuracy on questions never trained on.",
    panels=(
        Panel(
            name="held-out",
            title="Held-out accuracy",
            curves=(
                Curve(key="val/accuracy", label="with audio", colour=theme.AUDIO),
                Curve(key="val/accuracy_silent", label="with silence", colour=theme.SILENT),
            ),
            scale=Scale(label="accuracy", kind="percent", bottom=0.0, top=1.0),
            caption="Blue should rise. Grey is the same model with the audio replaced by silence: it should stay "
            "near the dotted chance line. Vertical lines are 95 % intervals over the questions. If grey rises with "
            "blue, the model guesses the answers rather than hearing them.",
            level="chance",
        ),
        Panel(
            name="reward",
            title="Reward",
            curves=(Curve(key="rollout/reward_mean", label="weighted sum", colour=theme.LINE),),
            scale=Scale(label="reward, points"),
            caption="Mean weighted reward of the sampled completions. Faint: single steps; strong: their moving mean.",
        ),
        Panel(
            name="reward-parts",
            title="Parts of the reward",
            curves=(
                Curve(key="rollout/accuracy", label="accuracy", colour=theme.AUDIO),
                Curve(key="rollout/format", label="format", colour=theme.FORMAT),
                Curve(key="rollout/consistency", label="consistency", colour=theme.CONSISTENCY),
                Curve(key="rollout/finished_share", label="finished", colour=theme.LINE, dashed=True),
            ),
            scale=Scale(label="share of completions", kind="percent", bottom=0.0),
            caption="Where the reward comes from. If format or consistency falls while accuracy rises, the text is "
            "degenerating; unfinished completions were truncated at the length limit.",
        ),
        Panel(
            name="length",
            title="Length of completions",
            curves=(
                Curve(key="rollout/completion_tokens", label="tokens", colour=theme.LENGTH),
                Curve(key="rollout/reasoning_words", label="words of reasoning", colour=theme.LENGTH, dashed=True),
            ),
            scale=Scale(label="tokens, words", bottom=0.0),
            caption="Should stay level. If words of reasoning fall towards zero while the reward climbs, that is the "
            "collapse of the paper's Appendix G.",
        ),
    ),
)

LISTENING = Section(
    name="listening",
    title="Does it listen?",
    lead="Audio mass is the share of attention that goes to the audio (strongest head, mean of the target layers). "
    "It is necessary for listening but not sufficient: compare it with the accuracy with silence.",
    panels=(
        Panel(
            name="mass",
            title="Audio mass in training completions",
            curves=(
                Curve(key="mapo/audio_mass_early", label="first third", colour=theme.EARLY),
                Curve(key="mapo/audio_mass_late", label="last third", colour=theme.LATE),
                Curve(key="mapo/audio_mass", label="whole", colour=theme.MASS, dashed=True),
            ),
            scale=Scale(label="share of attention", bottom=0.0),
            caption="A last third far below the first is late-stage modality collapse: the end of the reasoning "
            "relies on its own text. MAPO should raise it.",
        ),
        Panel(
            name="mass-held-out",
            title="Audio mass on held-out questions",
            curves=(
                Curve(key="val/audio_mass_early", label="first third", colour=theme.EARLY),
                Curve(key="val/audio_mass_late", label="last third", colour=theme.LATE),
                Curve(key="val/audio_mass", label="whole", colour=theme.MASS, dashed=True),
            ),
            scale=Scale(label="share of attention", bottom=0.0),
            caption="The same for greedy completions of held-out questions; step 0 is the start policy.",
        ),
        Panel(
            name="delta-h",
            title="Differential entropy |Δh|",
            curves=(Curve(key="mapo/delta_h_abs_nats", label="mean |Δh|", colour=theme.LINE),),
            scale=Scale(label="nats per token", bottom=0.0),
            caption="How much the audio changes the certainty about the next token, relative to the frozen text-only "
            "reference. Near zero, neither mask has a signal to work with.",
        ),
        Panel(
            name="term",
            title="Size of MAPO's terms",
            curves=(
                Curve(key="mapo/term", label="both", colour=theme.LINE),
                Curve(key="mapo/term_attention", label="attention loss", colour=theme.ATTENTION),
                Curve(key="mapo/term_mask", label="mask", colour=theme.MASK),
            ),
            scale=Scale(label="|change of the loss|", kind="log"),
            caption="What MAPO adds to plain GRPO. Below 1e-4 the run is GRPO in all but name.",
        ),
    ),
)

LOSSES = Section(
    name="losses",
    title="Losses",
    lead="Each term on its own, and whether optimisation is stable.",
    panels=(
        Panel(
            name="loss",
            title="Policy-gradient and total loss",
            curves=(
                Curve(key="train/policy_loss", label="policy gradient", colour=theme.LINE, dashed=True),
                Curve(key="train/loss", label="total", colour=theme.LINE),
            ),
            scale=Scale(label="loss"),
            caption="Advantages are centred in each group, so the policy-gradient loss hovers around zero; its "
            "level does not measure progress.",
        ),
        Panel(
            name="attention-loss",
            title="Attention loss",
            curves=(Curve(key="train/attention_loss", label="attention loss", colour=theme.ATTENTION),),
            scale=Scale(label="loss, before η"),
            caption="Penalty -log(audio mass) on substantive tokens, late ones more. Falls as the audio mass rises.",
        ),
        Panel(
            name="kl",
            title="KL to the reference",
            curves=(Curve(key="train/kl_loss", label="KL", colour=theme.LINE),),
            scale=Scale(label="nats per token", bottom=0.0),
            caption="Distance from the start policy. A gentle slope is fine; an upward bend means that the policy is "
            "running away.",
        ),
        Panel(
            name="entropy",
            title="Entropy of the policy",
            curves=(Curve(key="train/entropy_nats", label="entropy", colour=theme.LINE),),
            scale=Scale(label="nats per token", bottom=0.0),
            caption="Falls as the policy becomes more certain. Near zero, all completions of a group are the same.",
        ),
        Panel(
            name="gradient",
            title="Gradient norm",
            curves=(Curve(key="train/grad_norm", label="before clipping", colour=theme.LINE),),
            scale=Scale(label="norm", bottom=0.0),
            caption="Norm of the whole gradient before clipping. Single spikes are harmless, a rising baseline is not.",
        ),
        Panel(
            name="lost",
            title="Lost signal",
            curves=(
                Curve(key="rollout/equal_reward_groups", label="groups with equal rewards", colour=theme.LINE),
                Curve(key="train/clip_share", label="clipped tokens", colour=theme.LINE, dashed=True),
            ),
            scale=Scale(label="share", kind="percent", bottom=0.0),
            caption="A group whose completions all got the same reward has zero advantage and teaches nothing. "
            "No tokens are clipped if each rollout batch is used for one optimiser step.",
        ),
    ),
)

MASKS = Section(
    name="masks",
    title="Masks",
    lead=f"The relevance mask {OMEGA} weights the policy gradient, the inverse mask {NU} the attention loss. A "
    "weight of 1 everywhere is plain GRPO. At the paper's temperature the relevance mask is nearly flat, and the "
    "attention loss is most of what MAPO adds; objective.tau_base sharpens the mask.",
    panels=(
        Panel(
            name="mask-peak",
            title="Peaks of the masks",
            curves=(
                Curve(key="mapo/mask_max", label=f"highest {OMEGA}", colour=theme.MASK),
                Curve(key="mapo/mask_mean_max", label=f"mean of peaks {OMEGA}", colour=theme.MASK, dashed=True),
                Curve(key="mapo/inverse_mask_max", label=f"highest {NU}", colour=theme.ATTENTION),
            ),
            scale=Scale(label="token weight", bottom=0.0),
            caption="1 is flat, the dotted line is the cap. Peaks near 1 call for a lower objective.tau_base or "
            "objective.normalize_delta_h.",
            level="mask_clip",
        ),
        Panel(
            name="mask-entropy",
            title="Entropy of the relevance mask",
            curves=(Curve(key="mapo/mask_entropy", label="entropy", colour=theme.MASK),),
            scale=Scale(label="entropy / ln T", top=1.0),
            caption="How evenly the policy gradient is spread over the tokens of a completion: 1 is a flat mask, "
            "0 is all weight on one token.",
        ),
        Panel(
            name="mask-share",
            title="Tokens at the cap, tokens that pass the gate",
            curves=(
                Curve(key="mapo/mask_capped_share", label=f"{OMEGA} at the cap", colour=theme.MASK),
                Curve(key="mapo/gate_share", label="pass the part-of-speech gate", colour=theme.ATTENTION),
            ),
            scale=Scale(label="share of tokens", kind="percent", bottom=0.0),
            caption="The gate lets only substantive words into the attention loss; about half of the tokens is usual.",
        ),
        Panel(
            name="fallbacks",
            title="Gate fallbacks",
            curves=(
                Curve(key="mapo/gate_fallbacks", label="all", colour=theme.ATTENTION),
                Curve(
                    key="mapo/gate_fallbacks_empty", label="no substantive word", colour=theme.ATTENTION, dashed=True
                ),
            ),
            scale=Scale(label="share of completions", kind="percent", bottom=0.0),
            caption="Completions whose gate was replaced by all ones.",
            only_if_positive=True,
        ),
        Panel(
            name="prefactor",
            title="Prefactor of the attention loss",
            curves=(Curve(key="mapo/prefactor", label="mean prefactor", colour=theme.ATTENTION),),
            scale=Scale(label="factor", bottom=0.0),
            caption="Failure gate times size of the advantage: the attention loss acts on failed completions, and less "
            "as fewer fail.",
        ),
    ),
)

_TARGETS = Panel(
    name="target-loss",
    title="Loss on the targets",
    curves=(
        Curve(key="train/loss", label="training", colour=theme.LINE),
        Curve(key="val/loss", label="held-out", colour=theme.AUDIO),
    ),
    scale=Scale(label="nats per token", bottom=0.0),
    caption="Mean negative log-likelihood of the target tokens. If the held-out curve rises while the training curve "
    "falls, stop: checkpoints/best is the one with the best validation.",
)
_FORMAT = Panel(
    name="format-held-out",
    title="Format of held-out completions",
    curves=(Curve(key="val/format", label="in format", colour=theme.FORMAT),),
    scale=Scale(label="share of completions", kind="percent", bottom=0.0, top=1.0),
    caption="Greedy completions whose reasoning and answer follow the template. MAPO needs at least 90 %.",
)


def _panel(section: Section, name: str) -> Panel:
    return next(panel for panel in section.panels if panel.name == name)


SUPERVISED = (
    replace(
        LEARNING,
        lead="Accuracy and format on questions never trained on.",
        panels=(_panel(LEARNING, "held-out"), _FORMAT),
    ),
    replace(LISTENING, panels=(_panel(LISTENING, "mass-held-out"),)),
    replace(
        LOSSES,
        lead="What is minimised, and whether optimisation is stable.",
        panels=(_TARGETS, _panel(LOSSES, "gradient")),
    ),
)
"""Charts of supervised training (examples/sft.py)."""

SPEED = Panel(
    name="speed",
    title="Generation speed",
    curves=(Curve(key="rollout/tokens_per_second", label="tokens", colour=theme.LENGTH),),
    scale=Scale(label="tokens per second", bottom=0.0),
    caption="Completion tokens sampled per second of generation.",
)

PHASE_ORDER = ("data", "rollout", "reference", "references", "pos_gate", "rewards", "train", "validation")
"""Phases in the order of a step; other phases come last."""

SECTIONS = (LEARNING, LISTENING, LOSSES, MASKS)
"""Charts of a MAPO run."""

_OWN_COLOURS = (theme.LENGTH, theme.MASK, theme.ATTENTION, theme.MASS, theme.EARLY, theme.LATE)


def sections_of(config: Mapping[str, Any]) -> tuple[Section, ...]:
    """The charts of a run: those of its kind, and one of further rewards that its config names."""
    if is_supervised(config):
        return SUPERVISED
    terms = section(section(config, "rewards"), "terms")
    drawn = {curve.key for panel in LEARNING.panels for curve in panel.curves}
    weighted = [
        name for name, term in terms.items() if isinstance(term, Mapping) and term.get("weight") not in (0, None)
    ]
    keys = [key for name in weighted if (key := f"rollout/{name}") not in drawn]
    curves = tuple(
        Curve(key=key, label=key.removeprefix("rollout/"), colour=colour)
        for key, colour in zip(keys, cycle(_OWN_COLOURS), strict=False)
    )
    if not curves:
        return SECTIONS
    further = Panel(
        name="further-rewards",
        title="Further rewards",
        curves=curves,
        scale=Scale(label="reward, points"),
        caption="Means of the other entries of rewards.terms, before their weights.",
    )
    return (replace(LEARNING, panels=(*LEARNING.panels, further)), *SECTIONS[1:])
