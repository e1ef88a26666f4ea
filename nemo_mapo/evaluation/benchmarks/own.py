"""Your own multiple-choice questions as a benchmark: the manifests and files that prepare_data.py reads and writes."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_mapo.data.entries import further_clips
from nemo_mapo.data.importers.base import Drop, Question, Row, Source
from nemo_mapo.data.importers.hf_folder import parquet_rows
from nemo_mapo.data.importers.multiple_choice import question_of
from nemo_mapo.data.importers.records import csv_rows, json_rows
from nemo_mapo.evaluation.benchmarks.items import Benchmark, Item, Layout

LAYOUT = Layout(
    name="multiple_choice",
    title="Multiple choice",
    fields={},
    groups=("task",),
    tables=(("task",),),
    sizes={},
)
_FIELDS = frozenset({"id", "audio", "question", "choices", "answer", "task"})


def load_own_benchmark(path: Path, fields: Mapping[str, str | None], *, audio_root: Path | None) -> Benchmark:
    """Read questions from .jsonl, .json (also NeMo manifests), .csv, .parquet or Lhotse cuts (.jsonl, .jsonl.gz).

    Fields have the names that `prepare_data.py multiple_choice` knows. `fields` maps other names; a name that is not
    ours adds a field to tabulate by: {"answer": "label", "accent": "accent_of_speaker"}. Every line counts.

    Raises:
        ValueError: naming file, line and field: no such file, an empty file, a line that is not a question with an
            answer among its choices, an id used twice.
    """
    if not path.is_file():
        raise ValueError(f"benchmark.items_path={path}: no such file")
    groups = tuple(name for name in fields if name not in _FIELDS)
    source = Source(path=path, audio_dir=audio_root)
    items: dict[str, Item] = {}
    places: dict[str, str] = {}
    for row in _rows(path):
        if isinstance(row, Drop):
            raise ValueError(row.message)
        item = _item(_renamed(row, fields), source, path, groups)
        if item.id in items:
            raise ValueError(f"{row.where}: id {item.id!r} is that of {places[item.id]} already: make ids unique")
        items[item.id], places[item.id] = item, row.where
    if not items:
        raise ValueError(f"{path}: holds no question")
    kinds = [name for name in (*LAYOUT.groups, *groups) if fields.get(name, name) is not None]
    layout = replace(LAYOUT, groups=tuple(kinds), tables=tuple((name,) for name in kinds))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Benchmark(layout=layout, path=path, digest=digest, items=tuple(items.values()))


def _rows(path: Path) -> Iterator[Row | Drop]:
    if path.name.endswith(".jsonl.gz"):
        yield from map(_flat, _gzip_rows(path))
    elif path.suffix in (".jsonl", ".json"):
        yield from map(_flat, json_rows(path))
    elif path.suffix == ".csv":
        yield from csv_rows(path)
    elif path.suffix == ".parquet":
        yield from parquet_rows(path)
    else:
        raise ValueError(
            f"benchmark.items_path={path}: the name must end in .jsonl, .jsonl.gz, .json, .csv or .parquet"
        )


def _gzip_rows(path: Path) -> Iterator[Row]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield Row(where=f"{path}:{number}", number=number, fields=json.loads(line))
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not gzip-compressed JSON lines, or damaged ones: {error}") from error


def _flat(row: Row | Drop) -> Row | Drop:
    """A Lhotse cut as a flat record; other rows unchanged."""
    if isinstance(row, Drop) or "recording" not in row.fields:
        return row
    cut, custom = row.fields, row.fields.get("custom") or {}
    clips = [cut["recording"], *(custom[name] for name in further_clips(custom, row.where))]
    if cut.get("type") != "MonoCut":
        raise row.wrong("type", "give cuts of one channel")
    paths = []
    for clip in clips:
        sources = clip.get("sources") or []
        if len(sources) != 1 or sources[0].get("type") != "file":
            raise row.wrong("recording", "its audio must be one file")
        paths.append(sources[0]["source"])
    fields = {
        **custom,
        "id": cut["id"],
        "audio": paths,
        "offset": cut["start"],
        "duration": cut["duration"],
    }
    return replace(row, fields=fields)


def _renamed(row: Row, fields: Mapping[str, str | None]) -> Row:
    given = {name: key for name, key in fields.items() if key is not None}
    missing = [key for key in given.values() if key not in row.fields]
    if missing:
        raise ValueError(f"{row.where}: no field {missing[0]!r}, which benchmark.fields names")
    return replace(row, fields={**row.fields, **{name: row.fields[key] for name, key in given.items()}})


def _item(row: Row, source: Source, manifest: Path, groups: tuple[str, ...]) -> Item:
    question: Question = question_of(row, source=source, manifest=manifest, split=None)
    clips = [str(clip.absolute()) for clip in (question.audio, *question.further_audio) if isinstance(clip, Path)]
    if len(clips) <= len(question.further_audio):
        raise ValueError(f"{row.where}: its audio is inside the file: prepare it with examples/prepare_data.py first")
    if len(set(question.choices)) < max(2, len(question.choices)):
        raise ValueError(f"{row.where}: choices are {list(question.choices)}: give two or more that differ")
    return Item(
        id=question.id,
        part="closed",
        question=question.question,
        audio=tuple(clips),
        slots=question.choices,
        answer=question.answer,
        groups={"task": (question.task,), **{name: (_text(row.fields.get(name)),) for name in groups}},
        start_seconds=row.seconds("offset") if row.fields.get("offset") else 0.0,
        duration_seconds=row.seconds("duration") if row.fields.get("duration") else None,
    )


def _text(value: Any) -> str:
    return "(none)" if value is None or value == "" else str(value)
