"""The types of the importers: the source of a corpus, and the questions and drops that it yields."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The location of a corpus on this machine."""

    path: Path
    """The corpus's directory, or one file of it."""
    audio_dir: Path | None = None
    """Directory of the audio, if it is not where the corpus has it."""
    seed: int = 0
    """Seed for drawing distractors for corpora without choices, and for splits."""
    group_by: str | None = None
    """Field of the lines whose value keeps its questions in one split."""

    def files(self, *suffixes: str) -> list[Path]:
        """`path` itself if it is a file, else the files with one of `suffixes` directly in it, by name."""
        if self.path.is_file():
            return [self.path]
        if not self.path.exists():
            raise ValueError(f"no file or directory {self.path}: give the corpus, or one file of it")
        found = sorted(path for path in self.directory().iterdir() if path.suffix in suffixes)
        if not found:
            raise ValueError(
                f"{self.path}: no file {' or '.join(f'*{suffix}' for suffix in suffixes)} in this directory"
            )
        return found

    def directory(self) -> Path:
        """`path`, which must be a directory."""
        if not self.path.is_dir():
            raise ValueError(f"no directory {self.path}: give the one that the corpus was unpacked into")
        return self.path

    def file(self, name: str) -> Path:
        """A file that the corpus must have."""
        path = self.directory() / name
        if not path.is_file():
            raise ValueError(f"no file {path}: it is part of the corpus")
        return path

    def label(self, manifest: Path) -> str:
        """A name for `manifest` that no other file of the corpus has, to number its lines with."""
        inside = manifest.relative_to(self.path) if manifest != self.path else Path(manifest.name)
        return "-".join(inside.with_suffix("").parts) or manifest.stem

    def audio_path(self, name: str, manifest: Path) -> Path:
        """A path in `manifest`: absolute, or relative to the audio directory, or else to the manifest's directory."""
        return (self.audio_dir or manifest.parent) / name


@dataclass(frozen=True, kw_only=True)
class Question:
    """One multiple-choice question about a segment of audio, or several clips, before any check."""

    where: str
    """Place in the corpus, `file:line` if there are lines; error messages begin with it."""
    id: str
    audio: Path | bytes
    """An audio file, or the content of one."""
    start_seconds: float = 0.0
    duration_seconds: float | None = None
    """None means to the end of the file."""
    further_audio: tuple[Path | bytes, ...] = ()
    """Clips after the first, in order, each a whole file."""
    question: str
    choices: tuple[str, ...]
    answer: str
    task: str
    split: str | None
    """The corpus's own split; None leaves it to the seed."""
    reasoning: str | None = None
    caption: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Its origin (speaker, source), which should not be in two splits."""


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A line of the corpus that yields no question."""

    reason: str
    """A few words, the same for every line of this kind; drops are counted by it."""
    message: str
    is_invalid: bool
    """Whether the line is invalid (an error, unless such lines are skipped) or valid but not usable here."""


class InvalidRecord(ValueError):
    """A line of a corpus that cannot be used as it is; names file, line, field and value."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.drop = Drop(reason=reason, message=message, is_invalid=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a corpus."""

    where: str
    number: int
    """Of the record in its file, from 1."""
    fields: Mapping[str, Any]

    def text(self, field: str) -> str:
        """A field that must be a non-empty text."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, "give a non-empty text")
        return value.strip()

    def optional_text(self, field: str) -> str | None:
        """A field that is a text, or missing, empty or null."""
        return self.text(field) if self.fields.get(field) not in (None, "") else None

    def seconds(self, field: str) -> float:
        """A field that must be a time, or spell one."""
        value = self.fields.get(field)
        try:
            seconds = float(value) if isinstance(value, str | int | float) else math.nan
        except ValueError as error:
            raise self.wrong(field, "give seconds") from error
        if not math.isfinite(seconds) or seconds < 0:
            raise self.wrong(field, "give seconds")
        return seconds

    def wrong(self, field: str, wanted: str, reason: str = "") -> InvalidRecord:
        """The error for an invalid `field`, to be raised."""
        value = repr(self.fields[field]) if field in self.fields else f"missing (there are {', '.join(self.fields)})"
        return InvalidRecord(
            reason or f"field {field!r} unusable", f"{self.where}: field {field!r} is {value}: {wanted}"
        )


@dataclass(frozen=True, kw_only=True)
class Importer:
    """A corpus that `examples/prepare_data.py` knows."""

    name: str
    layout: str
    """The expected files in the directory, in one line."""
    read: Callable[[Source], Iterator[Question | Drop]]


def each(rows: Iterable[Row | Drop], build: Callable[[Row], Made | Drop]) -> Iterator[Made | Drop]:
    """The result of `build` for each row; a row that it refuses becomes a drop."""
    for row in rows:
        if isinstance(row, Drop):
            yield row
            continue
        try:
            yield build(row)
        except InvalidRecord as error:
            yield error.drop


def usable(rows: Iterable[Row | Drop], build: Callable[[Row], Made | Drop]) -> list[Made]:
    """The results of `build` for the rows that it does not refuse: the pool from which questions draw."""
    return [made for made in each(rows, build) if not isinstance(made, Drop)]


def split_of_name(name: str) -> str | None:
    """The split that a file or directory name spells (`val_qa`, `dev-clean`, `Test`), if any."""
    words = {
        "train": "train",
        "training": "train",
        "val": "validation",
        "valid": "validation",
        "validation": "validation",
        "dev": "validation",
        "test": "test",
        "eval": "test",
    }
    plain = name.lower().replace("-", "_").replace(".", "_")
    found = {words[word] for word in plain.split("_") if word in words}
    return found.pop() if len(found) == 1 else None
