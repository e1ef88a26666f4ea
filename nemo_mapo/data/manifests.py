"""Manifests as NeMo's Lhotse dataloading reads them: examples out of cuts, and every check that needs no decoding.

Audio paths in a manifest are absolute or relative to the manifest's own directory, never to the working directory.
"""

import gzip
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lhotse import CutSet
from lhotse.audio import AudioLoadingError, Recording, info
from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths
from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths
from tqdm import tqdm

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.data.sources import refuse_unsafe_path, refuse_unsafe_source
from nemo_mapo.types import Example

logger = logging.getLogger(__name__)

DURATION_TOLERANCE_SECONDS = 0.05
"""How much longer than its file a manifest may claim a clip to be (durations are often rounded)."""

_FURTHER_CLIP = re.compile(r"audio_\d+")

_BAR_DELAY_SECONDS = 2.0
"""A short check needs no progress bar."""

_LOCATION_KEY = {"lhotse": "cuts_path", "nemo": "manifest_filepath", "lhotse_shar": "shar_path"}
"""Supported types of `input_cfg` items, and the key that says where the data are."""


class UnreadableClip(ValueError):
    """The audio of a cut cannot be used; the message names cut and path."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One line of a manifest, whatever its type."""

    where: str
    id: str
    fields: Mapping[str, Any]
    start_seconds: float
    duration_seconds: float
    sample_rate: int | None
    """Hz; None when the manifest leaves it to the file."""
    channels: int
    audio: Path | None
    """None when the audio is not a file of its own (Shar, URL)."""
    manifest: Path | None = None
    """File of a Lhotse cut."""


class CheckedSplit(NamedTuple):
    """What is in a split, or in the part of it that was looked at."""

    found: int
    """Cuts."""
    admissible: int
    """Cuts whose duration lies within the bounds."""
    used: int
    """Of these, what max_samples leaves."""


def validate_manifest(config: DatasetConfig, *, open_ended: bool = False) -> CheckedSplit:
    """Check the lines of a split (all, or `check_cuts` of each item) before anything is built; return what was found.

    Reads manifests and the headers of the audio files, but decodes nothing: a stream that breaks off in the middle of a
    file is found when the clip is read. With `open_ended`, questions need no choices. Up to `max_unreadable` missing,
    unreadable or too short files are logged.

    Raises:
        ValueError: on the first of: unknown or incomplete `input_cfg`, missing or unreadable manifest, line that is not
            JSON, missing or contradictory field, id used twice, missing audio file, unreadable header, sample rate
            other than `config.sample_rate`, file shorter than its cut, no cut of admissible duration. It names
            file, line and cut, the field and its value, and what to do.
    """
    places: dict[str, str] = {}
    unreadable = used = 0
    for index, item in enumerate(config.input_cfg):
        entries = islice(_entries(item, f"input_cfg[{index}]"), config.check_cuts)
        for entry in tqdm(entries, desc="checking data", unit="cut", delay=_BAR_DELAY_SECONDS, leave=False):
            if entry.id in places:
                raise ValueError(
                    f"{entry.where}: id {entry.id!r} was already used at {places[entry.id]}: "
                    "make ids unique over the split (NeMo manifests: add an 'id' to each line)"
                )
            places[entry.id] = entry.where
            parse_example(entry.id, {**entry.fields, **item.get("tags", {})}, entry.where, open_ended=open_ended)
            try:
                for clip in (entry, *_further_entries(entry, kind=item["type"])):
                    _check_audio(clip, config.sample_rate)
            except UnreadableClip as error:
                unreadable += 1
                if unreadable > config.max_unreadable:
                    count = f" (unreadable clip number {unreadable}, max_unreadable={config.max_unreadable})"
                    raise ValueError(f"{error}{count if config.max_unreadable else ''}") from error
                logger.warning(f"another clip will take its place: {error}")
            used += config.min_duration <= entry.duration_seconds <= config.max_duration
    if not used:
        raise ValueError(
            f"empty split: of the {len(places)} cuts in {[dict(item) for item in config.input_cfg]} none lasts between "
            f"min_duration={config.min_duration} and max_duration={config.max_duration} seconds"
        )
    kept = used if config.max_samples is None else min(used, config.max_samples)
    return CheckedSplit(found=len(places), admissible=used, used=kept)


def cut_ids(config: DatasetConfig) -> set[str]:
    """Ids of the cuts of a split (or of the first `check_cuts` of each item), whose lines are sound."""
    items = enumerate(config.input_cfg)
    found = (islice(_entries(item, f"input_cfg[{index}]"), config.check_cuts) for index, item in items)
    return {entry.id for entries in found for entry in entries}


