"""A request from outside to end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def termination_request() -> Iterator[Callable[[], bool]]:
    """While active, SIGTERM asks the loop to save and end after the step in progress instead of killing it."""
    requested = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    previous = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGTERM, previous)
