"""The train command, uninterrupted, killed and resumed, stopped politely."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from nemo_mapo.platform import initialize_parallel, install_cpu_host
from tests.integration.tiny_run import STEPS, command, environment, metrics, train, write_tiny_corpus

pytestmark = pytest.mark.integration
RESUME = "exp_manager.resume_if_exists=true"
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finished = train(corpus, run_dir)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run_dir


def final_tensors(run_dir):
    install_cpu_host()
    initialize_parallel()
    return dist_checkpointing.load_plain_tensors(str(run_dir / "checkpoints" / f"step_{STEPS:06d}"))


def assert_same_end(run_dir, other):
    """Weights and optimiser state are equal bit for bit, and so are the records (but for times)."""
    left, right = flatten(final_tensors(run_dir)), flatten(final_tensors(other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert timeless(metrics(run_dir)) == timeless(metrics(other))
    samples = [(path / "rollouts.jsonl").read_text() for path in (run_dir, other)]
    assert samples[0] == samples[1]


def flatten(tensors, prefix=""):
    found = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
    assert found or prefix
    return found


def timeless(records):
    return [
        {k: v for k, v in record.items() if not k.startswith("timing/") and k != "rollout/tokens_per_second"}
        for record in records
    ]


def start_and_wait(corpus, run_dir, is_time, *overrides):
    """Start the run and return its process once `is_time` says so."""
    process = subprocess.Popen(
        command(corpus, run_dir, *overrides), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_time():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def test_a_run_leaves_everything_a_user_looks_for(uninterrupted):
    records = metrics(uninterrupted)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert {"rollout/accuracy", "train/loss", "mapo/audio_mass", "timing/pos_gate_seconds"} <= records[-1].keys()
    assert "val/accuracy_silent" in records[0] and "val/accuracy_silent" in records[-1]
    assert (uninterrupted / "report.html").stat().st_size > 10_000
    assert "accuracy_silent" in json.loads((uninterrupted / "run.json").read_text())["test"]
    assert list(uninterrupted.rglob("events.out.tfevents*"))
    assert (uninterrupted / "config.yaml").read_text().startswith("seed: 1234")
    assert {json.loads(line)["split"] for line in (uninterrupted / "rollouts.jsonl").open()} >= {"train", "validation"}


def test_a_second_run_in_the_same_directory_is_refused(corpus, uninterrupted):
    again = train(corpus, uninterrupted)
    assert again.returncode != 0
    assert "already holds a run" in again.stdout + again.stderr


MOMENTS = {
    "between two checkpoints": lambda run: recorded_lines(run) >= 4,
    "while a checkpoint is written": lambda run: (run / "checkpoints" / "step_000004.unfinished").exists(),
    "while the test split is evaluated": lambda run: (run / "checkpoints" / f"step_{STEPS:06d}").exists(),
}


def recorded_lines(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_with_the_same_weights_when_it_is_resumed(corpus, uninterrupted, tmp_path, moment):
    run_dir = tmp_path / "killed"
    process = start_and_wait(corpus, run_dir, lambda: MOMENTS[moment](run_dir))
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = train(corpus, run_dir, RESUME)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_end(run_dir, uninterrupted)


def test_sigterm_saves_and_exits_cleanly(corpus, uninterrupted, tmp_path):
    run_dir = tmp_path / "stopped"
    process = start_and_wait(corpus, run_dir, lambda: recorded_lines(run_dir) >= 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    saved = [path for path in Path(run_dir / "checkpoints").iterdir()]
    assert saved and not any(path.name.endswith(".unfinished") for path in saved)
    assert json.loads((run_dir / "run.json").read_text())["events"]
    resumed = train(corpus, run_dir, RESUME)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_end(run_dir, uninterrupted)
