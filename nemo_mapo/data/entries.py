"""Lines of manifests, whatever their type, and the checks of them that need no decoding.

Audio paths in a manifest are absolute or relative to the manifest's own directory, never to the working directory.
"""

import copy
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from lhotse.audio import AudioLoadingError, info
from lhotse.cut import MonoCut
from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths

from nemo_mapo.data.sources import refuse_unsafe_path, refuse_unsafe_source

DURATION_TOLERANCE_SECONDS = 0.05
"""By how much a manifest may overstate the duration of a file (durations are often rounded)."""

LONGEST_SECONDS = 1e7
"""No clip is longer; larger numbers are mistakes."""

_CUT_FIELDS = {"type", *(field.name for field in fields(MonoCut))}

_FURTHER_CLIP = re.compile(r"audio_\d+")


SEVERAL_CLIPS = (
    ": several clips need a Lhotse manifest (type lhotse) with recordings in audio_2, audio_3, ..., or conversations "
    "(type multimodal_conversation)"
)
"""How questions about several clips are written."""


class Header(NamedTuple):
    """The header of an audio file."""

    sample_rate: int
    """Hz."""
    channels: int
    duration_seconds: float


class UnreadableClip(ValueError):
    """The audio of a cut cannot be used; the message names cut and path."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a manifest, whatever its type."""

    where: str
    id: str
    fields: Mapping[str, Any]
    start_seconds: float
    duration_seconds: float
    sample_rate: int | None
    """Hz; None if the manifest leaves it to the file."""
    channels: int
    audio: Path | None
    """None if the audio has no file of its own (in an archive)."""
    recorded_seconds: float | None = None
    """Length of the whole file according to the manifest; None if it does not say."""
    header: Header | None = None
    """Of audio in an archive that was looked into."""
    archived: str = ""
    """The archive and the place in it."""
    further: tuple["Entry", ...] = ()
    """The clips of the question after the first."""


def further_clips(fields: Mapping[str, Any], where: str) -> list[str]:
    """Names of the fields of a cut's clips after the first; ValueError if one is missing between them."""
    found = sorted((name for name in fields if _FURTHER_CLIP.fullmatch(name)), key=lambda name: int(name[6:]))
    wanted = [f"audio_{number}" for number in range(2, 2 + len(found))]
    if found != wanted:
        raise ValueError(
            f"{where}: has fields {', '.join(found)}: number the clips after the first audio_2, audio_3, ..."
        )
    return found


def manifest_files(location: str, where: str, key: str) -> list[Path]:
    """The files that a path stands for, shards expanded as in NeMo (`manifest__OP_0..3_CL_.json`); each is there."""
    paths = expand_sharded_filepaths(location)
    for path in paths:
        refuse_unsafe_path(path, f"{where}: {key}")
    found = [Path(path) for path in paths]
    refuse_missing(found, location, where, key)
    return found


def refuse_missing(paths: list[Path], location: str, where: str, key: str) -> None:
    """ValueError for missing manifests, or if there are none at all."""
    missing = [str(path) for path in paths if not path.is_file()] or ([] if paths else [location])
    if missing:
        raise ValueError(
            f"{where}: no manifest at {', '.join(missing)}: correct {key} "
            "(python examples/prepare_data.py makes manifests; make_synthetic_corpus.py those of the embedded run)"
        )


