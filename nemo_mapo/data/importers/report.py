"""Content and drops of a prepared corpus: the record for `prepare_report.json` and the printed table."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from nemo_mapo.data.importers.grouping import Leak
from nemo_mapo.data.splits import SPLITS

BIN_EDGES_SECONDS = (0, 1, 2, 5, 10, 20, 30, 60, 120)
"""Of the duration histogram; the last bin is open."""

MOST_ANSWERS = 20
"""The report counts this many of the most frequent answers of a split."""

EXAMPLES = 5
"""Messages kept per reason for dropping, and audio files listed that are in several splits."""


@dataclass(kw_only=True)
class SplitStatistics:
    """One split."""

    durations_seconds: list[float] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    """How often each is the right one."""
    answer_places: Counter[int] = field(default_factory=Counter)
    """How often the right choice is first, second...: uneven counts mean that position gives the answer away."""
    stretches: dict[tuple[str, float], float] = field(default_factory=dict)
    """Seconds of every distinct segment of audio, by file and start."""

    def add(self, *, digest: str, start: float, duration: float, task: str, answer: str, place: int) -> None:
        """Count one question."""
        self.answers[answer] += 1
        self.durations_seconds.append(duration)
        self.tasks[task] += 1
        self.answer_places[place] += 1
        self.stretches[digest, start] = max(duration, self.stretches.get((digest, start), 0.0))

    def histogram(self) -> list[int]:
        """Questions by duration, in the bins of `BIN_EDGES_SECONDS`."""
        counts, _ = np.histogram(self.durations_seconds, bins=[*BIN_EDGES_SECONDS, np.inf])
        return [int(count) for count in counts]

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "questions": len(self.durations_seconds),
            "audio_files": len({digest for digest, _ in self.stretches}),
            "audio_hours": round(sum(self.stretches.values()) / 3600, 6),
            "tasks": dict(sorted(self.tasks.items())),
            "answers": dict(self.answers.most_common(MOST_ANSWERS)),
            "answer_places": {str(place): count for place, count in sorted(self.answer_places.items())},
            "duration_histogram": self.histogram(),
        }


class Report:
    """The counts of one preparation."""

    def __init__(self, corpus: str) -> None:
        self.corpus = corpus
        self.splits: dict[str, SplitStatistics] = {}
        self.dropped: Counter[str] = Counter()
        self.messages: dict[str, list[str]] = defaultdict(list)
        self.turned_down: dict[str, float] = {}
        """Peaks above full scale of files that were copied with a gain below 1, by place and file."""
        self.shared_audio: list[dict[str, str]] = []
        """Audio found in several splits: by split, the place of a question about it."""

        self.leaks: list[Leak] = []

    def drop(self, reason: str, message: str) -> None:
        """Count a line that yielded no question."""
        self.dropped[reason] += 1
        if len(self.messages[reason]) < EXAMPLES:
            self.messages[reason].append(message)

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "corpus": self.corpus,
            "splits": {name: split.as_plain() for name, split in self.splits.items()},
            "duration_bin_edges_seconds": list(BIN_EDGES_SECONDS),
            "dropped": {
                reason: {"count": count, "examples": self.messages[reason]}
                for reason, count in self.dropped.most_common()
            },
            "labels_in_several_splits": [asdict(leak) for leak in self.leaks],
            "turned_down": {
                "files": len(self.turned_down),
                "examples": {where: round(peak, 4) for where, peak in self._loudest()[:EXAMPLES]},
            },
            "audio_in_several_splits": {"files": len(self.shared_audio), "examples": self.shared_audio[:EXAMPLES]},
        }

    def _loudest(self) -> list[tuple[str, float]]:
        return sorted(self.turned_down.items(), key=lambda entry: -entry[1])

    def table(self) -> str:
        """For people."""
        names = [name for name in SPLITS if name in self.splits]
        plain = {name: self.splits[name].as_plain() for name in names}
        bins = [f"{low}-{high} s" for low, high in pairwise(BIN_EDGES_SECONDS)] + [f"from {BIN_EDGES_SECONDS[-1]} s"]
        counts = {
            label: [plain[name]["duration_histogram"][place] for name in names] for place, label in enumerate(bins)
        }
        rows = [
            ("", *names),
            ("questions", *(f"{plain[name]['questions']:,}" for name in names)),
            ("audio files", *(f"{plain[name]['audio_files']:,}" for name in names)),
            ("hours of audio", *(f"{plain[name]['audio_hours']:.2f}" for name in names)),
            *((f"  {label}", *(f"{count:,}" for count in row)) for label, row in counts.items() if any(row)),
        ]
        lines = [self.corpus, *_aligned(rows), f"audio in several splits: {len(self.shared_audio)} files"]
        lines += [f"warning: {leak.message()}" for leak in self.leaks]
        if self.turned_down:
            where, peak = self._loudest()[0]
            lines.append(
                f"over full scale, copied with a lower gain: {len(self.turned_down)} files, the loudest {peak:.3g} "
                f"times full scale: {where}"
            )
        lines.append(f"dropped: {self.dropped.total()}")
        lines += [
            f"  {count:,} {reason}, e.g. {self.messages[reason][0]}" for reason, count in self.dropped.most_common()
        ]
        return "\n".join(lines)


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"{first:<16}" + "".join(f"{cell:>12}" for cell in cells) for first, *cells in rows]
