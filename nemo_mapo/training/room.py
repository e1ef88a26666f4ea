"""Errors for a full disk."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torch.distributed.checkpoint.api import CheckpointException

from nemo_mapo.console import Unavailable

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_SHORT_WRITE: Final = ("inline_container", "unexpected pos")
"""In what torch says when its archive is not where it should be after a write."""
_FAILED_WRITER: Final = "error: <class 'OSError'>"
"""All that Megatron-core 0.19 says of a writer's error; its log has the rest."""


class NoRoomLeft(Unavailable):
    """A file could not be written because the disk, a quota or a limit is full."""


@contextmanager
def no_room_in(directory: Path) -> Iterator[None]:
    """Turn the errors of a full disk into NoRoomLeft, which names `directory` and what to do; others pass.

    with no_room_in(run_directory):
        write_report(run_directory)
    """
    try:
        yield
    # Torch's own is not an Exception.
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = _full_disk(error)
        if not reason or isinstance(error, NoRoomLeft):
            raise
        raise NoRoomLeft(
            f"{directory}: {reason}. Earlier checkpoints are untouched: free some space, then "
            "continue with exp_manager.resume_if_exists=true"
        ) from error


def _full_disk(error: BaseException | None) -> str:
    """What is behind `error` if it is a full disk; Megatron's writers report theirs as a RuntimeError of torch."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return str(error.strerror)
        if all(word in str(error) for word in _SHORT_WRITE):
            return "No space left on device (a file could be written in part only)"
        if _FAILED_WRITER in str(error):
            return "a file could not be written, which is most often a full disk (the log has the writer's error)"
        error = error.__cause__ or error.__context__
    return ""
