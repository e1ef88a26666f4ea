"""AVQA (Yang et al., 2022): questions about VGGSound videos, asked about their sound tracks."""

import re
from collections.abc import Iterator
from functools import partial

from nemo_mapo.data.importers.base import Drop, Importer, Question, Row, Source, each
from nemo_mapo.data.importers.choices import answer_choice
from nemo_mapo.data.importers.records import AudioIndex, json_rows

_SPLITS = {"train_qa.json": "train", "val_qa.json": "validation"}


def read(source: Source) -> Iterator[Question | Drop]:
    """Questions of `train_qa.json` and `val_qa.json`; the model hears the video, so "video" reads "audio"."""
    files = {source.file(name): split for name, split in _SPLITS.items()}
    audio = AudioIndex(source.audio_dir or source.path / "audio")
    for path, split in files.items():
        yield from each(json_rows(path), partial(_question, split=split, audio=audio))


def _question(row: Row, *, split: str, audio: AudioIndex) -> Question:
    choices = row.fields.get("multi_choice")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise row.wrong("multi_choice", "give a list of texts")
    # Published choices carry stray blanks; choices and answer are cleaned alike.
    choices = tuple(choice.strip() for choice in choices)
    return Question(
        where=row.where,
        id=f"avqa-{split}-{row.fields.get('id', row.number)}",
        audio=audio.find(row.where, row.text("video_name")),
        question=re.sub(r"\bvideo\b", "audio", row.text("question_text")),
        choices=choices,
        answer=answer_choice(row, "answer", choices, counts_from_zero=True),
        task=row.optional_text("question_type") or "avqa",
        split=split,
    )


IMPORTER = Importer(
    name="avqa", layout="train_qa.json, val_qa.json; sound tracks audio/<video_name>.<suffix>", read=read
)
