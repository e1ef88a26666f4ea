"""Handling of SIGTERM and Ctrl-C."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from nemo_mapo.processes import is_main_rank, is_rank_of_torchrun

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_STDERR: Final = 2


@contextmanager
def termination_request(notice: str) -> Iterator[Callable[[], bool]]:
    """While active, SIGTERM and Ctrl-C ask the loop to save and end after the step in progress.

    A second Ctrl-C ends the process at once, even if it hangs. torchrun forwards a Ctrl-C that the terminal has already
    sent to its ranks; under torchrun a later SIGTERM, sent when torchrun itself is ended, ends the ranks at once.

    Args:
        notice: printed once on Ctrl-C.
    """
    requested = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if number == signal.SIGINT and not requested and is_main_rank():
            # Not print: the main thread may be in the middle of a print.
            os.write(_STDERR, f"\n{notice}\n".encode())
        requested = True
        if number == signal.SIGINT:
            forwarded = is_rank_of_torchrun()
            signal.signal(signal.SIGTERM if forwarded else signal.SIGINT, signal.SIG_DFL)

    previous = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
