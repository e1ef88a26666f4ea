"""Folders of Hugging Face `datasets`: Parquet files, `save_to_disk`, or audio files with metadata.jsonl or .csv."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nemo_mapo.data.importers.base import Drop, Importer, Question, Row, Source, each, split_of_name
from nemo_mapo.data.importers.multiple_choice import question_of
from nemo_mapo.data.importers.records import csv_rows, json_rows

_BATCH_ROWS = 16
"""Rows read at once from Parquet: they contain the audio."""


def read(source: Source) -> Iterator[Question | Drop]:
    """Questions of every table below the directory; nothing is downloaded and no cache is written.

    Fields are named as in `multiple_choice`; the name of the file, or of the directory it is in, may spell the split.
    """
    found = False
    for path, rows in _tables(source.directory()):
        found = True
        split = split_of_name(path.stem) or split_of_name(path.parent.name)
        yield from each(rows, partial(question_of, source=source, manifest=path, split=split))
    if not found:
        raise ValueError(f"{source.path}: no *.parquet, no state.json of save_to_disk, no metadata.jsonl or .csv below")


def _tables(directory: Path) -> Iterator[tuple[Path, Iterator[Row | Drop]]]:
    for path in sorted(directory.rglob("*")):
        if path.suffix == ".parquet":
            yield path, parquet_rows(path)
        elif path.name == "state.json":
            yield path.parent, _saved_rows(path.parent)
        elif path.name == "metadata.jsonl":
            yield path, json_rows(path)
        elif path.name == "metadata.csv":
            yield path, csv_rows(path, "file_name")


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, read in small batches: the audio may be in them."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS)
        yield from _numbered(path, (record for batch in batches for record in batch.to_pylist()))
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file, or a damaged one: {error}") from error


def _saved_rows(path: Path) -> Iterator[Row]:
    from datasets import Audio, load_from_disk

    try:
        table = load_from_disk(str(path))
    except OSError as error:
        raise ValueError(f"{path}: not a whole directory of save_to_disk: {error}") from error
    for name, feature in table.features.items():
        if isinstance(feature, Audio):
            table = table.cast_column(name, Audio(decode=False))
    yield from _numbered(path, iter(table))


def _numbered(path: Path, records: Iterator[dict[str, Any]]) -> Iterator[Row]:
    for number, record in enumerate(records, start=1):
        # In tables every row has all columns; a null means a missing field.
        fields = {name: value for name, value in record.items() if value is not None}
        yield Row(where=f"{path}: row {number}", number=number, fields=fields)


IMPORTER = Importer(
    name="hf_folder",
    layout="*.parquet, a save_to_disk directory, or <split>/metadata.jsonl with file_name; columns as multiple_choice",
    read=read,
)
