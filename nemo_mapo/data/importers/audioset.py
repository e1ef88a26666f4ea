"""AudioSet (Gemmeke et al., 2017): which class can be heard, asked from the published labels."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nemo_mapo.data.importers.base import Drop, Importer, InvalidRecord, Question, Row, Source, each
from nemo_mapo.data.importers.choices import DISTRACTORS, draw, randomness, shuffled
from nemo_mapo.data.importers.records import AudioIndex, csv_rows, json_rows

_SPLITS = {
    "balanced_train_segments.csv": "train",
    "unbalanced_train_segments.csv": "train",
    "eval_segments.csv": "test",
}
_HEADER_LINES = 3


class _Classes:
    """Names of the classes, and their hierarchy."""

    def __init__(self, source: Source) -> None:
        self.names = {
            row.text("mid"): row.text("display_name")
            for row in csv_rows(source.file("class_labels_indices.csv"), "mid", "display_name")
        }
        self.mids = sorted(self.names)
        self._children = {
            row.text("id"): row.fields.get("child_ids", [])
            for row in json_rows(source.file("ontology.json"))
            if isinstance(row, Row)
        }

        self._below: dict[str, frozenset[str]] = {}

    def below(self, mid: str) -> frozenset[str]:
        """The class and all its descendants."""
        if mid not in self._below:
            children = (self.below(child) for child in self._children.get(mid, []))
            self._below[mid] = frozenset({mid}).union(*children)
        return self._below[mid]


def read(source: Source) -> Iterator[Question | Drop]:
    """One question per segment; missing segment lists are skipped, but one must exist."""
    classes = _Classes(source)
    audio = AudioIndex(source.audio_dir or source.path / "audio")
    files = [(source.path / name, split) for name, split in _SPLITS.items() if (source.path / name).is_file()]
    if not files:
        raise ValueError(f"{source.path}: none of {', '.join(_SPLITS)} in this directory")
    for path, split in files:
        yield from each(_rows(path), partial(_question, split=split, source=source, audio=audio, classes=classes))


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, values in enumerate(csv.reader(file, skipinitialspace=True), start=1):
            if number > _HEADER_LINES and values:
                fields = dict(zip(("YTID", "start_seconds", "end_seconds", "positive_labels"), values, strict=False))
                yield Row(where=f"{path}:{number}", number=number, fields=fields)


def _question(row: Row, *, split: str, source: Source, audio: AudioIndex, classes: _Classes) -> Question:
    video, start, end = row.text("YTID"), row.seconds("start_seconds"), row.seconds("end_seconds")
    labels = sorted(row.text("positive_labels").split(","))
    unknown = [label for label in labels if label not in classes.names]
    if unknown:
        raise InvalidRecord("label unknown", f"{row.where}: {unknown} are not in class_labels_indices.csv")
    kinds = {label: classes.below(label) for label in labels}
    specific = [label for label in labels if not any(other in kinds[label] - {label} for other in labels)]
    generator = randomness(source.seed, video)
    answer = generator.choice(specific or labels)
    may_be_true = frozenset().union(*kinds.values())

    def is_false(mid: str) -> bool:
        # Ancestors of a label apply to the clip as well.
        return mid not in may_be_true and classes.below(mid).isdisjoint(labels)

    distractors = draw(classes.mids, DISTRACTORS, generator, is_false)
    choices = shuffled(classes.names[answer], [classes.names[mid] for mid in distractors], generator)
    return Question(
        where=row.where,
        id=f"audioset-{video}",
        audio=audio.find(
            row.where,
            video,
            f"Y{video}",
            f"{video}_{start:.3f}_{end:.3f}",
            f"{video}_{int(start)}_{int(end)}",
            f"{video}_{int(1000 * start)}",
        ),
        question="Which of these can be heard?",
        choices=choices,
        answer=classes.names[answer],
        task="sound_event",
        split=split,
    )


IMPORTER = Importer(
    name="audioset",
    layout="class_labels_indices.csv, ontology.json, {balanced_train,unbalanced_train,eval}_segments.csv; the "
    "segments cut out as audio/<YTID>.<suffix> (or Y<YTID>, <YTID>_<start>_<end>, <YTID>_<start in ms>)",
    read=read,
)
