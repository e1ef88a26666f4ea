"""Sample completions with their tokens coloured by relevance weight, inverse weight, audio mass or |delta h|."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np

from nemo_mapo.reports.loading import Record, is_number
from nemo_mapo.reports.theme import NU, OMEGA

LEVELS = 8
"""Steps of a colour scale: as many as the eye tells apart, and each a short class name instead of a colour per
token."""

DARKEST = 0.85
"""Upper end of the colour maps: beyond, neighbouring steps are too dark to tell apart."""

LIGHTEST = 0.04
"""Lower end of the colour maps: almost the page's white, so that the least token does not stand out."""

PER_GROUP = 2
"""Samples shown of each of early/late x right/wrong."""

EDGE_OF_RUN = 1 / 3
"""Samples from the first and last third of the steps count as early and late."""

BYTE_LEVEL = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
"""How byte-level and sentencepiece vocabularies write blanks and line breaks."""

_SPECIAL = re.compile(r"</?[^<>\s]+>")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to colour tokens."""

    field: str
    letter: str
    """Prefix of the level classes in the page."""
    label: str
    meaning: str
    colour_map: str
    least_top: float
    """Least upper end of the scale: without it a flat signal would be stretched to look like a peaked one."""


VIEWS = (
    View(
        field="omega",
        letter="o",
        label=f"relevance weight {OMEGA}",
        meaning="share of policy gradient a token gets; 1 is what GRPO gives every token",
        colour_map="Blues",
        least_top=2.0,
    ),
    View(
        field="nu",
        letter="n",
        label=f"inverse weight {NU}",
        meaning="weight of a token in the attention loss; 0 where the part-of-speech gate is shut",
        colour_map="Purples",
        least_top=2.0,
    ),
    View(
        field="audio_mass",
        letter="m",
        label="audio mass",
        meaning="share of attention on the audio when the token was chosen",
        colour_map="Oranges",
        least_top=0.1,
    ),
    View(
        field="delta_h_nats",
        letter="d",
        label="|Δh|",
        meaning="nats by which the audio changes the certainty about the token",
        colour_map="Greens",
        least_top=0.1,
    ),
)


def pick_samples(rollouts: Sequence[Record]) -> list[Record]:
    """Choose a few early and late, right and wrong rollouts; ones with token signals and held-out ones preferred.

    They come by step, right ones first.
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
                key=lambda rollout: (not _has_signals(rollout), rollout.get("split") == "train", sign * rollout["step"])
            )
            chosen += pool[:PER_GROUP]
    return sorted(chosen, key=lambda rollout: (rollout["step"], not is_right(rollout)))


def is_right(rollout: Record) -> bool:
    """Whether the rollout's answer earned the accuracy reward."""
    accuracy = (rollout.get("reward") or {}).get("accuracy")
    return is_number(accuracy) and accuracy > 0


def samples_html(samples: Sequence[Record]) -> str:
    """Draw the samples with a switch between the views; the switch needs no script."""
    tops = {view.field: _top(samples, view) for view in VIEWS}
    views = [view for view in VIEWS if any(_signal(sample, view.field) for sample in samples)]
    switches = "".join(
        f'<input type="radio" name="view" id="view-{view.letter}"{" checked" if view is views[0] else ""}>'
        for view in views
    )
    tabs = "".join(f'<label for="view-{view.letter}">{view.label}</label>' for view in views)
    legends = "".join(_legend(view, tops[view.field]) for view in views)
    cards = "\n".join(_sample(sample, tops) for sample in samples)
    tab_row = f'<div class="tabs"><span class="note">Colour tokens by</span>{tabs}</div>' if views else ""
    return f'<div class="samples">{switches}{tab_row}{legends}<div class="list">\n{cards}\n</div></div>'


def samples_style() -> str:
    """The style rules of the samples, colour scales included."""
    return SAMPLE_STYLE + "".join(_view_style(view) for view in VIEWS)


def level_colours(view: View) -> list[tuple[str, str]]:
    """(background, text) of each level, light to dark; the text colour is the one of black and white that reads better.

    One of the two always has a contrast of at least 4.5, whatever the background.
    """
    samples = matplotlib.colormaps[view.colour_map](np.linspace(LIGHTEST, DARKEST, LEVELS))
    colours: list[tuple[str, str]] = []
    for red, green, blue, _ in samples:
        background = "#" + "".join(f"{round(255 * float(channel)):02x}" for channel in (red, green, blue))
        on_black, on_white = contrast(background, "#000000"), contrast(background, "#ffffff")
        colours.append((background, "#000000" if on_black >= on_white else "#ffffff"))
    return colours


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two `#rrggbb` colours, 1..21 (WCAG 2)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    ambient = 0.05  # light reflected by the screen, in the standard's formula
    return (high + ambient) / (low + ambient)


def readable_token(token: str) -> str:
    """A token as text: vocabulary blanks become blanks, line breaks and control characters become visible."""
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", token.translate(BYTE_LEVEL))
    return text.replace("\n", "↵\n") if text else "∅"


