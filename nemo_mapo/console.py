"""What a user sees on the terminal: our own messages and progress bars, not the start-up chatter of upstream."""

import logging
import os
import sys
import warnings
from types import TracebackType

from nemo_mapo.processes import is_main_rank

_CHATTY = (
    "datasets",
    "lightning.pytorch",
    "megatron",
    "nv_one_logger",  # NeMo 3's telemetry, to which nothing is sent
    "torch.distributed",
    "torch.utils.cpp_extension",
)
_LIGHTNING_AT_START = ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero")
"""Loggers that announce the devices; the one in use is that of the package imported last. Listed by name because
Lightning resets the levels of their parents when it is imported, possibly after `quiet_upstream`."""


class Unavailable(RuntimeError):
    """A required server is unreachable; the message says which, and what to do."""


def quiet_upstream() -> None:
    """Hide upstream's warnings and info messages; errors stay. Set PYTHONWARNINGS=default to see everything.

    NeMo's log files in the run directory are as quiet as the terminal; our messages use the logger `nemo_mapo`.
    """
    interrupt_quietly()
    if os.environ.get("PYTHONWARNINGS"):
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    for name in (*_CHATTY, *_LIGHTNING_AT_START):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Imports reset filters; NeMo also shows Python's warnings itself.
    warnings.simplefilter("ignore")


def interrupt_quietly() -> None:
    """Answer Ctrl-C with one line instead of a traceback; the process still ends as interrupted."""
    before = sys.excepthook

    def one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, traceback)
        elif is_main_rank():
            print("interrupted", file=sys.stderr)

    sys.excepthook = one_line


def show_own_messages() -> logging.Logger:
    """Print this package's log messages on the terminal, each once; of several ranks only the main one prints."""
    logger = logging.getLogger("nemo_mapo")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if is_main_rank() else logging.CRITICAL)
    return logger
