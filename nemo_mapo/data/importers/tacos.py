"""TACOS (Primus et al., 2025): captions of segments of Freesound clips, with questions by time."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from nemo_mapo.data.importers.base import Drop, Importer, InvalidRecord, Question, Row, Source, each, usable
from nemo_mapo.data.importers.choices import DISTRACTORS, draw, randomness, shuffled
from nemo_mapo.data.importers.records import csv_rows

_SPLITS = {"development_split.csv": "train", "test_split.csv": "test"}


class _Region(NamedTuple):
    clip: str
    text: str
    onset: float
    offset: float


class _Corpus:
    """The material for questions about a clip."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.audio = source.audio_dir or source.path / "audio"
        self.rows = list(csv_rows(source.file("annotations_strong.csv"), "filename", "text", "onset", "offset"))
        self.kind = _column(source, "metadata.csv", "superclass")
        self.caption = _column(source, "annotations_weak.csv", "text")
        self.split = {
            row.text("filename"): split
            for name, split in _SPLITS.items()
            for row in csv_rows(source.file(name), "filename")
        }
        self.regions: dict[str, list[_Region]] = defaultdict(list)
        self.pools: dict[str | None, list[_Region]] = defaultdict(list)
        for region in usable(self.rows, _region):
            self.regions[region.clip].append(region)
            self.pools[self.split.get(region.clip)].append(region)


def read(source: Source) -> Iterator[Question | Drop]:
    """One question per annotated segment: what is heard between its onset and its offset?"""
    corpus = _Corpus(source)
    yield from each(corpus.rows, partial(_question, corpus=corpus))


def _question(row: Row, *, corpus: _Corpus) -> Question:
    clip, text, onset, offset = _region(row)
    if clip not in corpus.split:
        raise InvalidRecord("clip in no split", f"{row.where}: {clip} is in none of {', '.join(_SPLITS)}")
    name = f"tacos-{clip.rsplit('.', 1)[0]}-{row.number}"
    generator = randomness(corpus.source.seed, name)

    def elsewhere(region: _Region) -> bool:
        return region.text != text and corpus.kind.get(region.clip) != corpus.kind.get(clip)

    # A segment of the same clip at another time is a distractor that only a model attending to the time can reject.
    here = {region.text for region in corpus.regions[clip] if region.onset < offset and region.offset > onset}
    others = list(dict.fromkeys(region.text for region in corpus.regions[clip] if region.text not in here))
    distractors = draw(others, DISTRACTORS, generator, lambda _: True)
    pool = corpus.pools[corpus.split[clip]]
    distractors += [region.text for region in draw(pool, DISTRACTORS - len(distractors), generator, elsewhere)]
    return Question(
        where=row.where,
        id=name,
        audio=corpus.audio / clip,
        question=f"What is heard between {onset:.1f} and {offset:.1f} seconds?",
        choices=shuffled(text, distractors, generator),
        answer=text,
        task="temporal",
        split=corpus.split[clip],
        caption=corpus.caption.get(clip),
    )


def _region(row: Row) -> _Region:
    return _Region(row.text("filename"), row.text("text"), row.seconds("onset"), row.seconds("offset"))


def _column(source: Source, name: str, field: str) -> dict[str, str]:
    """A field of a file with one line per clip, by clip."""
    return {row.fields["filename"]: row.fields[field] for row in csv_rows(source.file(name), "filename", field)}


IMPORTER = Importer(
    name="tacos",
    layout="annotations_strong.csv, annotations_weak.csv, metadata.csv, development_split.csv, test_split.csv; "
    "audio/<filename>",
    read=read,
)