def _luminance(colour: str) -> float:
    # sRGB to linear light and its weights, as WCAG 2 defines relative luminance.
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def _signal(sample: Record, field: str) -> list[Any]:
    """The sample's values of `field`, one a token; empty where there are none or they do not fit its tokens."""
    tokens, values = sample.get("tokens"), sample.get(field)
    fits = isinstance(tokens, list) and isinstance(values, list) and len(tokens) == len(values)
    return list(values) if fits and values and any(is_number(value) for value in values) else []


def _has_signals(sample: Record) -> bool:
    return any(_signal(sample, view.field) for view in VIEWS)


def _top(samples: Sequence[Record], view: View) -> float:
    found = [abs(value) for sample in samples for value in _signal(sample, view.field) if is_number(value)]
    return max([view.least_top, *found])


def _sample(sample: Record, tops: dict[str, float]) -> str:
    right = is_right(sample)
    verdict = '<b class="right">right</b>' if right else '<b class="wrong">wrong</b>'
    facts = [f"step {sample['step']}", str(sample.get("split", "")), str(sample.get("task", ""))]
    head = " · ".join(escape(fact) for fact in facts if fact)
    answer = sample.get("answer")
    choices = " / ".join(
        f"<u>{escape(str(choice))}</u>" if choice == answer else escape(str(choice))
        for choice in sample.get("choices") or ()
    )
    return (
        f'<article class="sample"><header>{verdict} {head}</header>'
        f'<p class="question">{escape(str(sample.get("question", "")))}<br><span class="note">{choices}</span></p>'
        f'<div class="text" tabindex="0">{_text(sample, tops)}</div>'
        f'<p class="note">{_rewards(sample)}</p></article>'
    )


def _text(sample: Record, tops: dict[str, float]) -> str:
    tokens = sample.get("tokens")
    if not isinstance(tokens, list) or not _has_signals(sample):
        plain = escape(str(sample.get("text", "")))
        return re.sub(r"&lt;/?[^&\s]+?&gt;", lambda found: f'<span class="special">{found[0]}</span>', plain)
    signals = {view.field: _signal(sample, view.field) for view in VIEWS}
    return "".join(_token(str(token), index, signals, tops) for index, token in enumerate(tokens))


def _token(token: str, index: int, signals: dict[str, list[Any]], tops: dict[str, float]) -> str:
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
    return f'<i class="{" ".join(classes)}" title="{escape(", ".join(facts))}">{escape(text)}</i>'


def _rewards(sample: Record) -> str:
    reward = sample.get("reward") or {}
    parts = [f"{name} {value:g}" for name, value in reward.items() if name != "total" and is_number(value)]
    text = f"reward {reward['total']:g}" if is_number(reward.get("total")) else "no reward recorded"
    text += f" ({', '.join(parts)})" if parts else ""
    advantage = sample.get("advantage")
    return escape(text + (f" · advantage {advantage:+.2f}" if is_number(advantage) else ""))


def _legend(view: View, top: float) -> str:
    swatches = "".join(f'<i style="background:{background}"></i>' for background, _ in level_colours(view))
    return (
        f'<div class="legend legend-{view.letter}"><span>0</span><span class="swatches">{swatches}</span>'
        f"<span>{top:.2g}</span><span>{escape(view.meaning)}</span></div>"
    )


def _view_style(view: View) -> str:
    on = f"#view-{view.letter}:checked~"
    rules = "".join(
        f"{on}.list .{view.letter}{level}{{background:{background};color:{text}}}"
        for level, (background, text) in enumerate(level_colours(view))
    )
    tab = f"label[for=view-{view.letter}]"
    return (
        f"{rules}{on}.legend-{view.letter}{{display:flex}}"
        f"{on}.tabs {tab}{{background:var(--accent);border-color:var(--accent);color:#fff}}"
        f"#view-{view.letter}:focus-visible~.tabs {tab}{{outline:2px solid var(--ink);outline-offset:2px}}"
    )


SAMPLE_STYLE = """
.samples{position:relative}
.samples>input{position:absolute;opacity:0;width:1px;height:1px}
.tabs{display:flex;flex-wrap:wrap;gap:6px;align-items:center;margin-bottom:8px}
.tabs label{border:1px solid var(--line);background:var(--card);border-radius:99px;padding:3px 12px;cursor:pointer;
font-size:.88rem}
.legend{display:none;flex-wrap:wrap;gap:2px 8px;align-items:center;font-size:.84rem;color:var(--muted);
margin-bottom:12px}
.swatches{display:inline-flex;border:1px solid var(--line);border-radius:3px;overflow:hidden}
.swatches i{width:18px;height:12px}
.list{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.sample{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.sample header{font-size:.84rem;color:var(--muted)}
.sample header b{border-radius:4px;padding:1px 7px;color:#fff;font-weight:600;margin-right:4px}
.right{background:#0b6e4f}.wrong{background:#a63d14}
.question{margin:8px 0}.question u{text-decoration-thickness:2px;text-underline-offset:3px;color:var(--ink)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:26rem;overflow:auto;line-height:1.75;font-size:.95rem}
.text i{font-style:normal;padding:2px 0;border-radius:2px}
.text .special{border:1px dashed #8a8f98;border-radius:4px;padding:1px 3px;margin:0 1px;
font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.84em}
@media(max-width:760px){.list{grid-template-columns:minmax(0,1fr)}}
"""
