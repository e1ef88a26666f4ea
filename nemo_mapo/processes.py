"""A process among those it was started with, without torch: its rank, and how it ends together with them."""

import ctypes
import functools
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"


def is_main_rank() -> bool:
    """Whether this is rank 0, which writes the run directory and talks to the user; torchrun and SLURM say so."""
    return int(os.environ.get("RANK", "0")) == 0


def end_with_parent(signal_number: int) -> None:
    """Ask the kernel to send this process `signal_number` when the thread that started it ends; Linux only.

    It survives exec, so it serves as `preexec_fn` of what is started with subprocess:

        subprocess.Popen(command, preexec_fn=functools.partial(end_with_parent, signal.SIGTERM))
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)


@functools.cache
def lead_processes() -> None:
    """Make all later forks of this process end with it, and this process with torchrun if that started it.

    The forks are checkpoint writers and dataloader workers. They ignore Ctrl-C, which a terminal sends to them as
    well, and leave it to this process. A rank gets a SIGTERM when torchrun dies, so it saves before it exits.
    """
    if is_rank_of_torchrun():
        end_with_parent(signal.SIGTERM)
    # Loaded before the fork: there, loading may wait for a lock that no thread is left to release.
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    leader = os.getpid()

    def remember_leader() -> None:
        nonlocal leader
        leader = os.getpid()

    def follow() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if library is None:
            return
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != leader:
            os._exit(1)

    os.register_at_fork(before=remember_leader, after_in_child=follow)


def is_rank_of_torchrun() -> bool:
    """Whether torchrun started this process."""
    return _LAUNCHED_BY_TORCHRUN in os.environ
