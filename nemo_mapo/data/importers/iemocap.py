"""IEMOCAP (Busso et al., 2008): which emotion did the annotators agree on?"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nemo_mapo.data.importers.base import Drop, Importer, InvalidRecord, Question, Row, Source, each
from nemo_mapo.data.importers.choices import DISTRACTORS, draw, randomness, shuffled

_EMOTIONS = {
    "ang": "anger",
    "hap": "happiness",
    "exc": "excitement",
    "sad": "sadness",
    "neu": "neutral",
    "fru": "frustration",
    "fea": "fear",
    "sur": "surprise",
    "dis": "disgust",
}
_CLOSE = ({"happiness", "excitement"}, {"anger", "frustration"})
"""Pairs that annotators often confuse: one is never a wrong choice if the other is right."""

_SPLITS = {1: "train", 2: "train", 3: "train", 4: "validation", 5: "test"}
"""By session: every session has two speakers of its own, so no speaker is in two splits."""

_TURN = re.compile(r"\[(?P<start>[\d.]+) - (?P<end>[\d.]+)\]\s+(?P<turn>\w+)\s+(?P<emotion>\w+)\s+\[[^\]]*\]")


def read(source: Source) -> Iterator[Question | Drop]:
    """One question per turn with an agreed emotion, in `Session<n>/dialog/EmoEvaluation/*.txt`."""
    sessions = [source.directory() / f"Session{number}" for number in _SPLITS]
    if not any(session.is_dir() for session in sessions):
        raise ValueError(f"{source.path}: no Session1 to Session5 in this directory")
    for session, split in zip(sessions, _SPLITS.values(), strict=True):
        for path in sorted((session / "dialog" / "EmoEvaluation").glob("*.txt")):
            if not path.name.startswith("._"):
                yield from each(_rows(path), partial(_question, session=session, split=split, seed=source.seed))


def _rows(path: Path) -> Iterator[Row]:
    # Annotators' comments, which are not read, are not all UTF-8.
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), start=1):
        if line.startswith("["):
            yield Row(where=f"{path}:{number}", number=number, fields={"line": line})


def _question(row: Row, *, session: Path, split: str, seed: int) -> Question | Drop:
    turn = _TURN.match(row.text("line"))
    if turn is None:
        raise row.wrong("line", "expected [START - END] TURN EMOTION [V, A, D]", "line not understood")
    name, label = turn["turn"], turn["emotion"]
    if label in ("xxx", "oth"):
        reason = "no agreed emotion" if label == "xxx" else "emotion 'other'"
        return Drop(reason=reason, message=f"{row.where}: {name} is {label}", is_invalid=False)
    if label not in _EMOTIONS:
        raise InvalidRecord("emotion unknown", f"{row.where}: {name} is {label!r}, none of {', '.join(_EMOTIONS)}")
    answer = _EMOTIONS[label]
    excluded = {answer}.union(*(pair for pair in _CLOSE if answer in pair))
    generator = randomness(seed, name)
    distractors = draw(sorted(_EMOTIONS.values()), DISTRACTORS, generator, lambda emotion: emotion not in excluded)
    return Question(
        where=row.where,
        id=f"iemocap-{name}",
        audio=session / "sentences" / "wav" / name.rsplit("_", 1)[0] / f"{name}.wav",
        question="Which emotion does the speaker express?",
        choices=shuffled(answer, distractors, generator),
        answer=answer,
        task="emotion",
        split=split,
    )


IMPORTER = Importer(
    name="iemocap",
    layout="Session<1-5>/dialog/EmoEvaluation/*.txt and Session<1-5>/sentences/wav/<dialogue>/<turn>.wav",
    read=read,
)
