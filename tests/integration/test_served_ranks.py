"""A trainer whose model is cut over ranks learns from a real, whole server what one process learns from it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.serving import MODEL, fit, free_port, served, serving_command, trainer_of
from tests.integration.tiny_run import metrics, train_on_ranks, write_tiny_corpus

pytestmark = [pytest.mark.integration, pytest.mark.distributed]

STEPS = 2
OPTIMIZER_STEPS = 2
"""Of a rollout batch: 4 prompts x 2 completions, 4 at a time."""
COURSE = (f"trainer.mapo.max_steps={STEPS}", "model.optim.lr=1e-4", "model.optim.sched.warmup_steps=0")
"""Weights that have moved so far after a step that samples of the ones before would be noticed."""
SAME_TO = {"rel": 1e-3, "abs": 1e-6}
MISMATCH_NATS = 1e-5
"""Rounding."""
FIGURES = (
    "train/loss",
    "train/policy_loss",
    "train/kl_loss",
    "train/attention_loss",
    "train/grad_norm",
    "mapo/audio_mass",
    "mapo/mask_max",
    "rollout/reward_mean",
    "rollout/completion_tokens",
    "rollout/accuracy",
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture(scope="module")
def overrides(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Those of a run with a server that is there, from weights that are the same in every layout."""
    run_dir = tmp_path_factory.mktemp("runs") / "start"
    assert fit(trainer_of(corpus, run_dir, "trainer.mapo.max_steps=1"))
    start = f"pretrained_checkpoint.restore_from_path={run_dir}/checkpoints/step_000001"
    sync_dir, port = tmp_path_factory.mktemp("weights"), free_port()
    with serving_command(corpus / "tokenizer", sync_dir, port, *MODEL):
        yield [start, *COURSE, *served(port, sync_dir)]


@pytest.fixture(scope="module")
def one_process(corpus: Path, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    assert fit(trainer_of(corpus, run_dir, *overrides))
    return run_dir


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
    once = ("trainer.mapo.val_check_interval=0", "data.test_ds=null")
    finished = train_on_ranks(2, corpus, run_dir, *once, *overrides, *cut)
    assert finished.returncode == 0, finished.stderr[-3000:]
    records, others = metrics(run_dir), metrics(one_process)
    assert [record["step"] for record in records] == [record["step"] for record in others] == list(range(1, STEPS + 1))
    for record, other in zip(records, others, strict=True):
        for name in FIGURES:
            assert record[name] == pytest.approx(other[name], **SAME_TO), (record["step"], name)
        assert record["rollout/log_prob_mismatch"] < MISMATCH_NATS
    assert samples(run_dir) == samples(one_process)
    assert {sample[:2] for sample in samples(run_dir)} == {(step + 1, step * OPTIMIZER_STEPS) for step in range(STEPS)}
