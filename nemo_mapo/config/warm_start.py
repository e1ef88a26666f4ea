"""The supervised start of the embedded run."""

from typing import Literal

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import Count, Fraction, LearningRate, OrderSeed, PathText, Weight


@config_class
class WarmStartStageConfig:
    """One stage of supervised training."""

    target: Literal["caption", "reasoning", "manifest"]
    """Which templated text is learned; `manifest` is the cut's own `reasoning`, a whole completion."""
    steps: Count
    """Optimiser steps."""
    batch_size: Count
    """Texts per step."""
    only_late_share: Fraction = 0.0
    """Share of samples in which only tokens after the first full stop hear the audio, so that the model learns to
    listen late at all (see docs/grounding.md, "only late tokens hear")."""
    truth_share: Fraction = 1.0
    """Share of reasoning texts whose late belief is the truth; the rest follow the language prior."""


@config_class
class WarmStartConfig:
    """Supervised start of the embedded run; its result is cached by the hash of what it depends on."""

    cuts_path: PathText
    """Lhotse cuts with caption, question, choices, answer."""
    cache_dir: PathText = ".cache/warm_start"
    """Where finished warm starts are kept."""
    stages: tuple[WarmStartStageConfig, ...]
    lr: LearningRate = 2e-3
    """Peak learning rate; a cosine with 5 % warm-up."""
    weight_decay: Weight = 0.01
    """Weight decay of AdamW."""
    text_only_share: Fraction = 0.1
    """Share of samples whose audio span is dropped, so that the text-only reference stays in distribution."""
    silent_clip_share: Fraction = 0.06
    """Share of samples whose clip is silence, so that the model learns to guess among the choices on silence."""
    seed: OrderSeed = 0
    """Seed of the initial weights and of what is drawn."""

    def __post_init__(self) -> None:
        if (total := self.text_only_share + self.silent_clip_share) > 1:
            raise ValueError(f"text_only_share + silent_clip_share = {total:g} exceeds 1, all samples")
