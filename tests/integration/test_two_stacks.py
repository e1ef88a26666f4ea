"""A run that was saved with one set of versions goes on with the other: docs/versions.md."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.tiny_run import ROOT, command, environment, metrics, write_tiny_corpus

SETS = {name: ROOT / name / "bin" / "python" for name in (".venv", ".venv-next")}
SAVED, STEPS = 2, 4
RELATIVE, ABSOLUTE = 1e-5, 1e-8
"""The second is for the KL loss, which is 1e-6 after two steps."""
FIGURES = ("train/loss", "train/kl_loss", "train/attention_loss", "mapo/audio_mass", "rollout/reward_mean")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(python.is_file() for python in SETS.values()),
        reason="needs both environments: make env, make env STACK=next",
    ),
]


def train(python: Path, corpus: Path, run_dir: Path) -> None:
    steps = f"trainer.mapo.max_steps={STEPS}"
    arguments = command(corpus, run_dir, steps, "exp_manager.resume_if_exists=true")[1:]
    finished = subprocess.run(
        [str(python), *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.mark.parametrize(("saves", "resumes"), [(".venv", ".venv-next"), (".venv-next", ".venv")])
def test_a_run_goes_on_with_the_other_set_as_if_nothing_had_changed(tmp_path, corpus, saves, resumes) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(SETS[saves], corpus, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{STEPS:06d}")
    train(SETS[resumes], corpus, resumed)
    expected, found = metrics(whole), metrics(resumed)
    assert [record["step"] for record in found] == [record["step"] for record in expected] == list(range(STEPS + 1))
    # The first record has validation only; those after the save are of the other set.
    for one, other in zip(expected[SAVED + 1 :], found[SAVED + 1 :], strict=True):
        for name in FIGURES:
            assert other[name] == pytest.approx(one[name], rel=RELATIVE, abs=ABSOLUTE), name
