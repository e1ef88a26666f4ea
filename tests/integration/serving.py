"""`python examples/serve_rollouts.py` as a process beside a test."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.tiny_run import ROOT, environment


@contextmanager
def serving_command(tokenizer: Path, sync_dir: Path, port: int, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    """The command with a model of the overrides; it takes connections when this yields, and is killed at the end."""
    command = [
        sys.executable,
        str(ROOT / "examples" / "serve_rollouts.py"),
        f"data.tokenizer={tokenizer}",
        f"serving.sync_dir={sync_dir}",
        f"serving.port={port}",
        "trainer.num_threads=1",
        *overrides,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=sync_dir)
    try:
        assert process.stdout is not None
        assert any(line.startswith("serving at") for line in process.stdout), "the server ended before it served"
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port
