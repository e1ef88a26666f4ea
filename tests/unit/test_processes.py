"""Helper processes end with their leader, and what a signal asks of a loop."""

import signal
import subprocess
import sys

import pytest

from nemo_mapo.console import interrupt_quietly
from nemo_mapo.training.termination import termination_request

PATIENCE_SECONDS = 60
LEADER = """
import functools, multiprocessing, signal, subprocess, sys, time
from nemo_mapo.processes import end_with_parent, lead_processes
lead_processes()
multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
ends = functools.partial(end_with_parent, signal.SIGTERM)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=ends)
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_nothing_outlives_a_killed_leader() -> None:
    leader = subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE)
    assert leader.stdout is not None and leader.stdout.readline() == b"started\n"
    leader.kill()
    # The pipe ends when nobody is left who could write to it.
    assert leader.communicate(timeout=PATIENCE_SECONDS) == (b"", None)


def test_ctrl_c_is_one_line_and_a_second_one_needs_no_handler(capfd) -> None:
    before = signal.getsignal(signal.SIGINT)
    with termination_request("it ends soon") as requested:
        assert not requested()
        signal.raise_signal(signal.SIGINT)
        assert requested()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err == "\nit ends soon\n"


def test_under_torchrun_one_ctrl_c_arrives_twice(capfd, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with termination_request("it ends soon") as requested:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert requested()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert capfd.readouterr().err == "\nit ends soon\n"


def test_sigterm_asks_without_a_word_however_often(capfd) -> None:
    with termination_request("it ends soon") as requested:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert requested()
    assert capfd.readouterr().err == ""


def test_a_script_that_is_interrupted_says_so_in_one_line(capfd, monkeypatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    interrupt_quietly()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capfd.readouterr().err == "interrupted\n"
    sys.excepthook(ValueError, ValueError("kept"), None)
    assert "ValueError: kept" in capfd.readouterr().err