def lines_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file:line` and content of each line; ValueError if a line or the file is truncated."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    raise ValueError(f"{path}:{number}: a blank line, at which Lhotse's reader stops: delete it")
                record = json.loads(line, parse_constant=_no_number)
                if not isinstance(record, dict):
                    raise ValueError(f"{path}:{number}: not a JSON object but {record!r}: delete the line")
                yield f"{path}:{number}", record
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not a JSON line (cut in half?): {error}: restore the line or delete it"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path}:{number + 1}: nested too deeply: write the manifest again") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: unreadable after line {number} ({error}): write the manifest again") from error


def _no_number(text: str) -> float:
    raise json.JSONDecodeError(f"{text} is not a JSON number", text, 0)


def lhotse_entry(record: dict[str, Any], place: str, manifest: Path, *, in_archive: bool) -> Entry:
    """A Lhotse cut and its further clips."""
    name = record.get("id")
    if not isinstance(name, str):
        raise ValueError(f"{place}: field 'id' is {name!r}: every cut needs a text id")
    where = f"{place}: cut {name}"
    recording, channel = record.get("recording"), record.get("channel")
    if (
        record.get("type") != "MonoCut"
        or not isinstance(recording, dict)
        or not isinstance(channel, int)
        or isinstance(channel, bool)
    ):
        raise ValueError(
            f"{where}: type {record.get('type')!r} with channel {channel!r} is not a cut of one channel of one "
            "recording: save mixed and multi-channel cuts as mono audio first (CutSet.save_audios)"
        )
    sources = _sources(recording, where, allowed={"file", "shar"} if in_archive else {"file"})
    files = [source["source"] for source in sources if source["type"] == "file"]
    _check_recording(recording, channel, sources, where)
    _check_with_lhotse(record, where)
    first = Entry(
        where=where,
        id=name,
        fields=_custom(record, where),
        start_seconds=seconds_of(record, "start", where),
        duration_seconds=seconds_of(record, "duration", where),
        recorded_seconds=seconds_of(recording, "duration", where),
        sample_rate=rate_of(recording, where),
        channels=sum(len(source["channels"]) for source in sources),
        # A pathlib join keeps an absolute path as it is.
        audio=manifest.parent / files[0] if files else None,
    )
    return replace(first, further=tuple(_further_entries(first, manifest, in_archive=in_archive)))


def _check_with_lhotse(record: Mapping[str, Any], where: str) -> None:
    """ValueError for anything on which Lhotse's own reader would fail when the cut is drawn."""
    if unknown := sorted(record.keys() - _CUT_FIELDS):
        raise ValueError(
            f"{where}: field {unknown[0]!r} does not exist in a Lhotse cut ({', '.join(sorted(_CUT_FIELDS))}): move it "
            "into custom, which holds questions, choices and answers"
        )
    try:
        MonoCut.from_dict(copy.deepcopy(dict(record)))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{where}: Lhotse cannot read it ({error}): write the manifest with Lhotse") from error


def _sources(recording: Mapping[str, Any], where: str, *, allowed: set[str]) -> list[dict[str, Any]]:
    """The audio sources of a recording; ValueError for one that is not a plain file (or, in Shar, in the archive)."""
    sources = recording.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise ValueError(f"{where}: field 'sources' is {sources!r}: give a list of audio sources")
    for source in sources:
        refuse_unsafe_source(source, where, allowed=allowed)
    return sources


def _further_entries(entry: Entry, manifest: Path, *, in_archive: bool) -> Iterator[Entry]:
    """The clips after the first, as entries of their own."""
    for name in further_clips(entry.fields, entry.where):
        where, recording = f"{entry.where}: {name}", entry.fields[name]
        sources = _sources(recording, where, allowed={"file"}) if isinstance(recording, dict) else None
        if in_archive or not sources:
            raise ValueError(f"{where}: {recording!r} is not a recording in a file{SEVERAL_CLIPS}")
        _check_recording(recording, 0, sources, where)
        yield replace(
            entry,
            where=where,
            start_seconds=0.0,
            duration_seconds=seconds_of(recording, "duration", where),
            recorded_seconds=seconds_of(recording, "duration", where),
            sample_rate=rate_of(recording, where),
            channels=sum(len(source["channels"]) for source in sources),
            audio=manifest.parent / sources[0]["source"],
        )


def nemo_entry(record: dict[str, Any], place: str, manifest: Path) -> Entry:
    """A line of a NeMo manifest."""
    audio = record.get("audio_filepath")
    if not isinstance(audio, str):
        raise ValueError(f"{place}: field 'audio_filepath' is {audio!r}: give the path of an audio file")
    name = str(record.get("id", f"{audio}@{record.get('offset') or 0}"))
    where = f"{place}: cut {name}"
    for clip in further_clips(record, where):
        raise ValueError(f"{where}: {clip}: {record[clip]!r} is not a recording in a file{SEVERAL_CLIPS}")
    return Entry(
        where=where,
        id=name,
        fields=record,
        start_seconds=0.0 if record.get("offset") is None else seconds_of(record, "offset", where),
        duration_seconds=seconds_of(record, "duration", where),
        sample_rate=None if record.get("sampling_rate") is None else rate_of(record, where),
        channels=1,
        audio=manifest.parent / audio,
    )


def seconds_of(record: Mapping[str, Any], name: str, where: str) -> float:
    """A field that holds seconds; ValueError for anything else."""
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LONGEST_SECONDS:
        raise ValueError(f"{where}: field {name!r} is {value!r}: give seconds")
    return float(value)


def rate_of(record: Mapping[str, Any], where: str) -> int:
    """The field sampling_rate; ValueError if it is not a number of Hz."""
    value = record.get("sampling_rate")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{where}: field 'sampling_rate' is {value!r}: give Hz, a whole number")
    return value


def _custom(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    custom = record.get("custom")
    if not isinstance(custom, Mapping | None):
        raise ValueError(f"{where}: field 'custom' is {custom!r}: give names and values")
    return custom or {}


def _check_recording(recording: Mapping[str, Any], channel: int, sources: list[dict[str, Any]], where: str) -> None:
    """ValueError naming a field of a recording that Lhotse cannot take."""
    if not isinstance(recording.get("id"), str):
        raise ValueError(f"{where}: field 'id' of the recording is {recording.get('id')!r}: give a text")
    rate, samples = rate_of(recording, where), recording.get("num_samples")
    length = seconds_of(recording, "duration", f"{where}: recording")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise ValueError(f"{where}: field 'num_samples' is {samples!r}: give a whole number")
    if abs(samples / rate - length) > DURATION_TOLERANCE_SECONDS:
        raise ValueError(
            f"{where}: field 'num_samples' is {samples}, which at {rate} Hz is not the recording's duration of "
            f"{length} s: correct one of them"
        )
    if (changes := recording.get("transforms")) and any(source["type"] == "file" for source in sources):
        raise ValueError(
            f"{where}: field 'transforms' is {changes!r}, which changes the audio when it is read: save the changed "
            "audio (CutSet.save_audios)"
        )
    listed = recording.get("channel_ids")
    if listed is not None and not (isinstance(listed, list) and all(type(one) is int for one in listed)):
        raise ValueError(f"{where}: field 'channel_ids' is {listed!r}: give a list of channels, or leave it out")
    for source in sources:
        channels = source.get("channels")
        if not isinstance(channels, list) or not all(type(one) is int for one in channels) or channel not in channels:
            raise ValueError(f"{where}: field 'channels' is {channels!r}: give a list with the cut's channel {channel}")


def check_audio(entry: Entry, sample_rate: int) -> None:
    """Compare an entry with its audio file, or with the header found in an archive.

    Raises:
        UnreadableClip: the file is missing, has no readable header, or is shorter than the entry says.
        ValueError: sample rate or channels do not match those of training, or the path is unsafe.
    """
    if entry.sample_rate is not None and entry.sample_rate != sample_rate:
        raise ValueError(
            f"{entry.where}: field 'sampling_rate' is {entry.sample_rate}, but the dataset is read at "
            f"sample_rate={sample_rate} Hz: resample the audio, or set sample_rate and a model that takes it"
        )
    header, name = entry.header, entry.archived
    if entry.audio is not None:
        header, name = _header_of_file(entry.audio, entry.where), str(entry.audio)
    if header is None:
        return
    if header.sample_rate != sample_rate:
        raise ValueError(
            f"{entry.where}: {name} has {header.sample_rate} Hz, not sample_rate={sample_rate}: resample it"
        )
    if header.channels != entry.channels:
        raise ValueError(
            f"{entry.where}: {name} has {header.channels} channels, the manifest says {entry.channels}: "
            "convert it to mono or correct the manifest"
        )
    end = entry.start_seconds + entry.duration_seconds
    if end > header.duration_seconds + DURATION_TOLERANCE_SECONDS:
        raise UnreadableClip(
            f"{entry.where}: the cut ends at {end} s but {name} lasts {header.duration_seconds} s: "
            "the file is truncated or the manifest wrong"
        )
    recorded = entry.recorded_seconds
    if recorded is not None and abs(recorded - header.duration_seconds) > DURATION_TOLERANCE_SECONDS:
        raise UnreadableClip(
            f"{entry.where}: {name} lasts {header.duration_seconds} s, the manifest's recording {recorded} s: the file "
            "is not the one that the manifest was written for; write the manifest again"
        )


def _header_of_file(audio: Path, where: str) -> Header:
    refuse_unsafe_path(str(audio), where)
    if not audio.is_file():
        raise UnreadableClip(
            f"{where}: no audio file at {audio}: restore it or correct the manifest "
            "(paths are absolute or relative to the manifest's directory)"
        )
    try:
        found = info(audio)
    except AudioLoadingError as error:
        raise UnreadableClip(f"{where}: {audio} is not a readable audio file: replace it ({error})") from error
    return Header(found.samplerate, found.channels, found.duration)
