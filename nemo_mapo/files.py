"""Files and directories that are either whole or not there."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

UNFINISHED: Final = ".unfinished"
"""End of the name that something has while it is written."""


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file whole or not at all; its folder is made if it is not there. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    unfinished.write_text(text, encoding="utf-8")
    return unfinished.replace(path)


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """An empty directory that gets the name `final` if the block ends well, and is removed if not.

        with whole_directory(output) as folder:
            (folder / "config.json").write_text(text)

    What a killed process has left of it is replaced.

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
    """Return when the content of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
