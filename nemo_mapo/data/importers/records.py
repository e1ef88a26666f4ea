"""Lines of JSON, JSON-lines and CSV files, each with its location; and audio files looked up by name."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nemo_mapo.data.importers.base import Drop, InvalidRecord, Row

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"})

_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs"}


def json_rows(path: Path) -> Iterator[Row | Drop]:
    """Records of a JSON array (read as a whole) or of a file with one JSON object per line.

    A line that is not JSON is a drop; ValueError for a file that is neither.
    """
    with _text(path) as file:
        is_array = file.read(1024).lstrip().startswith("[")
    if not is_array:
        yield from _json_lines(path)
        return
    try:
        with _text(path) as file:
            records = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    for number, record in enumerate(records, start=1):
        yield _row(path, f"{path}: item {number}", number, record)


def csv_rows(path: Path, *fields: str) -> Iterator[Row]:
    """Lines of a CSV file with a header.

    Raises:
        ValueError: one of `fields` is missing, something other than commas separates the columns, or a line has more
            cells than the header.
    """
    with _text(path) as file:
        lines = csv.DictReader(file)
        header = "".join(lines.fieldnames or ())
        for other, name in _OTHER_SEPARATORS.items():
            if len(lines.fieldnames or ()) == 1 and other in header:
                raise ValueError(f"{path}: its columns are separated by {name}: save it with commas")
        missing = [field for field in fields if field not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; there are {', '.join(lines.fieldnames or ())}")
        for number, record in enumerate(lines, start=1):
            if None in record:
                raise ValueError(
                    f"{path}:{lines.line_num}: more cells than the header has columns: put a text that contains commas "
                    "into double quotes"
                )
            yield Row(where=f"{path}:{lines.line_num}", number=number, fields=record)


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Read a file as UTF-8 with or without a byte order mark; ValueError names the file that is not."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _json_lines(path: Path) -> Iterator[Row | Drop]:
    with _text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield _row(path, where, number, json.loads(line))
            except json.JSONDecodeError as error:
                message = f"{where}: not a JSON line (cut in half?): {error}: restore the line or delete it"
                yield Drop(reason="not JSON", message=message, is_invalid=True)


def _row(path: Path, where: str, number: int, record: Any) -> Row | Drop:
    if not isinstance(record, dict):
        message = f"{where}: not a JSON object but {record!r}: delete it"
        return Drop(reason="not a JSON object", message=message, is_invalid=True)
    return Row(where=where, number=number, fields=record)


class AudioIndex:
    """The audio files anywhere below a directory, by their names without suffix."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ValueError(f"no audio directory {directory}: say where the audio is with --audio-dir")
        self.directory = directory
        self._paths: dict[str, list[Path]] = defaultdict(list)
        for path in directory.rglob("*"):
            if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("._"):
                self._paths[path.stem].append(path)

    def find(self, where: str, *stems: str) -> Path:
        """The file with the first existing stem of `stems`; InvalidRecord if there is none, or several."""
        stem = next((stem for stem in stems if stem in self._paths), None)
        if stem is None:
            raise InvalidRecord(
                "audio file missing",
                f"{where}: no audio file named {' or '.join(stems)} below {self.directory}: add it or delete the line",
            )
        paths = self._paths[stem]
        if len(paths) > 1:
            names = ", ".join(str(path) for path in sorted(paths))
            raise InvalidRecord("audio file ambiguous", f"{where}: {stem} may be any of {names}: keep one of them")
        return paths[0]
