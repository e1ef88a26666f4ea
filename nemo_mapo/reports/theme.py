"""Colours and symbols shared by the charts of all pages: a colour has one meaning across a page."""

from typing import NamedTuple

OMEGA = "\N{GREEK SMALL LETTER OMEGA}\N{COMBINING TILDE}"
NU = "\N{GREEK SMALL LETTER NU}\N{COMBINING TILDE}"
MISSING = "\N{EN DASH}"


class Colour(NamedTuple):
    """A colour as `#rrggbb`, on a light and on a dark page."""

    light: str
    dark: str


INK = Colour("#1f2933", "#e6e4df")
MUTED = Colour("#5b6470", "#a2a9b3")
GRID = Colour("#e4e2dd", "#363a41")
CARD = Colour("#ffffff", "#1d2024")

LINE = Colour("#334e68", "#b5c4d4")
"""Whatever has no colour of its own: a chart with one metric, totals, the baseline of a comparison."""
AUDIO = Colour("#0072b2", "#4fb0ea")
"""The model hears its clip."""
SILENT = Colour("#8a8f98", "#8d949f")
"""The model hears silence or nothing."""
EARLY = Colour("#e69f00", "#f0b840")
"""First third of a completion."""
LATE = Colour("#d55e00", "#f2854b")
"""Last third of a completion."""
MASS = Colour("#8a5a2b", "#cf9f70")
"""Attention to the audio, over a whole completion."""
LENGTH = Colour("#009e73", "#3cc79c")
"""Tokens and words."""
MASK = Colour("#6a4c93", "#b99ae6")
"""The relevance mask."""
ATTENTION = Colour("#b83280", "#f08cc4")
"""The attention loss, its inverse mask and its gate."""
FORMAT = Colour("#7d8a1c", "#c0cc58")
CONSISTENCY = Colour("#1b7f8c", "#58c1cd")

PHASES = tuple(
    Colour(tint, tint)
    for tint in ("#2f5563", "#4c7f8a", "#79a8a8", "#a9c6bb", "#d8d3ae", "#cbb17e", "#a8885c", "#7c6347")
)
"""Phases of a training step, bottom to top of the stack."""

MOST = Colour("#d55e00", "#f2854b")
LEAST = Colour("#e69f00", "#f0b840")
"""The frames of a clip that got the most and the least attention."""

RUNS = (AUDIO, LENGTH, ATTENTION, MASK, FORMAT, CONSISTENCY)
"""Runs or variants side by side, on pages where colour means the run."""


def tints(colour: Colour, count: int) -> list[Colour]:
    """`count` steps from a faint to the full colour, for ordered items."""
    shares = [1.0 if count == 1 else 0.35 + 0.65 * number / (count - 1) for number in range(count)]
    return [Colour(mixed(CARD.light, colour.light, share), mixed(CARD.dark, colour.dark, share)) for share in shares]


def mixed(low: str, high: str, share: float) -> str:
    """The colour `share` of the way from `low` to `high`."""
    pairs = zip(channels(low), channels(high), strict=True)
    return "#" + "".join(f"{round((1 - share) * one + share * other):02x}" for one, other in pairs)


def channels(colour: str) -> list[int]:
    """Red, green and blue of `#rrggbb`, 0..255."""
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
