"""The train command, uninterrupted, killed and resumed, stopped politely."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from forked_commands import environment, run, start
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from tests.integration.tiny_run import STEPS, command, metrics, train, write_tiny_corpus

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
    best = [(path / "checkpoints" / "best").readlink() for path in (run_dir, other)]
    assert best[0] == best[1]


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


def wait_until(is_time, is_running):
    """Return once `is_time` says so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_time():
        assert is_running(), "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_when(arguments, folder, is_time):
    """Start the run and end it, without a word to it, once `is_time` says so of what it has printed.

    Nothing outlives it that could still write to its output.
    """
    started = start("train_mapo.py", arguments[2:], folder)
    wait_until(lambda: is_time(started.shown()), started.process.is_alive)
    started.process.kill()
    assert started.wait().returncode == -signal.SIGKILL
    wait_until(lambda: not started.writers(), lambda: True)


def test_a_run_leaves_everything_a_user_looks_for(uninterrupted):
    records = metrics(uninterrupted)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert {"rollout/accuracy", "train/loss", "mapo/audio_mass", "timing/pos_gate_seconds"} <= records[-1].keys()
    assert "val/accuracy_silent" in records[0] and "val/accuracy_silent" in records[-1]
    assert (uninterrupted / "report.html").stat().st_size > 10_000
    best = json.loads((uninterrupted / "run.json").read_text())["best_checkpoint"]
    assert best["value"] == max(
        record["val/accuracy"] for record in records if "val/accuracy" in record and record["step"]
    )
    assert (uninterrupted / "checkpoints" / "best" / "trainer_state.json").is_file()
    assert f"checkpoints/best is {best['name']}" in (uninterrupted / "report.html").read_text()
    facts = json.loads((uninterrupted / "run.json").read_text())
    test = facts["test"]
    questions = [json.loads(line) for line in (uninterrupted / "test.jsonl").read_text().splitlines()]
    assert len(questions) == test["samples"] == len({record["id"] for record in questions})
    for key, summed in (("correct", "accuracy"), ("silent", "accuracy_silent"), ("start_correct", "start_accuracy")):
        assert sum(record[key] for record in questions) / len(questions) == test[summed]
    assert facts["finished"] and 'http-equiv="refresh"' not in (uninterrupted / "report.html").read_text()
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
    kill_when(command(corpus, run_dir), tmp_path, lambda shown: MOMENTS[moment](run_dir))
    assert "finished" not in json.loads((run_dir / "run.json").read_text()), "the page would stop to load itself"
    resumed = train(corpus, run_dir, RESUME)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_end(run_dir, uninterrupted)


def test_ctrl_c_saves_says_so_in_one_line_and_exits_cleanly(corpus, uninterrupted, tmp_path):
    run_dir = tmp_path / "stopped"
    shown = tmp_path / "shown"
    with shown.open("w") as stderr:
        process = subprocess.Popen(
            command(corpus, run_dir), env=environment(), stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
        )
    wait_until(lambda: recorded_lines(run_dir) >= 2, lambda: process.poll() is None)
    # As a terminal does it: to the run and all its processes.
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    said = [line for line in shown.read_text().splitlines() if line and "step/s" not in line and "s/step" not in line]
    assert len(said) == 1 and said[0].startswith("Ctrl-C: the run ends after the step in progress, its state is saved")
    saved = [path for path in Path(run_dir / "checkpoints").iterdir()]
    assert saved and not any(path.name.endswith(".unfinished") for path in saved)
    assert json.loads((run_dir / "run.json").read_text())["events"]
    resumed = train(corpus, run_dir, RESUME)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_end(run_dir, uninterrupted)


def warm_started(corpus, run_dir, *overrides):
    """The train command with a warm start of a few steps, cached beside the run."""
    from_noise = command(corpus, run_dir, f"warm_start.cache_dir={run_dir}-cache", *overrides)
    stages = "warm_start.stages=[{target:reasoning,steps:12,batch_size:8}]"
    return [*(part for part in from_noise if part != "~warm_start"), stages, "trainer.mapo.max_steps=2"]


def test_a_run_killed_in_its_warm_start_ends_as_one_that_was_not(corpus, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(warm_started(corpus, killed), tmp_path, lambda shown: re.search(r"warm start.* [1-9]/12 ", shown))
    assert recorded_lines(killed) == 0
    for run_dir in (killed, whole):
        finished = run("train_mapo.py", *warm_started(corpus, run_dir, RESUME)[2:])
        assert finished.returncode == 0, finished.stderr[-3000:]
    assert timeless(metrics(killed)) == timeless(metrics(whole))


def test_a_run_that_makes_its_warm_start_ends_as_one_that_finds_it(corpus, tmp_path):
    for run_dir in (tmp_path / "makes", tmp_path / "finds"):
        shared = f"warm_start.cache_dir={tmp_path / 'cache'}"
        finished = run("train_mapo.py", *warm_started(corpus, run_dir, shared)[2:])
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert ("warm start:" in finished.stderr) == (run_dir.name == "makes")
    assert timeless(metrics(tmp_path / "makes")) == timeless(metrics(tmp_path / "finds"))
