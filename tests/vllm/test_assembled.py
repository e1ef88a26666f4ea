"""An audio LLM from parts, served by vLLM through its prompts' embeddings, trains as with the engine in the process."""

from pathlib import Path

import pytest
from integration.parts_tiny import save_chat_model, save_whisper

from forked_commands import checked as run
from tests.integration.tiny_run import metrics, write_tiny_corpus
from tests.vllm.serving import PYTHON
from tests.vllm.test_training import assert_agrees

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STEPS = 3
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
"""vLLM's attention on a CPU has heads of 32."""


def test_a_policy_from_parts_trains_on_what_vllm_draws(tmp_path: Path) -> None:
    save_whisper(tmp_path / "whisper")
    save_chat_model(tmp_path / "llama", **WIDE)
    policy, run_dir = tmp_path / "policy", tmp_path / "run"
    run("assemble.py", "--encoder", tmp_path / "whisper", "--decoder", tmp_path / "llama", "--output", policy)
    run(
        "train_mapo.py",
        *("--config-dir", policy / "conf", "model=imported", "~warm_start", "rollout=vllm"),
        f"data.tokenizer={policy}/tokenizer",
        f"pretrained_checkpoint.restore_from_path={policy}/checkpoint",
        f"data.corpus_dir={write_tiny_corpus(tmp_path / 'synthetic')}",
        f"exp_manager.explicit_log_dir={run_dir}",
        *("trainer.num_threads=1", f"trainer.mapo.max_steps={STEPS}", f"trainer.mapo.val_check_interval={STEPS}"),
        *(f"trainer.mapo.save_interval={STEPS}", "trainer.mapo.num_rollouts_per_prompt=2", "data.test_ds=null"),
        *("data.train_ds.batch_size=2", "model.global_batch_size=4", "model.micro_batch_size=2"),
        *("data.validation_ds.max_samples=2", "data.validation_ds.batch_size=2", "model.optim.lr=1e-3"),
        *("rollout.sampling.max_new_tokens=8", f"rollout.vllm.python={PYTHON}"),
    )
    assert_agrees(run_dir, STEPS)
    assert len([record for record in metrics(run_dir) if "train/loss" in record]) == STEPS
