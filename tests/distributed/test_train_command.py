"""The train command on several processes learns what it learns on one."""

from pathlib import Path

import pytest

from tests.integration.tiny_run import (
    FIGURES,
    STEPS,
    metrics,
    train,
    train_on_ranks,
    train_with_torchrun,
    write_tiny_corpus,
)

pytestmark = pytest.mark.distributed

HALVES = ("model.micro_batch_size=2",)
TENSOR_2 = ("model.tensor_model_parallel_size=2",)
SAME_TO = 1e-3
"""Six steps from random weights: rounding grows, a sampled token that differs would be far off."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture(scope="module")
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights to start from: random ones are drawn in another order where the model is cut."""
    run_dir = tmp_path_factory.mktemp("runs") / "start"
    finished = train(corpus, run_dir, "trainer.mapo.max_steps=2", "data.test_ds=null")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return f"pretrained_checkpoint.restore_from_path={run_dir}/checkpoints/step_000002"


@pytest.fixture(scope="module")
def one_process(corpus: Path, start: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    finished = train(corpus, run_dir, start)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run_dir


def assert_same_course(run_dir: Path, expected: Path) -> None:
    records, others = metrics(run_dir), metrics(expected)
    assert [record["step"] for record in records] == [record["step"] for record in others] == list(range(STEPS + 1))
    for record, other in zip(records, others, strict=True):
        for name in FIGURES:
            if name in other:
                assert record[name] == pytest.approx(other[name], rel=SAME_TO, abs=SAME_TO), (record["step"], name)


@pytest.mark.parametrize("overrides", [HALVES, TENSOR_2], ids=["data 2", "tensor 2"])
def test_two_processes_learn_what_one_learns(corpus, start, one_process, tmp_path, overrides) -> None:
    run_dir = tmp_path / "two"
    finished = train_on_ranks(2, corpus, run_dir, start, *overrides)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_course(run_dir, one_process)
    assert (run_dir / "report.html").is_file()
    assert finished.stdout.count("report: ") == 1, "one rank talks to the user"


def test_two_processes_that_share_out_experts_learn_what_one_learns(corpus, tmp_path) -> None:
    """Their completions end at different lengths, and neither may leave the other waiting."""
    experts = ("model.decoder.num_moe_experts=4", "model.decoder.moe_ffn_hidden_size=16", *HALVES)
    first = train(corpus, tmp_path / "start", *experts, "trainer.mapo.max_steps=2", "data.test_ds=null")
    assert first.returncode == 0, first.stderr[-3000:]
    start = f"pretrained_checkpoint.restore_from_path={tmp_path}/start/checkpoints/step_000002"
    one = train(corpus, tmp_path / "one", start, *experts)
    assert one.returncode == 0, one.stderr[-3000:]
    two = train_on_ranks(2, corpus, tmp_path / "two", start, *experts, "model.expert_model_parallel_size=2")
    assert two.returncode == 0, two.stderr[-3000:]
    assert_same_course(tmp_path / "two", tmp_path / "one")


def test_a_run_of_two_processes_is_continued_by_one(corpus, start, one_process, tmp_path) -> None:
    run_dir = tmp_path / "changed"
    first = train_with_torchrun(2, corpus, run_dir, start, *HALVES, "trainer.mapo.max_steps=2")
    assert first.returncode == 0, first.stderr[-3000:]
    then = train(corpus, run_dir, start, "exp_manager.resume_if_exists=true")
    assert then.returncode == 0, then.stderr[-3000:]
    assert_same_course(run_dir, one_process)


def test_a_wrong_number_of_processes_is_refused(corpus, tmp_path) -> None:
    finished = train_on_ranks(2, corpus, tmp_path / "wrong", "trainer.num_nodes=2", *TENSOR_2, *HALVES)
    assert finished.returncode != 0
    assert "2 processes were started" in finished.stdout + finished.stderr
