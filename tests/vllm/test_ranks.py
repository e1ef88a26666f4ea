"""A trainer whose model is cut over ranks learns from a real, whole server what one process learns from it."""

import json
from pathlib import Path

import pytest

from nemo_mapo.rollout.vllm.backend import VllmRollout
from tests.integration.tiny_run import FIGURES, metrics, train_on_ranks, write_tiny_corpus
from tests.integration.trainers import fit, trainer_of
from tests.vllm.serving import MODEL, asking

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

STEPS = 2
OPTIMIZER_STEPS = 2
"""Of a rollout batch: 4 prompts x 2 completions, 4 at a time."""
COURSE = (f"trainer.mapo.max_steps={STEPS}", "model.optim.lr=1e-4", "model.optim.sched.warmup_steps=0")
"""Weights that have moved so far after a step that samples of the ones before would be noticed."""
SAME_TO = {"rel": 1e-3, "abs": 1e-6}
MISMATCH_NATS = 1e-5
"""Rounding."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture(scope="module")
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights that are the same in every layout."""
    run_dir = tmp_path_factory.mktemp("runs") / "start"
    assert fit(trainer_of(corpus, run_dir, *MODEL, "trainer.mapo.max_steps=1"))
    return f"pretrained_checkpoint.restore_from_path={run_dir}/checkpoints/step_000001"


@pytest.fixture
def overrides(start: str, shared: VllmRollout, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a run with a server that is there."""
    return [start, *COURSE, *asking(shared, monkeypatch)]


@pytest.fixture(scope="module")
def one_process(corpus: Path, start: str, shared: VllmRollout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patched:
        assert fit(trainer_of(corpus, run_dir, start, *COURSE, *asking(shared, patched)))
    return run_dir


def run_on_two_ranks(corpus: Path, run_dir: Path, *overrides: str) -> None:
    once = ("trainer.mapo.val_check_interval=0", "data.test_ds=null")
    finished = train_on_ranks(2, corpus, run_dir, *once, *overrides)
    assert finished.returncode == 0, finished.stderr[-3000:]


def assert_same_figures(run_dir: Path, other_dir: Path) -> None:
    records, others = metrics(run_dir), metrics(other_dir)
    assert [record["step"] for record in records] == [record["step"] for record in others] == list(range(1, STEPS + 1))
    for record, other in zip(records, others, strict=True):
        for name in FIGURES:
            assert record[name] == pytest.approx(other[name], **SAME_TO), (record["step"], name)


def samples(run_dir: Path) -> list[tuple[int, int, str]]:
    """Step, version of the weights and text of every written sample."""
    lines = (run_dir / "rollouts.jsonl").read_text().splitlines()
    return [(record["step"], record["weight_version"], record["text"]) for record in map(json.loads, lines)]


@pytest.mark.parametrize(
    "cut",
    [
        ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        ("model.pipeline_model_parallel_size=2",),
    ],
    ids=["tensor 2, sequence", "pipeline 2"],
)
def test_two_ranks_learn_from_a_server_what_one_learns(
    corpus: Path, overrides: list[str], one_process: Path, tmp_path: Path, cut: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "two"
    run_on_two_ranks(corpus, run_dir, *overrides, *cut)
    assert_same_figures(run_dir, one_process)
    assert all(record["rollout/log_prob_mismatch"] < MISMATCH_NATS for record in metrics(run_dir))
    assert samples(run_dir) == samples(one_process)
    assert {sample[:2] for sample in samples(run_dir)} == {(step + 1, step * OPTIMIZER_STEPS) for step in range(STEPS)}


def test_two_ranks_of_a_sharded_model_generate_ahead_as_one_does(
    corpus: Path, overrides: list[str], tmp_path: Path
) -> None:
    ahead = ("objective.behaviour_clip=2", "trainer.mapo.generation.type=one_ahead")
    assert fit(trainer_of(corpus, tmp_path / "one", *overrides, *ahead))
    run_on_two_ranks(corpus, tmp_path / "two", *overrides, *ahead, "model.tensor_model_parallel_size=2")
    assert_same_figures(tmp_path / "two", tmp_path / "one")
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    assert [record["rollout/staleness"] for record in metrics(tmp_path / "two")] == [0.0, 1.0]
