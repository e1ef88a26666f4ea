"""Commands of examples/ in processes of their own that need not import anything first.

A command takes ten seconds to import torch, Megatron and NeMo, and often one to do its work. So it runs in a fork of
the process that the ranks of `support.ranks` are forks of, as `python examples/NAME ...` would run it: the
script itself as `__main__`, with its arguments, directory, environment, exit status, and a process id for signals.
Tests of what happens to the interpreter start a real one.
"""

import atexit
import contextlib
import multiprocessing.process
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from support import ranks

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
_LOOK_SECONDS = 0.02
_LAST_WORDS_SECONDS = 5


def environment(**changes: str) -> dict[str, str]:
    """One thread, no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


@dataclass(frozen=True)
class Command:
    """A command that has been started, with what it has printed so far in two files."""

    process: ForkServerProcess
    arguments: tuple[str, ...]
    out: Path
    err: Path

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and what it printed, when it has ended."""
        self.process.join()
        status = self.process.exitcode
        assert status is not None
        return subprocess.CompletedProcess(self.arguments, status, self.out.read_text(), self.err.read_text())

    def writers(self) -> list[Path]:
        """What of /proc still has its stderr open."""
        found = []
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            # Processes come and go meanwhile, and others' are not to be read.
            with contextlib.suppress(OSError):
                if descriptor.readlink() == self.err:
                    found.append(descriptor)
        return found

    def shown(self) -> str:
        """What it has written to stderr so far."""
        return self.err.read_text() if self.err.exists() else ""


def start(
    script: str,
    arguments: Sequence[object],
    folder: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Command:
    """Start `examples/<script>`; what it prints goes to two files in `folder`."""
    place = Path(tempfile.mkdtemp(dir=folder))
    out, err = place / "out", place / "err"
    given = (str(EXAMPLES / script), *map(str, arguments))
    process = ranks.context().Process(
        target=_become, args=(given, str(cwd or Path.cwd()), dict(env or environment()), str(out), str(err))
    )
    process.start()
    return Command(process, given, out, err)


def run(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `examples/<script>` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        return start(script, arguments, Path(folder), cwd=cwd).wait()


def checked(script: str, *arguments: object) -> str:
    """What it printed, when it did what it should."""
    ended = run(script, *arguments)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def run_on_ranks(number: int, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it on several processes, as torchrun does: the status of the first that fails, and what all of them print."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    shared |= {"LOCAL_WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = [
            start(script, arguments, Path(folder), env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank in range(number)
        ]
        running, status = list(started), 0
        while running:
            time.sleep(_LOOK_SECONDS)
            for command in [command for command in running if not command.process.is_alive()]:
                running.remove(command)
                if status == 0 and (status := command.process.exitcode or 0):
                    for other in running:
                        # The rank that says why may be a moment behind the one that says nothing.
                        other.process.join(timeout=_LAST_WORDS_SECONDS)
                        other.process.terminate()
        ended = [command.wait() for command in started]
        return subprocess.CompletedProcess(
            ended[0].args, status, "".join(one.stdout for one in ended), "".join(one.stderr for one in ended)
        )


def _become(arguments: Sequence[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = cwd
    os.environ.clear()
    os.environ.update(env)
    script = Path(arguments[0])
    sys.argv = list(arguments)
    # The test runner's own places are none of the command's.
    sys.path = [str(script.parent), *(place for place in sys.path if Path(place) not in (Path(), ROOT, ROOT / "tests"))]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
