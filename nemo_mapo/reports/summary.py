"""The five lines that a finished run prints in the terminal."""

from pathlib import Path

from nemo_mapo.reports.loading import load_run
from nemo_mapo.reports.outcome import Change, Outcome, outcome
from nemo_mapo.reports.theme import MISSING
from nemo_mapo.statistics import Interval

NOT_MEASURED = "not measured"

SECONDS_PER_MINUTE = 60

SPLIT_NAMES = {"test": "test split", "validation": "held-out validation split", "training": "training rollouts"}


def summary_lines(run_dir: Path) -> list[str]:
    """Return exactly five lines: accuracy, silent accuracy, late audio mass, length, time.

    Raises:
        RunFileError: as `load_run`.
    """
    found = outcome(load_run(run_dir))
    return [
        f"{name:<14}{text}"
        for name, text in (
            ("accuracy", _accuracy(found)),
            ("silent audio", _silent(found)),
            ("late mass", _late_mass(found.audio_mass_late)),
            ("length", _length(found)),
            ("time", _time(found)),
        )
    ]


def percent(share: float | None) -> str:
    """A share 0..1 as a percentage with one decimal; a dash for None."""
    return MISSING if share is None else f"{share:.1%}".replace("%", " %")


def points(found: Interval) -> str:
    """A difference of shares with its interval, in points."""
    return f"{100 * found.mean:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def percent_interval(found: Interval | None) -> str:
    """The interval of a share in percent; empty for None."""
    return "" if found is None else f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"


def number(value: float | None, digits: int = 0) -> str:
    """A number with `digits` decimals; a dash for None."""
    return MISSING if value is None else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """Seconds as minutes and seconds; a dash for None."""
    if seconds is None:
        return MISSING
    minutes, rest = divmod(round(seconds), SECONDS_PER_MINUTE)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _accuracy(found: Outcome) -> str:
    change = found.accuracy
    if not change.source:
        return NOT_MEASURED
    gain = "" if found.gain is None else f"; {points(found.gain)}"
    return (
        f"{percent(change.start)} → {percent(change.end)} on the {SPLIT_NAMES[change.source]} "
        f"(chance {percent(found.chance)}{gain})"
    )


def _silent(found: Outcome) -> str:
    change = found.accuracy_silent
    if not change.source:
        return NOT_MEASURED
    value = change.end if change.end is not None else change.start
    return f"{percent(value)} with the audio replaced by silence (chance {percent(found.chance)})"


def _late_mass(change: Change) -> str:
    if not change.source:
        return NOT_MEASURED
    return (
        f"{number(change.start, 2)} → {number(change.end, 2)} of attention on the audio in the last third "
        f"({SPLIT_NAMES[change.source]})"
    )


def _length(found: Outcome) -> str:
    tokens, words = found.completion_tokens, found.reasoning_words
    if not tokens.source and not words.source:
        return NOT_MEASURED
    return (
        f"{number(tokens.start)} → {number(tokens.end)} tokens per completion, "
        f"{number(words.start)} → {number(words.end)} words of reasoning"
    )


def _time(found: Outcome) -> str:
    if found.seconds_total is None:
        return NOT_MEASURED
    memory = "" if found.peak_rss_gb is None else f", peak memory {found.peak_rss_gb:.1f} GB"
    return f"{duration(found.seconds_total)}{memory}"
