"""Runs that train on what vLLM draws: they agree with the policy at every step, and end clearly when a server goes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nemo_mapo.config.compose import compose
from nemo_mapo.config.evaluation import EvaluationConfig
from nemo_mapo.config.load import load
from nemo_mapo.evaluation.benchmarks.run import checkpoint_engine, evaluate
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.protocol import RolloutUnavailable
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.rollout.vllm.process import free_port
from nemo_mapo.rows import Completion
from nemo_mapo.training.checkpoint import write_checkpoint
from tests.integration.tiny_run import ROOT, command, metrics, train, write_tiny_corpus
from tests.integration.trainers import fit, trainer_of
from tests.vllm.serving import MODEL, asking, launching

pytestmark = pytest.mark.vllm

STEPS = 10
LEAST_CORRELATION = 0.999
MOST_MISMATCH_NATS = 1e-4
PAPER = (
    "rollout.sampling.temperature=1.2",
    "rollout.sampling.top_k=50",
    "rollout.sampling.top_p=0.99",
    "rollout.sampling.repetition_penalty=1.1",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


def assert_agrees(run_dir: Path, steps: int) -> None:
    records = [record for record in metrics(run_dir) if "rollout/log_prob_correlation" in record]
    assert len(records) == steps
    for record in records:
        assert record["rollout/log_prob_correlation"] >= LEAST_CORRELATION
        assert record["rollout/log_prob_mismatch"] <= MOST_MISMATCH_NATS
        assert record["rollout/log_prob_outside"] == 0


def trained_prompts(run_dir: Path) -> list[tuple[int, str]]:
    lines = (run_dir / "rollouts.jsonl").read_text().splitlines()
    return sorted({(record["step"], record["id"]) for record in map(json.loads, lines) if record["split"] == "train"})


@pytest.mark.slow
def test_the_train_command_starts_a_server_trains_and_stops_it(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished = train(
        corpus, run_dir, *launching(f"trainer.mapo.max_steps={STEPS}", "model.optim.lr=1e-3", "data.test_ds=null")
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_agrees(run_dir, STEPS)
    log = (run_dir / "vllm" / "vllm.log").read_text()
    assert "POST /update_weight_version" in log
    assert not [line for line in os.popen("ps -eo args") if str(run_dir / "vllm" / "model") in line]


@pytest.mark.slow
def test_a_server_of_the_serve_command_serves_a_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Enough attempts to wait for a server on a loaded machine.
    overrides = launching("rollout.vllm.max_attempts=40", "rollout.vllm.pause_seconds=1")
    script = [sys.executable, str(ROOT / "examples" / "serve_vllm.py")]
    with (tmp_path / "printed").open("w") as printed:
        server = subprocess.Popen(
            [*script, *command(corpus, run_dir, *overrides)[2:], f"rollout.vllm.port={port}"],
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        urls = f"rollout.vllm.urls=[http://127.0.0.1:{port}]"
        assert fit(trainer_of(corpus, run_dir, *overrides, urls, "trainer.mapo.max_steps=2"))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert_agrees(run_dir, 2)
    assert f"vllm.entrypoints.openai.api_server --model {run_dir}/vllm/model" in (tmp_path / "printed").read_text()


@pytest.mark.parametrize("packed", [(), ("model.packed_tokens=256",)], ids=["padded", "packed"])
def test_under_the_papers_sampling_it_agrees_at_every_step(
    corpus: Path, shared: VllmRollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: tuple[str, ...]
) -> None:
    trainer = trainer_of(corpus, tmp_path, *asking(shared, monkeypatch), *PAPER, "model.optim.lr=1e-3", *packed)
    assert fit(trainer)
    assert_agrees(tmp_path, 4)
    assert all(0 < record["train/behaviour_weight"] <= 2 for record in metrics(tmp_path))


@pytest.mark.slow
def test_a_killed_server_stops_the_run_which_resumes_with_the_same_prompts(
    corpus: Path, shared: VllmRollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = trainer_of(corpus, tmp_path / "undisturbed", *asking(shared, monkeypatch))
    assert fit(undisturbed)
    failing = trainer_of(corpus, tmp_path / "run", *launching())
    engine = failing.actor.rollout
    assert isinstance(engine, VllmRollout) and engine.fleet._process is not None
    pid, generate = engine.fleet._process.pid, engine.generate

    def generate_until_killed(*args: Any, **kwargs: Any) -> list[list[Completion]]:
        if failing.step == 3:
            os.killpg(pid, signal.SIGKILL)
        return generate(*args, **kwargs)

    monkeypatch.setattr(engine, "generate", generate_until_killed)
    with pytest.raises(RolloutUnavailable, match="vLLM ended with status -9"):
        fit(failing)
    saved = failing.checkpoints.latest()
    assert saved is not None and saved.state["step"] == failing.step == 3
    resumed = trainer_of(corpus, tmp_path / "run", *asking(shared, monkeypatch))
    resumed.resume(saved)
    assert fit(resumed)
    assert trained_prompts(tmp_path / "run") == trained_prompts(tmp_path / "undisturbed")


def test_dynamic_sampling_and_tars_draw_from_it(
    corpus: Path, shared: VllmRollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*asking(shared, monkeypatch), "trainer.mapo.max_steps=2"]
    dynamic = trainer_of(corpus, tmp_path / "dynamic", *overrides, "trainer.mapo.generation.type=dynamic_sampling")
    assert fit(dynamic)
    assert_agrees(tmp_path / "dynamic", 2)
    tars = trainer_of(
        corpus,
        tmp_path / "tars",
        *overrides,
        "rewards.tars={behaviour: 0}",
        "objective=tars",
        "model.global_batch_size=8",
        "trainer.mapo.num_rollouts_per_prompt=4",
    )
    assert fit(tars)
    assert_agrees(tmp_path / "tars", 2)


def test_an_evaluation_over_it_has_the_predictions_of_the_megatron_backend(
    corpus: Path, shared: VllmRollout, policy: AudioLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = []
    for number in range(5):
        noise = np.random.default_rng(number).normal(scale=0.1, size=4000 + 1500 * number)
        soundfile.write(tmp_path / f"{number}.wav", noise, 16000)
        shown = {"id": str(number), "audio_id": f"{number}.wav", "question": "what is the tone?"}
        shown |= {"category": "perception", "sub-category": "pitch", "difficulty": "easy"}
        records.append({**shown, "choices": ["deep", "low", "high", "shrill"], "answer": "deep", "task": "sound"})
    (tmp_path / "mmau.json").write_text(json.dumps(records))
    write_checkpoint(tmp_path / "checkpoint", policy)

    def predictions(name: str, *overrides: str) -> str:
        common = [
            *(*MODEL, "model.perception.channels=32", "rollout.sampling.max_new_tokens=8", "num_threads=1"),
            *("benchmark=mmau", f"benchmark.items_path={tmp_path / 'mmau.json'}", "template=none"),
            *(f"data.tokenizer={corpus / 'tokenizer'}", "statistics.bootstrap_samples=100"),
            f"pretrained_checkpoint.restore_from_path={tmp_path / 'checkpoint'}",
            f"output_dir={tmp_path / name}",
        ]
        config = load(compose(ROOT / "conf" / "evaluate.yaml", [*common, *overrides]), EvaluationConfig)
        return (evaluate(config, checkpoint_engine) / "predictions.jsonl").read_text()

    served = predictions("vllm", *asking(shared, monkeypatch), "rollout.sampling.temperature=0")
    assert len(served.splitlines()) == len(records) and served == predictions("megatron")
