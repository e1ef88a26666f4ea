"""Sample completions with their tokens coloured by relevance weight, inverse weight, audio mass or |delta h|."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_mapo.reports.clips import has_clips, kept_clips
from nemo_mapo.reports.loading import Record, is_number
from nemo_mapo.reports.theme import ATTENTION, CARD, LINE, MASK, MASS, NU, OMEGA, Colour, channels, mixed

LEVELS = 8
"""Steps of a colour scale: as many as the eye can distinguish, each with a short class name instead of a colour per
token."""

LEAST_COLOUR = 0.03
"""Share of the view's colour in its lowest level: almost the background, so that the least token does not stand out."""

PER_GROUP = 2
"""Samples shown for each combination of early or late and right or wrong."""

EDGE_OF_RUN = 1 / 3
"""Samples from the first and last third of the steps count as early and late."""

BYTE_LEVEL = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
"""How byte-level and SentencePiece vocabularies write spaces and line breaks."""

_SPECIAL = re.compile(r"</?[^<>\s]+>")
_TAG = re.compile(rf"({_SPECIAL.pattern})")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to colour tokens."""

    field: str
    letter: str
    """Prefix of the level classes in the page."""
    label: str
    meaning: str
    colour: Colour
    """Colour of the largest value."""
    least_top: float
    """Lowest upper end of the scale, without which a flat signal would be stretched to look like a peaked one."""


VIEWS = (
    View(
        field="omega",
        letter="o",
        label=f"relevance weight {OMEGA}",
        meaning="weight of a token in the policy gradient; 1 is what GRPO gives every token",
        colour=MASK,
        least_top=2.0,
    ),
    View(
        field="nu",
        letter="n",
        label=f"inverse weight {NU}",
        meaning="weight of a token in the attention loss; 0 if the part-of-speech gate is closed",
        colour=ATTENTION,
        least_top=2.0,
    ),
    View(
        field="audio_mass",
        letter="m",
        label="audio mass",
        meaning="share of attention on the audio when the token was predicted",
        colour=MASS,
        least_top=0.1,
    ),
    View(
        field="delta_h_nats",
        letter="d",
        label="|Δh|",
        meaning="nats by which the audio changes the uncertainty about the token",
        colour=LINE,
        least_top=0.1,
    ),
)


def pick_samples(rollouts: Sequence[Record], run_dir: Path) -> list[Record]:
    """Choose a few early and late, right and wrong rollouts, by step and right ones first.

    Preferred are those with token signals, those with a stored clip, and held-out ones, in this order.
    """
    steps = [int(rollout["step"]) for rollout in rollouts]
    if not steps:
        return []
    margin = EDGE_OF_RUN * (max(steps) - min(steps))
    chosen: list[Record] = []
    for early in (True, False):
        for right in (True, False):
            pool = [
                rollout
                for rollout in rollouts
                if is_right(rollout) == right
                and rollout not in chosen
                and (rollout["step"] <= min(steps) + margin if early else rollout["step"] > max(steps) - margin)
            ]
            sign = 1 if early else -1
            pool.sort(
                key=lambda rollout: (
                    not _has_signals(rollout),
                    not has_clips(run_dir, str(rollout.get("id", ""))),
                    rollout.get("split") == "train",
                    sign * rollout["step"],
                )
            )
            chosen += pool[:PER_GROUP]
    return sorted(chosen, key=lambda rollout: (rollout["step"], not is_right(rollout)))


def is_right(rollout: Record) -> bool:
    """Whether the rollout's answer earned the accuracy reward."""
    accuracy = (rollout.get("reward") or {}).get("accuracy")
    return is_number(accuracy) and accuracy > 0


@dataclass(frozen=True, kw_only=True)
class ShownView:
    """A view with its scale on this page."""

    letter: str
    label: str
    meaning: str
    top: str
    """Upper end of the scale."""
    levels: tuple["Level", ...]


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token or a piece of plain text, as shown."""

    text: str
    classes: str = ""
    facts: str = ""
    """Its values, for the hover text."""
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """A completion as shown; all plain text."""

    right: bool
    head: str
    question: str
    choices: tuple[str, ...]
    answer: str
    tokens: tuple[Token, ...]
    rewards: str
    clips: tuple[str, ...]
    """Data URIs of the clips; empty if they were not stored."""


@dataclass(frozen=True, kw_only=True)
class ShownSamples:
    """What templates/samples.html shows; switching between views needs no script."""

    views: tuple[ShownView, ...]
    items: tuple[ShownSample, ...]


def samples_view(samples: Sequence[Record], run_dir: Path) -> ShownSamples:
    """Prepare the samples for the template, with the run's stored clips."""
    tops = {view.field: _top(samples, view) for view in VIEWS}
    views = [view for view in VIEWS if any(_signal(sample, view.field) for sample in samples)]
    return ShownSamples(
        views=tuple(
            ShownView(
                letter=view.letter,
                label=view.label,
                meaning=view.meaning,
                top=f"{tops[view.field]:.2g}",
                levels=level_colours(view),
            )
            for view in views
        ),
        items=tuple(_sample(sample, tops, run_dir) for sample in samples),
    )


