"""Splits by group: each speaker, source or file in one split only, and the answers in the same shares in each."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_mapo.data.splits import SPLITS

WATCHED_LABELS = ("speaker", "speaker_id", "source")
"""Fields of a corpus whose values should not be in two splits; checked if lines have them."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """The properties of a question that determine its split."""

    group: str
    """All questions of a group share a split."""
    answer: Hashable


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A label with values in more than one split."""

    label: str
    values: int
    shared: int
    """Values in more than one split."""
    questions: Mapping[str, int]
    """By split, how many questions have a value that another split has too."""
    example: str

    def message(self) -> str:
        """A readable line with the remedy."""
        counts = ", ".join(f"{count:,} in {split}" for split, count in self.questions.items())
        return (
            f"{self.shared} of {self.values} values of {self.label!r} ({self.example!r}, ...) are in several splits "
            f"(questions with such a value: {counts}): held-out accuracy is then not accuracy on new ones. "
            f"--group-by {self.label} keeps each in one split; lines that name their split have to be changed"
        )


def assign_splits(members: Sequence[Member], shares: tuple[float, float, float], *, seed: int) -> dict[str, str]:
    """The split of each group: by shares of questions, stratified by answer, at random by group and seed.

    Groups are put in order by their most frequent answer and, within it, at random. One after the other goes to the
    split that is furthest behind its share (Sainte-Lague), so that each stretch of the order, and with it each answer,
    is divided by the shares. A split with a share above 0 gets a group if there are as many groups as such splits.
    """
    answers: defaultdict[str, Counter[Hashable]] = defaultdict(Counter)
    for member in members:
        answers[member.group][member.answer] += 1
    order = sorted(answers, key=lambda group: (str(answers[group].most_common(1)[0][0]), _draw(group, seed)))
    wanted = {split: share for split, share in zip(SPLITS, shares, strict=True) if share > 0}
    filled = dict.fromkeys(wanted, 0)
    found: dict[str, str] = {}
    for group in order:
        size = answers[group].total()
        split = min(wanted, key=lambda name: (filled[name] + size / 2) / wanted[name])
        filled[split] += size
        found[group] = split
    _fill_empty(found, wanted)
    return found


def _fill_empty(found: dict[str, str], wanted: Iterable[str]) -> None:
    """Give each empty split the last group of the split that has most groups."""
    for split in wanted:
        counts = Counter(found.values())
        most, groups = counts.most_common(1)[0] if counts else ("", 0)
        if counts[split] == 0 and groups > 1:
            found[[group for group, home in found.items() if home == most][-1]] = split


def _draw(group: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{group}".encode()).hexdigest()


def leaks(rows: Iterable[tuple[str, Mapping[str, str]]]) -> list[Leak]:
    """Labels with values in several splits, of (split, labels) of each question."""
    splits: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for split, labels in rows:
        for label, value in labels.items():
            splits[label][value][split] += 1
    found = []
    for label, values in splits.items():
        shared = {value: counts for value, counts in values.items() if len(counts) > 1}
        if shared:
            total: Counter[str] = sum(shared.values(), Counter())
            found.append(
                Leak(
                    label=label,
                    values=len(values),
                    shared=len(shared),
                    questions={split: total[split] for split in SPLITS if total[split]},
                    example=next(iter(shared)),
                )
            )
    return found
