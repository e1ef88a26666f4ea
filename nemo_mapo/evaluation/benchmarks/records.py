"""Records of a JSON, JSON-lines or Parquet file, each with its location for error messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def named_records(path: Path, id_key: str) -> Iterator[tuple[str, Record]]:
    """Yield `file: item 3 (id 'x')` and content of every record.

    Raises:
        ValueError: no such file, unknown type, not JSON, a record that is not an object, an id that is neither text
            nor integer or was used before.
    """
    places: dict[str, int] = {}
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path}: item {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {record!r}")
        name = record.get(id_key)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise ValueError(f"{where}: field {id_key!r} is {name!r}: it must be a text or an integer")
        if str(name) in places:
            raise ValueError(f"{where}: field {id_key!r} is {name!r}, which item {places[str(name)]} has already")
        places[str(name)] = number
        yield f"{where} (id {str(name)!r})", record


def read_records(path: Path) -> list[Any]:
    """Read all records: a JSON array, one JSON object per line, or a Parquet table without its embedded audio."""
    if not path.is_file():
        raise ValueError(f"no file at {path}: give the path of a .json, .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return _parquet_records(path)
    if path.suffix == ".json":
        return _json_records(path)
    if path.suffix == ".jsonl":
        return list(_json_lines(path))
    raise ValueError(f"{path}: the name must end in .json, .jsonl or .parquet")


def _json_records(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds {type(records).__name__}, not a list of objects")
    return records


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not a JSON line (cut in half?): {error}") from error


def _parquet_records(path: Path) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    # Clips embedded in the table would fill memory; they are read from files.
    columns = [column.name for column in file.schema_arrow if "binary" not in str(column.type)]
    records: list[Any] = file.read(columns=columns).to_pylist()
    return records
