"""Checksums of a directory's files, written beside them and compared when the files are read again.

They detect damage by a disk, a network or a copy, not deliberate changes.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import xxhash

from nemo_mapo.files import flush, write_text

CHECKSUMS: Final = "checksums.json"
_ALGORITHM: Final = "xxh3_128"
_BLOCK_BYTES: Final = 1 << 22


def checksum(path: Path) -> str:
    """Checksum of a file, read block by block."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def files_to_sum(directory: Path) -> list[Path]:
    """Files of a directory to checksum, sorted: all of them except `checksums.json`."""
    return sorted(path for path in directory.iterdir() if path.name != CHECKSUMS)


def checksums_of(files: Iterable[Path]) -> dict[str, str]:
    """Checksum of each file by its name."""
    return {path.name: checksum(path) for path in files}


def write_checksums(directory: Path, sums: Mapping[str, str]) -> None:
    """Write `checksums.json` beside the files and flush it to the disk."""
    content = {
        "algorithm": _ALGORITHM,
        "files": {name: {"bytes": (directory / name).stat().st_size, "checksum": sums[name]} for name in sorted(sums)},
    }
    flush(write_text(directory / CHECKSUMS, json.dumps(content, indent=2) + "\n"))


def damage(directory: Path, *, part: int = 0, parts: int = 1) -> str:
    """Describe the first file that differs from its checksum; empty if none does or the directory has no checksums.

    Args:
        directory: holds the files and, if it was written with checksums, `checksums.json`.
        part: index of this call's share of the files, every `parts`-th one; the sizes of all files are compared.
        parts: number of calls that share the reading.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return ""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        known = written["algorithm"] == _ALGORITHM
        sums = {str(name): (int(entry["bytes"]), str(entry["checksum"])) for name, entry in written["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path} is not a list of checksums: {error!r}"
    if not known:
        return f"{path} uses a checksum algorithm other than {_ALGORITHM}"
    for name, (size, _) in sorted(sums.items()):
        if not (directory / name).is_file():
            return f"{directory / name} is missing"
        if (found := (directory / name).stat().st_size) != size:
            return f"{directory / name} has {found} bytes, but {size} were written"
    for name, (_, expected) in sorted(sums.items())[part::parts]:
        if checksum(directory / name) != expected:
            return f"{directory / name} differs from what was written"
    return ""