def load_cuts(path: str | Path) -> CutSet:
    """Read a Lhotse cuts manifest with its audio paths made absolute, for use outside a dataloader."""
    if not Path(path).is_file():
        raise ValueError(f"no manifest at {path}: give the path of a Lhotse cuts manifest (.jsonl or .jsonl.gz)")
    return CutSet.from_cuts(resolve_relative_paths(cut, str(path)) for cut in CutSet.from_file(path))


def clips_of(cut: Cut) -> list[Cut]:
    """The cut itself, and its further clips in order: recordings in its custom fields `audio_2`, `audio_3`, ...

    ValueError naming a field that holds something else, or that does not follow on.
    """
    custom = cut.custom or {}
    clips = [cut]
    for name in further_clips(custom, f"cut {cut.id}"):
        recording = custom[name]
        if not isinstance(recording, Recording):
            raise ValueError(f"cut {cut.id}: field {name!r} holds no Lhotse recording: write one there")
        clips.append(recording.to_cut().with_id(f"{cut.id} {name}"))
    return clips


def further_clips(fields: Mapping[str, Any], where: str) -> list[str]:
    """Names of the fields of a cut's clips after the first; ValueError if one is missing between them."""
    found = sorted((name for name in fields if _FURTHER_CLIP.fullmatch(name)), key=lambda name: int(name[6:]))
    wanted = [f"audio_{number}" for number in range(2, 2 + len(found))]
    if found != wanted:
        raise ValueError(
            f"{where}: has fields {', '.join(found)}: number the clips after the first audio_2, audio_3, ..."
        )
    return found


def example_from_cut(cut: Cut, *, open_ended: bool = False) -> Example:
    """Read the question of a cut from its custom fields; ValueError names cut, field and value."""
    return parse_example(example_id(cut), cut.custom or {}, f"cut {cut.id}", open_ended=open_ended)


def example_id(cut: Cut) -> str:
    """The id of a cut's question: its own, or the cut's."""
    return str((cut.custom or {}).get("id", cut.id))


