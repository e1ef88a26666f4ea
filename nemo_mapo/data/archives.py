"""NeMo's tarred corpora: sharded manifests, and archives whose members they name."""

import io
import math
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoTarredIterator

from nemo_mapo.config.input_cfg import Source, located
from nemo_mapo.data.entries import Entry, Header, lines_of, manifest_files, nemo_entry

_MANIFEST_SHARD = re.compile(r"manifest[^/]*_(\d+)[^/]*\.json")
_ARCHIVE_SHARD = re.compile(r"audio[^/]*_(\d+)[^/]*\.tar")
_SEGMENT = re.compile(r"^(?P<stem>.+)-sub\d+(?P<extension>\.\w+)?$")
"""How NeMo finds numbers of shards, and the member that a line about a part of it belongs to (`clip-sub2.wav`)."""

Line = tuple[str, dict[str, Any]]


class Shard(NamedTuple):
    """An archive and the lines about it."""

    archive: Path
    manifest: Path
    lines: Iterable[Line]


class CheckedTarredIterator(LazyNeMoTarredIterator):  # type: ignore[misc]
    """NeMo's reader, but it refuses what NeMo would skip: damaged archives, and lines without a member."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        listed: Any = self.paths
        # NeMo looks up the manifest of a shard by its number, as if shards were always numbered from 0.
        self.paths: Any = dict(zip(self.shard_id_to_manifest, listed, strict=True)) if len(listed) > 1 else listed

    def _iter_sequential(
        self, tar_path: str, shard_manifest: Mapping[str, Any], manifest_path: str, *newer: Any
    ) -> Iterator[Any]:
        # NeMo 3 passes a random generator too.
        seen = set()
        try:
            for data, raw_audio, member in super()._iter_sequential(tar_path, shard_manifest, manifest_path, *newer):
                seen.add(member.name)
                header_of(io.BytesIO(raw_audio), f"{tar_path}: member {member.name}")
                yield data, raw_audio, member
        except tarfile.TarError as error:
            raise _damaged(Path(tar_path), error) from error
        _refuse_lost(
            [name for name, lines in shard_manifest.items() if name not in seen and not _skipped(lines)],
            Path(tar_path),
            str(manifest_path),
        )


def tarred_entries(source: Source) -> Iterator[Entry]:
    """The lines of a tarred corpus, each with the header of its member; ValueError if archive and lines disagree."""
    for manifests, archives, _ in located(source.item):
        assert archives is not None, "check_items has seen to it"
        for shard in shards(manifests, archives, source.where):
            yield from _entries_of(shard, spare_members=bool(source.item.get("skip_missing_manifest_entries", False)))


def shards(manifests: str, archives: str, where: str) -> list[Shard]:
    """Manifests and archives by shard, in order; ValueError if they do not cover the same shards.

    One manifest may be about all archives: its lines then say `shard_id`.
    """
    paths = manifest_files(manifests, where, "manifest_filepath")
    tars = _numbered(manifest_files(archives, where, "tarred_audio_filepaths"), _ARCHIVE_SHARD, "audio_0.tar", where)
    if len(paths) == 1:
        by_shard: dict[int, list[Line]] = defaultdict(list)
        for place, record in lines_of(paths[0]):
            if not isinstance(number := record.get("shard_id"), int):
                raise ValueError(
                    f"{place}: field 'shard_id' is {number!r}: one manifest for all archives needs the number of the "
                    "archive in each line"
                )
            by_shard[number].append((place, record))
        _refuse_other_shards(set(by_shard), set(tars), where)
        return [Shard(tars[number], paths[0], by_shard[number]) for number in sorted(tars)]
    numbered = _numbered(paths, _MANIFEST_SHARD, "manifest_0.json", where)
    _refuse_other_shards(set(numbered), set(tars), where)
    return [Shard(tars[number], numbered[number], lines_of(numbered[number])) for number in sorted(tars)]


def header_of(audio: Any, where: str) -> Header:
    """The header of an open audio file; ValueError if it has none."""
    try:
        found = soundfile.info(audio)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{where} is not readable audio: write the archive again ({error})") from error
    return Header(found.samplerate, found.channels, found.duration)


def headers_of(archive: Path, *, no_audio: frozenset[str] = frozenset()) -> dict[str, Header]:
    """The header of each member by name, except for suffixes in `no_audio`; ValueError for a damaged one."""
    found = {}
    try:
        with tarfile.open(archive) as tar:
            plain_size = archive.stat().st_size if isinstance(tar.fileobj, io.BufferedReader) else math.inf
            for member in tar:
                if member.offset_data + member.size > plain_size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if Path(member.name).suffix in no_audio:
                    continue
                if not member.isfile():
                    raise ValueError(f"{archive}: member {member.name} is not a regular file: write the archive again")
                file = tar.extractfile(member)
                assert file is not None, "a plain file"
                found[member.name] = header_of(file, f"{archive}: member {member.name}")
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(archive, error) from error
    return found


def _entries_of(shard: Shard, *, spare_members: bool) -> Iterator[Entry]:
    headers = headers_of(shard.archive)
    lost, named = [], set()
    for place, record in shard.lines:
        if _skipped([record]):
            named.add(_member(record.get("audio_filepath", "")))
            continue
        entry = nemo_entry(record, place, shard.manifest)
        member = _member(record["audio_filepath"])
        named.add(member)
        if "-sub" in record["audio_filepath"] and member != record["audio_filepath"] and "id" not in record:
            raise ValueError(f"{place}: several lines are about parts of {member}: give each an 'id'")
        if member not in headers:
            lost.append(member)
            continue
        name = f"{member} in {shard.archive}"
        yield replace(entry, audio=None, header=headers[member], archived=name)
    _refuse_lost(lost, shard.archive, str(shard.manifest))
    if not spare_members and (spare := sorted(set(headers) - named)):
        raise ValueError(
            f"{shard.archive}: members {', '.join(spare[:3])}{', ...' if len(spare) > 3 else ''} have no line in "
            f"{shard.manifest}: set skip_missing_manifest_entries=true on the item if they were left out on purpose"
        )


def _numbered(paths: list[Path], pattern: re.Pattern[str], example: str, where: str) -> dict[int, Path]:
    numbered: dict[int, Path] = {}
    for path in paths:
        found = pattern.search(str(path))
        if found is None:
            raise ValueError(f"{where}: no shard number in the name {path}: NeMo needs names like {example}")
        if int(found[1]) in numbered:
            raise ValueError(f"{where}: {path} and {numbered[int(found[1])]} are both shard {found[1]}")
        numbered[int(found[1])] = path
    return numbered


def _refuse_other_shards(manifests: set[int], archives: set[int], where: str) -> None:
    if manifests != archives:
        raise ValueError(
            f"{where}: manifests are of shards {sorted(manifests)}, archives of {sorted(archives)}: correct "
            "manifest_filepath or tarred_audio_filepaths"
        )


def _refuse_lost(members: list[str], archive: Path, manifest: str) -> None:
    if members:
        raise ValueError(
            f"{manifest}: {', '.join(members[:3])}{', ...' if len(members) > 3 else ''} not in {archive}: NeMo would "
            "leave these lines out; delete them, or write the archive again"
        )


def _damaged(archive: Path, error: BaseException) -> ValueError:
    return ValueError(f"{archive}: damaged archive: write it again ({error})")


def _member(audio_filepath: str) -> str:
    found = _SEGMENT.match(audio_filepath)
    return audio_filepath if found is None else found["stem"] + (found["extension"] or "")


def _skipped(lines: list[dict[str, Any]]) -> bool:
    """Whether NeMo skips all of these lines."""
    return all(line.get("_skipme", False) for line in lines)
