"""NeMo manifests with question, choices and answer beside audio_filepath, offset and duration."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_mapo.data.importers.base import Drop, Importer, Question, Row, Source, each, split_of_name
from nemo_mapo.data.importers.multiple_choice import question_of
from nemo_mapo.data.importers.records import json_rows


def read(source: Source) -> Iterator[Question | Drop]:
    """Questions of a manifest, or of all those in a directory; the file's name may spell the split."""
    for path in source.files(".json", ".jsonl"):
        yield from each(json_rows(path), partial(_question, source=source, manifest=path))


def _question(row: Row, *, source: Source, manifest: Path) -> Question | Drop:
    # NeMo itself skips lines that carry this key.
    if row.fields.get("_skipme"):
        return Drop(reason="marked _skipme", message=f"{row.where}: marked _skipme", is_invalid=False)
    row.text("audio_filepath")
    return replace(
        question_of(row, source=source, manifest=manifest, split=split_of_name(manifest.stem)),
        start_seconds=row.seconds("offset") if row.fields.get("offset") else 0.0,
        duration_seconds=row.seconds("duration"),
    )


IMPORTER = Importer(
    name="nemo", layout="*.json with audio_filepath, duration, [offset], question, choices, answer a line", read=read
)