def parse_example(name: str, fields: Mapping[str, Any], where: str, *, open_ended: bool = False) -> Example:
    """Build an `Example` from the fields question, choices, answer, task and (optional) reasoning and caption.

    With `open_ended`, a question without the field choices has none. `where` begins the message of the ValueError that
    is raised when a field is missing or contradicts another.
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


def _entries(item: Mapping[str, Any], where: str) -> Iterator[_Entry]:
    kind = item.get("type")
    if kind not in _LOCATION_KEY:
        raise ValueError(f"{where}: type is {kind!r}; supported are {', '.join(_LOCATION_KEY)}")
    location = item.get(_LOCATION_KEY[kind])
    if not isinstance(location, str):
        raise ValueError(
            f"{where}: {_LOCATION_KEY[kind]} is {location!r}; an item of type {kind} needs one path there "
            "(list several manifests as several items)"
        )
    for path in _manifest_files(kind, Path(location), where):
        for place, record in _lines(path):
            if kind == "nemo":
                # NeMo itself skips lines that carry this key.
                if not record.get("_skipme", False):
                    yield _nemo_entry(record, place, path)
            else:
                yield _lhotse_entry(record, place, path, in_archive=kind == "lhotse_shar")


def _manifest_files(kind: str, location: Path, where: str) -> list[Path]:
    if kind == "nemo":
        paths = [Path(path) for path in expand_sharded_filepaths(str(location))]
    elif kind == "lhotse":
        paths = [location]
    else:
        paths = sorted(location.glob("cuts.*.jsonl*"))
        for path in paths:
            shard = path.name.split(".jsonl")[0].removeprefix("cuts")
            if not (location / f"recording{shard}.tar").is_file():
                raise ValueError(f"{where}: no recording{shard}.tar beside {path}: the Shar directory is incomplete")
    missing = [str(path) for path in paths if not path.is_file()] or ([] if paths else [str(location)])
    if missing:
        raise ValueError(
            f"{where}: no manifest at {', '.join(missing)}: correct {_LOCATION_KEY[kind]} "
            "(python examples/prepare_data.py makes manifests; make_synthetic_corpus.py those of the embedded run)"
        )
    return paths


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file:line` and content of each line; ValueError where a line or the file is cut off."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"{path}:{number}: not a JSON object but {record!r}: delete the line")
                yield f"{path}:{number}", record
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not a JSON line (cut in half?): {error}: restore the line or delete it"
        ) from error
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: unreadable after line {number} ({error}): write the manifest again") from error


def _lhotse_entry(record: dict[str, Any], place: str, manifest: Path, *, in_archive: bool) -> _Entry:
    name = record.get("id")
    if not isinstance(name, str):
        raise ValueError(f"{place}: field 'id' is {name!r}: every cut needs a text id")
    where = f"{place}: cut {name}"
    recording, channel = record.get("recording"), record.get("channel")
    if not isinstance(recording, dict) or not isinstance(channel, int):
        raise ValueError(
            f"{where}: type {record.get('type')!r} with channel {channel!r} is not a cut of one channel of one "
            "recording: save mixed and multi-channel cuts as mono audio first (CutSet.save_audios)"
        )
    sources = _sources(recording, where, allowed={"file", "shar"} if in_archive else {"file"})
    files = [source["source"] for source in sources if source["type"] == "file"]
    return _Entry(
        where=where,
        id=name,
        fields=record.get("custom") or {},
        start_seconds=_seconds(record, "start", where),
        duration_seconds=_seconds(record, "duration", where),
        sample_rate=recording.get("sampling_rate"),
        channels=sum(len(source["channels"]) for source in sources),
        # A pathlib join keeps an absolute path as it is.
        audio=manifest.parent / files[0] if files else None,
        manifest=manifest,
    )


def _sources(recording: Mapping[str, Any], where: str, *, allowed: set[str]) -> list[dict[str, Any]]:
    """The audio sources of a recording; ValueError for one that is not a plain file (or, in Shar, in the archive)."""
    sources = recording.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise ValueError(f"{where}: field 'sources' is {sources!r}: give a list of audio sources")
    for source in sources:
        refuse_unsafe_source(source, where, allowed=allowed)
    return sources


def _further_entries(entry: _Entry, *, kind: str) -> Iterator[_Entry]:
    """The clips after the first, as entries of their own."""
    for name in further_clips(entry.fields, entry.where):
        where, recording = f"{entry.where}: {name}", entry.fields[name]
        sources = _sources(recording, where, allowed={"file"}) if isinstance(recording, dict) else None
        if kind != "lhotse" or not sources:
            raise ValueError(
                f"{where}: {recording!r} is not a recording in a file: several clips need a Lhotse manifest "
                "(type lhotse) with recordings in audio_2, audio_3, ..."
            )
        assert entry.manifest is not None, "a Lhotse manifest is a file"
        yield replace(
            entry,
            where=where,
            start_seconds=0.0,
            duration_seconds=_seconds(recording, "duration", where),
            sample_rate=recording.get("sampling_rate"),
            channels=sum(len(source["channels"]) for source in sources),
            audio=entry.manifest.parent / sources[0]["source"],
        )


def _nemo_entry(record: dict[str, Any], place: str, manifest: Path) -> _Entry:
    audio = record.get("audio_filepath")
    if not isinstance(audio, str):
        raise ValueError(f"{place}: field 'audio_filepath' is {audio!r}: give the path of an audio file")
    name = str(record.get("id", f"{audio}@{record.get('offset') or 0}"))
    where = f"{place}: cut {name}"
    return _Entry(
        where=where,
        id=name,
        fields=record,
        start_seconds=_seconds({"offset": record.get("offset") or 0}, "offset", where),
        duration_seconds=_seconds(record, "duration", where),
        sample_rate=record.get("sampling_rate"),
        channels=1,
        audio=manifest.parent / audio,
    )


def _seconds(record: Mapping[str, Any], name: str, where: str) -> float:
    value = record.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: field {name!r} is {value!r}: give seconds")
    return float(value)


def _check_audio(entry: _Entry, sample_rate: int) -> None:
    if entry.sample_rate is not None and entry.sample_rate != sample_rate:
        raise ValueError(
            f"{entry.where}: field 'sampling_rate' is {entry.sample_rate}, but the dataset is read at "
            f"sample_rate={sample_rate} Hz: resample the audio, or set sample_rate and a model that takes it"
        )
    if entry.audio is None:
        return
    refuse_unsafe_path(str(entry.audio), entry.where)
    if not entry.audio.is_file():
        raise UnreadableClip(
            f"{entry.where}: no audio file at {entry.audio}: restore it or correct the manifest "
            "(paths are absolute or relative to the manifest's directory)"
        )
    try:
        header = info(entry.audio)
    except AudioLoadingError as error:
        raise UnreadableClip(f"{entry.where}: {entry.audio} is no readable audio file: replace it ({error})") from error
    if header.samplerate != sample_rate:
        raise ValueError(
            f"{entry.where}: {entry.audio} has {header.samplerate} Hz, not sample_rate={sample_rate}: resample it"
        )
    if header.channels != entry.channels:
        raise ValueError(
            f"{entry.where}: {entry.audio} has {header.channels} channels, the manifest says {entry.channels}: "
            "convert it to mono or correct the manifest"
        )
    end = entry.start_seconds + entry.duration_seconds
    if end > header.duration + DURATION_TOLERANCE_SECONDS:
        raise UnreadableClip(
            f"{entry.where}: the cut ends at {end} s but {entry.audio} lasts {header.duration} s: "
            "the file is truncated or the manifest wrong"
        )