@dataclass(frozen=True, kw_only=True)
class Paint:
    """Colours of a background and of text on it."""

    background: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Level:
    """One step of a colour scale, in both schemes."""

    light: Paint
    dark: Paint


def level_colours(view: View) -> tuple[Level, ...]:
    """The steps of the scale from the least value to the largest.

    Each is between the card's colour and the view's; its text is black or white, whichever has more contrast, so the
    contrast is at least 4.5 on any background.
    """
    shares = np.linspace(LEAST_COLOUR, 1, LEVELS).tolist()
    return tuple(
        Level(light=_paint(CARD.light, view.colour.light, share), dark=_paint(CARD.dark, view.colour.dark, share))
        for share in shares
    )


def _paint(paper: str, colour: str, share: float) -> Paint:
    background = mixed(paper, colour, share)
    black = contrast(background, "#000000") >= contrast(background, "#ffffff")
    return Paint(background=background, text="#000000" if black else "#ffffff")


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two `#rrggbb` colours, 1..21 (WCAG 2)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    ambient = 0.05  # the standard's term for light reflected by the screen
    return (high + ambient) / (low + ambient)


def readable_token(token: str) -> str:
    """A token as text: the vocabulary's marks become spaces, line breaks and control characters become visible."""
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", token.translate(BYTE_LEVEL))
    return text.replace("\n", "↵\n") if text else "∅"


def _luminance(colour: str) -> float:
    # WCAG 2's relative luminance: sRGB to linear light, then weighted.
    shares = [channel / 255 for channel in channels(colour)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in shares]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def _signal(sample: Record, field: str) -> list[Any]:
    """The sample's values of `field`, one per token; empty if there are none or their number is not that of tokens."""
    tokens, values = sample.get("tokens"), sample.get(field)
    fits = isinstance(tokens, list) and isinstance(values, list) and len(tokens) == len(values)
    return list(values) if fits and values and any(is_number(value) for value in values) else []


def _has_signals(sample: Record) -> bool:
    return any(_signal(sample, view.field) for view in VIEWS)


def _top(samples: Sequence[Record], view: View) -> float:
    found = [abs(value) for sample in samples for value in _signal(sample, view.field) if is_number(value)]
    return max([view.least_top, *found])


def _sample(sample: Record, tops: dict[str, float], run_dir: Path) -> ShownSample:
    facts = (f"step {sample['step']}", str(sample.get("split", "")), str(sample.get("task", "")))
    return ShownSample(
        right=is_right(sample),
        head=" · ".join(fact for fact in facts if fact),
        question=str(sample.get("question", "")),
        choices=tuple(str(choice) for choice in sample.get("choices") or ()),
        answer=str(sample.get("answer", "")),
        tokens=_tokens(sample, tops),
        rewards=_rewards(sample),
        clips=kept_clips(run_dir, str(sample.get("id", ""))),
    )


def _tokens(sample: Record, tops: dict[str, float]) -> tuple[Token, ...]:
    tokens = sample.get("tokens")
    if not isinstance(tokens, list) or not _has_signals(sample):
        parts = _TAG.split(str(sample.get("text", "")))
        return tuple(
            Token(text=part, classes="special") if _SPECIAL.fullmatch(part) else Token(text=part, plain=True)
            for part in parts
            if part
        )
    signals = {view.field: _signal(sample, view.field) for view in VIEWS}
    return tuple(_token(str(token), index, signals, tops) for index, token in enumerate(tokens))


def _token(token: str, index: int, signals: dict[str, list[Any]], tops: dict[str, float]) -> Token:
    classes, facts = [], []
    for view in VIEWS:
        value = signals[view.field][index] if signals[view.field] else None
        if not is_number(value):
            continue
        level = min(LEVELS - 1, int(LEVELS * abs(value) / tops[view.field]))
        classes.append(f"{view.letter}{level}")
        facts.append(f"{view.label.strip('|')} {value:.2f}")
    text = readable_token(token)
    if _SPECIAL.fullmatch(text.strip()):
        classes.append("special")
    return Token(text=text, classes=" ".join(classes), facts=", ".join(facts))


def _rewards(sample: Record) -> str:
    reward = sample.get("reward") or {}
    parts = [f"{name} {value:g}" for name, value in reward.items() if name != "total" and is_number(value)]
    text = f"reward {reward['total']:g}" if is_number(reward.get("total")) else "no reward recorded"
    text += f" ({', '.join(parts)})" if parts else ""
    advantage = sample.get("advantage")
    return text + (f" · advantage {advantage:+.2f}" if is_number(advantage) else "")
