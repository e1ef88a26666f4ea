"""LibriTTS-R (Koizumi et al., 2023), read by Lhotse's recipe: which sentence is spoken?"""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nemo_mapo.data.importers.base import Drop, Importer, InvalidRecord, Question, Row, Source, each, split_of_name
from nemo_mapo.data.importers.choices import DISTRACTORS, draw, randomness, shuffled

_NEIGHBOURS = 25
"""Distractors are among this many next shorter and next longer sentences: clip length must not reveal the answer."""


def read(source: Source) -> Iterator[Question | Drop]:
    """One question per utterance of every existing part: which sentence does the speaker say?"""
    from lhotse.recipes.libritts import LIBRITTS

    parts = [source.directory() / part for part in LIBRITTS if (source.path / part).is_dir()]
    if not parts:
        raise ValueError(f"{source.path}: none of {', '.join(LIBRITTS)} in this directory")
    for part in parts:
        manifests = _recipe(part)
        audio = {recording.id: Path(recording.sources[0].source) for recording in manifests["recordings"]}
        sentences = sorted({(len(one.text), one.text) for one in manifests["supervisions"]})
        build = partial(_question, split=split_of_name(part.name), seed=source.seed, audio=audio, sentences=sentences)
        yield from each(_rows(part), build)


def _recipe(part: Path) -> dict[str, Any]:
    from lhotse.audio import AudioLoadingError
    from lhotse.recipes.libritts import prepare_librittsr

    if next(part.rglob("*.wav"), None) is None:
        raise ValueError(f"{part}: no *.wav below this directory: unpack the part again")
    try:
        return dict(prepare_librittsr(part.parent, dataset_parts=[part.name])[part.name])
    except (AudioLoadingError, OSError, ValueError) as error:
        raise ValueError(f"{part}: Lhotse's recipe cannot read this part, unpack it again: {error}") from error


def _rows(part: Path) -> Iterator[Row]:
    """The transcripts again, because the recipe drops those without audio and does not count them."""
    for path in sorted(part.rglob("*.trans.tsv")):
        if not path.name.startswith("._"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                values = dict(zip(("id", "original", "normalized"), line.split("\t"), strict=False))
                yield Row(where=f"{path}:{number}", number=number, fields=values)


def _question(
    row: Row, *, split: str | None, seed: int, audio: dict[str, Path], sentences: list[tuple[int, str]]
) -> Question:
    name, text = row.text("id"), row.text("normalized")
    if name not in audio:
        raise InvalidRecord(
            "audio file missing",
            f"{row.where}: Lhotse's recipe has no recording {name} (no such *.wav, or one that it knows to be damaged)",
        )
    generator = randomness(seed, name)
    place = bisect_left(sentences, (len(text), text))
    near = [other for _, other in sentences[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1]]
    return Question(
        where=row.where,
        id=f"libritts_r-{name}",
        audio=audio[name],
        question="Which sentence does the speaker say?",
        choices=shuffled(text, draw(near, DISTRACTORS, generator, lambda other: other != text), generator),
        answer=text,
        task="transcript",
        split=split,
    )


IMPORTER = Importer(
    name="libritts_r",
    layout="the unpacked parts (train-clean-100, dev-clean, ...): <part>/<speaker>/<chapter>/*.wav, *.trans.tsv, "
    "*.book.tsv",
    read=read,
)
