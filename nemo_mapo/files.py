"""Atomic writes: a file or directory is either complete or absent."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

UNFINISHED: Final = ".unfinished"
"""Suffix of a file or directory name while it is being written."""


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file completely or not at all, creating its folder if needed; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    unfinished.write_text(text, encoding="utf-8")
    return unfinished.replace(path)


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yield an empty directory that is renamed to `final` if the block succeeds and removed if it fails.

        with whole_directory(output) as folder:
            (folder / "config.json").write_text(text)

    Leftovers of a killed process are removed.

    Raises:
        ValueError: `final` already exists or cannot be written, or another process is writing it.
    """
    if final.exists():
        raise ValueError(f"{final} already exists: remove it, or name another directory")
    unfinished = final.with_name(final.name + UNFINISHED)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        held = os.open(unfinished, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{final}: cannot write there ({error.strerror})") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise ValueError(f"{final}: another process is writing it; wait for it, or name another directory") from error
    try:
        for left in unfinished.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield unfinished
        unfinished.rename(final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(held)


def flush(path: Path) -> None:
    """Return once the content of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
