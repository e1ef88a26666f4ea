"""Manifests as NeMo's Lhotse dataloading reads them: examples from cuts, and every check that needs no decoding.

Audio paths in a manifest are absolute or relative to the manifest's own directory, never to the working directory.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lhotse import CutSet
from lhotse.audio import Recording
from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths
from tqdm import tqdm

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.input_cfg import Source, sources_of
from nemo_mapo.data.entries import Entry, UnreadableClip, check_audio, further_clips
from nemo_mapo.data.nemo_types import entries_of
from nemo_mapo.processes import is_main_rank
from nemo_mapo.types import Clip, Example

logger = logging.getLogger(__name__)

_BAR_DELAY_SECONDS = 2.0
"""A short check needs no progress bar."""


class CheckedSplit(NamedTuple):
    """Content of a split, or of the part of it that was checked."""

    found: int
    """Cuts."""
    admissible: int
    """Cuts whose duration lies within the bounds."""
    used: int
    """Of these, what max_samples leaves."""


def validate_manifest(config: DatasetConfig, *, open_ended: bool = False) -> CheckedSplit:
    """Check the lines of a split (all, or `check_cuts` of each item) before anything is built; return its content.

    Reads manifests and the headers of the audio files, but decodes nothing: a stream that ends in the middle of a file
    is found when the clip is read. With `open_ended`, questions need no choices. Up to `max_unreadable` missing,
    unreadable or too short files are logged.

    Raises:
        ValueError: on the first of: unknown or incomplete `input_cfg`, missing or unreadable manifest, line that is not
            JSON, missing or contradictory field, id used twice, missing audio file, unreadable header, sample rate
            other than `config.sample_rate`, file shorter than its cut, no cut of admissible duration. It names
            file, line and cut, the field and its value, and what to do.
    """
    places: dict[str, str] = {}
    unreadable = used = 0
    for source, entries in checked_entries(config):
        bar = tqdm(
            entries, desc="checking data", unit="cut", delay=_BAR_DELAY_SECONDS, leave=False, disable=not is_main_rank()
        )
        for entry in bar:
            if entry.id in places:
                raise ValueError(
                    f"{entry.where}: id {entry.id!r} was already used at {places[entry.id]}: "
                    "make ids unique over the split (NeMo manifests: add an 'id' to each line)"
                )
            places[entry.id] = entry.where
            parse_example(entry.id, {**entry.fields, **source.tags}, entry.where, open_ended=open_ended)
            try:
                for clip in (entry, *entry.further):
                    check_audio(clip, config.sample_rate)
            except UnreadableClip as error:
                unreadable += 1
                if unreadable > config.max_unreadable:
                    count = f" (unreadable clip number {unreadable}, max_unreadable={config.max_unreadable})"
                    raise ValueError(f"{error}{count if config.max_unreadable else ''}") from error
                logger.warning(f"another clip will take its place: {error}")
            used += config.min_duration <= entry.duration_seconds <= config.max_duration
    if not used:
        raise ValueError(
            f"empty split: of the {len(places)} cuts in {[dict(item) for item in config.items]} none lasts between "
            f"min_duration={config.min_duration} and max_duration={config.max_duration} seconds"
        )
    kept = used if config.max_samples is None else min(used, config.max_samples)
    return CheckedSplit(found=len(places), admissible=used, used=kept)


def cut_ids(config: DatasetConfig) -> set[str]:
    """Ids of the cuts of a split (or of the first `check_cuts` of each item), whose lines are valid."""
    return {entry.id for _, entries in checked_entries(config) for entry in entries}


def checked_entries(config: DatasetConfig) -> Iterator[tuple[Source, Iterator[Entry]]]:
    """Every source of a split without phases, with its lines (or the first `check_cuts` of them)."""
    for source in sources_of(config.items):
        yield source, islice(entries_of(source), config.check_cuts)


def load_cuts(path: str | Path) -> CutSet:
    """Read a Lhotse cuts manifest with its audio paths made absolute, for use outside a dataloader."""
    if not Path(path).is_file():
        raise ValueError(f"no manifest at {path}: give the path of a Lhotse cuts manifest (.jsonl or .jsonl.gz)")
    return CutSet.from_cuts(resolve_relative_paths(cut, str(path)) for cut in CutSet.from_file(path))


def completions_by_choice(config: DatasetConfig) -> dict[str, Mapping[str, str]]:
    """The field `completions` of a split's Lhotse cuts (choice to whole completion), by question; most have none.

    Raises:
        ValueError: naming cut and field, if one holds something else.
    """
    found: dict[str, Mapping[str, str]] = {}
    for item in config.input_cfg:
        if "cuts_path" not in item:
            continue
        for cut in load_cuts(item["cuts_path"]):
            given = (cut.custom or {}).get("completions")
            if given is None:
                continue
            if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
                raise ValueError(
                    f"cut {cut.id}: 'completions' is {given!r}: give a text for each choice, {{choice: completion}}"
                )
            found[example_id(cut)] = given
    return found


def clips_of(cut: Cut) -> list[Cut]:
    """The cut itself, and its further clips in order: recordings in its custom fields `audio_2`, `audio_3`, ...

    ValueError naming a field that holds something else, or whose number does not follow on the previous one.
    """
    custom = cut.custom or {}
    clips = [cut]
    for name in further_clips(custom, f"cut {cut.id}"):
        recording = custom[name]
        if not isinstance(recording, Recording):
            raise ValueError(f"cut {cut.id}: field {name!r} holds no Lhotse recording: write one there")
        clips.append(recording.to_cut().with_id(f"{cut.id} {name}"))
    return clips


def example_from_cut(cut: Cut, *, open_ended: bool = False) -> Example:
    """Read the question of a cut from its custom fields; ValueError names cut, field and value."""
    example = parse_example(example_id(cut), cut.custom or {}, f"cut {cut.id}", open_ended=open_ended)
    return replace(example, clips=tuple(_origin(clip) for clip in clips_of(cut)))


def _origin(cut: Cut) -> Clip:
    paths = [str(source.source) for source in cut.recording.sources if source.type == "file"]
    return Clip(path=paths[0] if paths else None, start_seconds=float(cut.start), duration_seconds=float(cut.duration))


def example_id(cut: Cut) -> str:
    """The id of a cut's question: its own, or the cut's."""
    return str((cut.custom or {}).get("id", cut.id))


def parse_example(name: str, fields: Mapping[str, Any], where: str, *, open_ended: bool = False) -> Example:
    """Build an `Example` from the fields question, choices, answer, task and (optional) reasoning and caption.

    With `open_ended`, a question without the field choices has none. `where` is the start of the ValueError message
    if a field is missing or contradicts another.
    """
    question, answer, task = (_text(fields, name, where) for name in ("question", "answer", "task"))
    choices = () if open_ended and fields.get("choices") is None else _choices(fields, answer, where)
    reasoning, caption = (
        _text(fields, name, where) if fields.get(name) is not None else None for name in ("reasoning", "caption")
    )
    return Example(
        id=name,
        question=question,
        choices=choices,
        answer=answer,
        task=task,
        reasoning=reasoning,
        caption=caption,
    )


def _choices(fields: Mapping[str, Any], answer: str, where: str) -> tuple[str, ...]:
    choices = fields.get("choices")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise ValueError(f"{where}: field 'choices' is {choices!r}: give a list of at least two texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices) or len(set(choices)) < len(choices):
        raise ValueError(f"{where}: field 'choices' is {list(choices)}: give distinct, non-empty texts")
    if answer not in choices:
        raise ValueError(f"{where}: field 'answer' is {answer!r}, which is not among the choices {list(choices)}")
    return tuple(choices)


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        state = "missing" if name not in fields else f"{value!r}"
        raise ValueError(
            f"{where}: field {name!r} is {state}: give a non-empty text "
            "(a Lhotse cut carries it under 'custom'; `tags` of the input_cfg item set it for a whole manifest)"
        )
    return value
