"""`python examples/serve_rollouts.py` as a process beside a test, and runs that use it."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir

from nemo_mapo.config.load import register_defaults, validate
from nemo_mapo.launch import Assembly
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.run_directory import RunDirectory
from nemo_mapo.training.trainer import MapoTrainer
from tests.integration.tiny_run import ROOT, TINY_MODEL, command, environment

MODEL = [
    "model.perception.channels=16",
    "model.target_layers=[1]",
    *(override for override in TINY_MODEL if override.startswith("model.decoder.")),
]


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


def served(port: int, sync_dir: Path) -> list[str]:
    """Overrides of a run whose rollouts come from that server."""
    return [
        "rollout=server",
        "rollout.sampling.max_new_tokens=8",
        f"rollout.server.urls=[http://127.0.0.1:{port}]",
        f"rollout.server.sync_dir={sync_dir}",
        "rollout.server.max_attempts=3",
        "rollout.server.pause_seconds=0.05",
    ]


def trainer_of(corpus: Path, run_dir: Path, *overrides: str) -> MapoTrainer:
    """The trainer of a run of four steps, in this process."""
    install_cpu_host()
    initialize_parallel()
    register_defaults()
    once = ["trainer.mapo.val_check_interval=0", "trainer.mapo.max_steps=4", "data.test_ds=null"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = validate(compose("train_mapo", overrides=[*command(corpus, run_dir)[2:], *once, *overrides]))
    run_dir.mkdir(parents=True, exist_ok=True)
    return Assembly(config, RunDirectory(path=run_dir)).trainer


def fit(trainer: MapoTrainer) -> bool:
    """Train; what `MapoTrainer.fit` says."""
    trainer.run_timer.start_time()
    return trainer.fit()
