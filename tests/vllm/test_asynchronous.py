"""Generation ahead of training: on a real server, one batch behind at most, and never on samples taken for others."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_mapo.rollout.protocol import PendingCompletions, RolloutUnavailable
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.training.sources import Synchronous
from tests.integration.tiny_run import metrics, train_on_ranks, write_tiny_corpus
from tests.integration.trainers import fit, trainer_of
from tests.vllm.serving import asking, launching

pytestmark = pytest.mark.vllm

WEIGHTED = "objective.behaviour_clip=2"
AHEAD = [WEIGHTED, "trainer.mapo.generation.type=one_ahead"]
OPTIMIZER_STEPS = 2
"""Of a rollout batch: 4 prompts x 2 completions, 4 at a time."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


@pytest.fixture
def overrides(shared: VllmRollout, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a run with a server that is there."""
    return asking(shared, monkeypatch)


@pytest.fixture(scope="module")
def ahead(corpus: Path, shared: VllmRollout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an asynchronous run."""
    run_dir = tmp_path_factory.mktemp("runs") / "ahead"
    with pytest.MonkeyPatch.context() as patched:
        assert fit(trainer_of(corpus, run_dir, *asking(shared, patched), *AHEAD))
    return run_dir


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]


def figures(run_dir: Path) -> list[dict[str, float]]:
    """Metrics that do not depend on the clock."""
    return [
        {k: v for k, v in record.items() if not k.startswith("timing/") and k != "rollout/tokens_per_second"}
        for record in metrics(run_dir)
    ]


def prompts_of_steps(run_dir: Path) -> dict[int, str]:
    return {record["step"]: record["id"] for record in samples(run_dir)}


def test_every_batch_but_the_first_is_one_behind_and_says_so(ahead: Path) -> None:
    records = metrics(ahead)
    assert [record["rollout/staleness"] for record in records] == [0.0, 1.0, 1.0, 1.0]
    versions = {record["step"]: record["weight_version"] for record in samples(ahead)}
    assert versions == {1: 0, 2: 0, 3: OPTIMIZER_STEPS, 4: 2 * OPTIMIZER_STEPS}
    # The engine draws no special tokens, so a weight is below 1 even where nothing has moved.
    assert 0.9 < records[0]["train/behaviour_weight"] < 1
    assert records[0]["rollout/log_prob_mismatch"] < 1e-5
    assert all(record["rollout/log_prob_mismatch"] > 1e-5 for record in records[1:])


def test_the_second_batch_is_what_the_start_weights_sample(
    corpus: Path, overrides: list[str], ahead: Path, tmp_path: Path
) -> None:
    fresh = trainer_of(corpus, tmp_path / "fresh", *overrides)
    assert isinstance(fresh.source, Synchronous)
    requests, sampler = fresh.source.requests, fresh.source.sampler
    sampler.send_weights(0)
    requests.next(0)
    expected = sampler.draw(requests.next(1))[0]
    written = [record for record in samples(ahead) if record["step"] == 2]
    assert {record["id"] for record in written} == {expected.example.id}
    assert {record["text"] for record in written} <= {one.text for one in expected.completions}


@pytest.mark.slow
def test_a_run_whose_server_dies_trains_every_prompt_once(
    corpus: Path, overrides: list[str], ahead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    failing = trainer_of(corpus, run_dir, *launching(), *AHEAD)
    engine = failing.actor.rollout
    assert isinstance(engine, VllmRollout)
    begin = engine.begin

    def begin_and_kill(*args: Any, **kwargs: Any) -> PendingCompletions:
        if failing.step == 2:
            engine.close()
        return begin(*args, **kwargs)

    monkeypatch.setattr(engine, "begin", begin_and_kill)
    with pytest.raises(RolloutUnavailable, match="vLLM ended with status"):
        fit(failing)
    saved = failing.checkpoints.latest()
    assert saved is not None and saved.state["step"] == failing.step == 3

    resumed = trainer_of(corpus, run_dir, *overrides, *AHEAD)
    resumed.resume(saved)
    assert fit(resumed)
    assert prompts_of_steps(run_dir) == prompts_of_steps(ahead)
    assert [record["rollout/staleness"] for record in metrics(run_dir)] == [0.0, 1.0, 1.0, 0.0]
    assert resumed.consumed_samples == 4 * 8


def test_two_ranks_generate_ahead_as_one_does(corpus: Path, overrides: list[str], ahead: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "ranks"
    once = [
        "trainer.mapo.val_check_interval=0",
        "trainer.mapo.max_steps=4",
        "data.test_ds=null",
        "model.micro_batch_size=2",
    ]
    finished = train_on_ranks(2, corpus, run_dir, *once, *overrides, *AHEAD)
    assert finished.returncode == 0, finished.stderr
    for one, other in zip(figures(ahead), figures(run_dir), strict=True):
        for name in ("rollout/staleness", "rollout/completion_tokens", "train/behaviour_weight", "train/loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_log_probs_of_engine_and_training_that_differ_give_a_warning(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(trainer_of(corpus, tmp_path / "quiet", "trainer.mapo.max_steps=1"))
    assert "log_prob_alarm" not in caplog.text
    assert fit(trainer_of(corpus, tmp_path / "loud", "trainer.mapo.max_steps=1", "rollout.log_prob_alarm=1e-12"))
    assert "step 1: log-probs of the rollout engine and of training differ by" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((), "rollout.backend=megatron generates in the training process"),
        (("rollout=vllm",), "set objective.behaviour_clip, e.g. to 2"),
    ],
)
def test_what_cannot_be_generated_ahead_is_refused(
    corpus: Path, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(corpus, tmp_path / "run", "trainer.mapo.generation.type=one_ahead", *changes)
