"""Lhotse Shar directories whose cuts carry question, choices and answer."""

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_mapo.data.importers.base import Drop, Importer, Question, Row, Source, each, split_of_name
from nemo_mapo.data.importers.multiple_choice import question_of
from nemo_mapo.data.sources import refuse_unsafe_recording


def read(source: Source) -> Iterator[Question | Drop]:
    """Questions of a Shar directory, or of every one below; its name may spell the split."""
    places = sorted({path.parent for path in source.directory().rglob("cuts.*.jsonl*")})
    if not places:
        raise ValueError(f"{source.path}: no cuts.*.jsonl.gz in or below this directory")
    for place in places:
        yield from each(_rows(place), partial(_question, source=source, place=place))


def _rows(place: Path) -> Iterator[Row]:
    from lhotse import CutSet

    try:
        for number, cut in enumerate(CutSet.from_shar(in_dir=place), start=1):
            fields = {"id": cut.id, "cut": cut, **(cut.custom or {})}
            yield Row(where=f"{place}: cut {cut.id}", number=number, fields=fields)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{place}: a Shar archive is damaged: write it again ({error})") from error


def _question(row: Row, *, source: Source, place: Path) -> Question:
    from lhotse import MonoCut

    cut = row.fields["cut"]
    if not isinstance(cut, MonoCut) or cut.recording is None or len(cut.recording.sources) != 1:
        raise row.wrong("cut", "only cuts of one channel of one recording are supported", "not a mono cut")
    refuse_unsafe_recording(cut.recording, row.where)
    audio = replace(row, fields={**row.fields, "audio": cut.recording.sources[0].source})
    return replace(
        question_of(audio, source=source, manifest=place, split=split_of_name(place.name)),
        start_seconds=float(cut.start),
        duration_seconds=float(cut.duration),
    )


IMPORTER = Importer(name="shar", layout="cuts.*.jsonl.gz and recording.*.tar, in or below the directory", read=read)
