"""The train command with adapters: the base is never written, and serves as the reference without a second copy."""

import shutil

import pytest
import torch
from megatron.core import dist_checkpointing

from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.policies import lora_alpha_of
from tests.integration.tiny_run import STEPS, metrics, train, write_tiny_corpus

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    corpus = write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    finished = train(corpus, run_dir, "model.lora={rank: 4, alpha: 8.0}")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run_dir


def test_the_alpha_of_adapters_is_that_of_their_run(run_dir, tmp_path):
    checkpoint = run_dir / "checkpoints" / f"step_{STEPS:06d}"
    assert lora_alpha_of(checkpoint, None) == 8.0 == lora_alpha_of(checkpoint, 8.0)
    with pytest.raises(
        ValueError, match=r"alpha 16\.0 is given, but its run has model\.lora\.alpha=8\.0; leave it out"
    ):
        lora_alpha_of(checkpoint, 16.0)
    elsewhere = tmp_path / "away" / checkpoint.name
    shutil.copytree(checkpoint, elsewhere)
    assert lora_alpha_of(elsewhere, 16.0) == 16.0
    with pytest.raises(ValueError, match=r"holds LoRA adapters, and the config\.yaml of its run"):
        lora_alpha_of(elsewhere, None)


def tensors(run_dir, step):
    install_cpu_host()
    initialize_parallel()
    saved = dist_checkpointing.load_plain_tensors(str(run_dir / "checkpoints" / f"step_{step:06d}"))
    return {
        name: value
        for name, value in saved.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer.")
    }


def test_only_adapters_are_trained(run_dir):
    early, late = tensors(run_dir, STEPS - 2), tensors(run_dir, STEPS)
    changed = {name for name, value in late.items() if not torch.equal(value, early[name])}
    assert changed and all("lora_" in name for name in changed)
    assert any("lora_b" in name for name in changed)


def test_the_policy_starts_at_its_reference_and_leaves_it(run_dir):
    records = metrics(run_dir)
    assert records[1]["train/kl_loss"] == pytest.approx(0.0, abs=1e-9)
    assert records[-1]["train/kl_loss"] > 0
