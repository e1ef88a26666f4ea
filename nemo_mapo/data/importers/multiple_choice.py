"""Questions in common JSON forms: messages/audios/solution (ms-swift), or question/choices/answer."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nemo_mapo.data.importers.base import Drop, Importer, Question, Row, Source, each, split_of_name
from nemo_mapo.data.importers.choices import answer_choice, split_options
from nemo_mapo.data.importers.grouping import WATCHED_LABELS
from nemo_mapo.data.importers.records import csv_rows, json_rows

_AUDIO = ("audio", "audios", "audio_path", "audio_filepath", "sound", "file_name", "audio_id")
_QUESTION = ("question", "question_text")
_CHOICES = ("choices", "options", "multi_choice")
_ANSWER = ("answer", "solution")
_BETWEEN_CHOICES = "|"
"""In a cell of a CSV file."""


def read(source: Source) -> Iterator[Question | Drop]:
    """Questions of a .jsonl, .json or .csv file, or of all those in a directory."""
    for path in source.files(".jsonl", ".json", ".csv"):
        rows = csv_rows(path) if path.suffix == ".csv" else json_rows(path)
        yield from each(rows, partial(question_of, source=source, manifest=path, split=split_of_name(path.stem)))


def question_of(row: Row, *, source: Source, manifest: Path, split: str | None) -> Question:
    """The question of one record, whose fields may have any of the known names.

    Choices are in their own field or in the prompt (see `split_options`); the answer is a text, a letter or an index
    from 0. `split` is used for records that do not name their own.
    """
    text, choices = split_options(_prompt(row))
    field = next((name for name in _CHOICES if row.fields.get(name)), None)
    if field is not None:
        choices = _choices(row, field)
        text = _prompt(row) if "messages" not in row.fields else text
    elif not choices:
        raise row.wrong("choices", "give a list of texts, or spell the choices in the question", "no choices")
    answer = next((name for name in _ANSWER if name in row.fields), "answer")
    audio, *further = _audio(row, source, manifest)
    own_split = row.optional_text("split")
    if own_split is not None and split_of_name(own_split) is None:
        raise row.wrong("split", "give train, validation or test")
    return Question(
        where=row.where,
        id=str(row.fields.get("id") or f"{source.label(manifest)}-{row.number}"),
        audio=audio,
        further_audio=tuple(further),
        question=text,
        choices=choices,
        answer=answer_choice(row, answer, choices, counts_from_zero=field == "multi_choice"),
        task=row.optional_text("task") or "audio_qa",
        split=split if own_split is None else split_of_name(own_split),
        reasoning=row.optional_text("reasoning"),
        caption=row.optional_text("caption"),
        labels=_labels(row, source.group_by),
    )


def _labels(row: Row, group_by: str | None) -> dict[str, str]:
    names = [*WATCHED_LABELS, *([group_by] if group_by else [])]
    found = {name: row.fields.get(name) for name in names}
    return {name: str(value) for name, value in found.items() if isinstance(value, str | int) and value != ""}


def _prompt(row: Row) -> str:
    if "messages" not in row.fields:
        return row.text(next((name for name in _QUESTION if name in row.fields), _QUESTION[0]))
    messages = row.fields["messages"]
    users = [one for one in messages if one["role"] == "user"] if _are_messages(messages) else []
    if len(users) != 1:
        raise row.wrong("messages", "give a list of {role, content} with one user message", "messages not understood")
    content = users[0]["content"]
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return str(content)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)


def _choices(row: Row, field: str) -> tuple[str, ...]:
    values = row.fields[field]
    values = list(values.values()) if isinstance(values, dict) else values
    if isinstance(values, str):
        values = list(split_options(values)[1]) or [part.strip() for part in values.split(_BETWEEN_CHOICES)]
        values = values if len(values) > 1 else []
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise row.wrong(
            field, "give a list of texts, an object with a text for each letter, or a text that lists them (one | two)"
        )
    labelled = split_options("\n".join(values))[1]
    # "A. dog": the letter is a label, only the text is the choice.
    return labelled if len(labelled) == len(values) else tuple(value.strip() for value in values)


def _audio(row: Row, source: Source, manifest: Path) -> list[Path | bytes]:
    """The clips of a question, in order; at least one."""
    field = next((name for name in _AUDIO if row.fields.get(name)), _AUDIO[0])
    value = row.fields.get(field)
    values = value if isinstance(value, list) and value else [value]
    return [_clip(one, row, field, source, manifest) for one in values]


def _clip(value: Any, row: Row, field: str, source: Source, manifest: Path) -> Path | bytes:
    if isinstance(value, dict):
        # How `datasets` stores audio: the content of the file, or where it is.
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise row.wrong(field, "give the path of an audio file", "no audio named")
    return source.audio_path(value, manifest)


IMPORTER = Importer(
    name="multiple_choice",
    layout="*.jsonl, *.json or *.csv with messages/audios/solution or audio/question/choices/answer",
    read=read,
)
