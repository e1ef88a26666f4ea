"""AudioSkills-style JSON (Ghosh et al., 2025): conversations about a `sound`, of which the multiple-choice ones."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_mapo.data.importers.base import Drop, Importer, Question, Row, Source, each, split_of_name
from nemo_mapo.data.importers.choices import answer_choice, split_options
from nemo_mapo.data.importers.records import json_rows


def read(source: Source) -> Iterator[Question | Drop]:
    """Questions of a .json file, or of all those in a directory; the file's name is the task."""
    for path in source.files(".json", ".jsonl"):
        yield from each(json_rows(path), partial(_question, source=source, path=path))


def _question(row: Row, *, source: Source, path: Path) -> Question | Drop:
    turns = row.fields.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.wrong("conversations", "give a list of {from, value}")
    sound = row.fields.get("sound")
    if isinstance(sound, list):
        return Drop(reason="several audio clips", message=f"{row.where}: sound is a list", is_invalid=False)
    if [turn.get("from") for turn in turns] != ["human", "gpt"]:
        return Drop(reason="several turns", message=f"{row.where}: not one question, one answer", is_invalid=False)
    text, choices = split_options(str(turns[0].get("value")))
    if not choices:
        return Drop(reason="not multiple choice", message=f"{row.where}: no choices (A), (B)...", is_invalid=False)
    reply = replace(row, fields={"answer": turns[1].get("value")})
    return Question(
        where=row.where,
        id=f"audioskills-{path.stem}-{row.fields.get('id', row.number)}",
        audio=source.audio_path(row.text("sound"), path),
        question=text,
        choices=choices,
        answer=answer_choice(reply, "answer", choices),
        task=path.stem,
        split=split_of_name(path.stem),
    )


IMPORTER = Importer(
    name="audioskills",
    layout="*.json: lists of {id, sound, conversations: [{from: human, value: <sound> ... (A) ... (B) ...}, "
    "{from: gpt, value: (B) ...}]}",
    read=read,
)
