"""MusicCaps (Agostinelli et al., 2023): which description fits the music?"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from nemo_mapo.data.importers.base import Drop, Importer, Question, Row, Source, each, usable
from nemo_mapo.data.importers.choices import DISTRACTORS, draw, randomness, shuffled
from nemo_mapo.data.importers.records import AudioIndex, csv_rows


class _Caption(NamedTuple):
    split: str
    text: str
    aspects: frozenset[str]


def read(source: Source) -> Iterator[Question | Drop]:
    """One question per clip; distractors are captions, of the same split, of clips that share no aspect with it."""
    rows = list(
        csv_rows(
            source.file("musiccaps-public.csv"),
            "ytid",
            "start_s",
            "end_s",
            "aspect_list",
            "caption",
            "is_audioset_eval",
        )
    )
    audio = AudioIndex(source.audio_dir or source.path / "audio")
    pools: dict[str, list[_Caption]] = defaultdict(list)
    for caption in usable(rows, _caption):
        pools[caption.split].append(caption)
    yield from each(rows, partial(_question, seed=source.seed, audio=audio, pools=pools))


def _question(row: Row, *, seed: int, audio: AudioIndex, pools: dict[str, list[_Caption]]) -> Question:
    video, start, end = row.text("ytid"), int(row.seconds("start_s")), int(row.seconds("end_s"))
    split, text, aspects = _caption(row)
    generator = randomness(seed, video)
    others = draw(pools[split], DISTRACTORS, generator, lambda other: aspects.isdisjoint(other.aspects))
    return Question(
        where=row.where,
        id=f"musiccaps-{video}",
        audio=audio.find(row.where, video, f"[{video}]-[{start}-{end}]", f"{video}_{start}_{end}"),
        question="Which description fits the music?",
        choices=shuffled(text, [other.text for other in others], generator),
        answer=text,
        task="music_caption",
        split=split,
        caption=text,
    )


def _caption(row: Row) -> _Caption:
    try:
        aspects = ast.literal_eval(row.text("aspect_list"))
    except (ValueError, SyntaxError) as error:
        raise row.wrong("aspect_list", "give a list of texts as Python writes it") from error
    split = "test" if row.text("is_audioset_eval") == "True" else "train"
    return _Caption(split, row.text("caption"), frozenset(str(aspect) for aspect in aspects))


IMPORTER = Importer(
    name="musiccaps",
    layout="musiccaps-public.csv; the clips cut out as audio/<ytid>.<suffix> (or [<ytid>]-[<start>-<end>])",
    read=read,
)
