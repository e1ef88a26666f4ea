"""Allowed sources of audio: files, and members of archives.

A manifest is untrusted. Lhotse runs a source of type `command` in a shell, fetches a `url`, and passes the names of
SPHERE and Opus files to a shell unquoted; opening a manifest must never cause any of that.
"""

import shlex
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any, Final

from lhotse import Recording

_DECODED: Final = frozenset({"file", "memory"})
"""Types of source when audio is decoded; `memory` is what a Shar or tar archive was read into."""
_THROUGH_A_SHELL: Final = frozenset({".sph", ".opus"})
_COMMAND_PREFIX: Final = "pipe:"


def refuse_unsafe_source(source: Mapping[str, Any], where: str, *, allowed: Collection[str]) -> None:
    """ValueError, naming type or path, for a Lhotse audio source that reading could turn into a command or a download.

        refuse_unsafe_source({"type": "command", "source": "touch x"}, "cuts.jsonl:1", allowed={"file"})  # ValueError

    Args:
        source: type and source, as in a manifest.
        where: begins the message.
        allowed: types that are read here.
    """
    kind = source.get("type")
    if not isinstance(kind, str) or kind not in allowed:
        raise ValueError(
            f"{where}: audio source of type {kind!r}: only {', '.join(sorted(allowed))} is read here, because others "
            "run commands or reach the network; save the audio as files"
        )
    if kind == "file":
        refuse_unsafe_path(source.get("source"), where)


def refuse_unsafe_path(path: Any, where: str) -> None:
    """ValueError for a path that a decoder would hand to a shell together with what else it says."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{where}: audio path is {path!r}: give the path of a file")
    if path.startswith(_COMMAND_PREFIX):
        raise ValueError(f"{where}: audio path {path!r} is a command, not a file: save the audio as files")
    if PurePath(path).suffix.lower() in _THROUGH_A_SHELL and shlex.quote(path) != path:
        raise ValueError(
            f"{where}: audio path {path!r} has characters that mean something to the shell which decodes "
            f"{PurePath(path).suffix} files: rename the file, or convert it to FLAC"
        )


def refuse_unsafe_recording(recording: Recording, where: str) -> None:
    """`refuse_unsafe_source` for every source of a recording that is about to be decoded."""
    for source in recording.sources:
        refuse_unsafe_source({"type": source.type, "source": source.source}, where, allowed=_DECODED)
