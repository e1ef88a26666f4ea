"""examples/sft.py as users type it: trained, resumed, with adapters, and what MAPO starts from afterwards."""

import gzip
import json

import pytest
import torch
from megatron.core import dist_checkpointing

from forked_commands import ROOT, run
from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.splits import SPLITS, manifest_path
from nemo_mapo.launch_sft import SupervisedAssembly
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.run_directory import RunDirectory
from tests.integration.tiny_run import TINY_MODEL, metrics, train, write_tiny_corpus

pytestmark = pytest.mark.integration
RESUME = "exp_manager.resume_if_exists=true"
MODEL = [part for part in TINY_MODEL if part.startswith(("model.", "trainer.num"))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


def asked(corpus, run_dir, *overrides):
    return [
        *(f"data.prepared_dir={corpus}", f"exp_manager.explicit_log_dir={run_dir}"),
        # Two epochs of two steps.
        *(*MODEL, "data.train_ds.batch_size=8", "model.global_batch_size=8", "model.optim.sched.name=constant"),
        *("trainer.sft.val_check_interval=2", "trainer.sft.save_interval=2", "trainer.sft.max_steps=4"),
        *("rollout.sampling.max_new_tokens=112", *overrides),
    ]


def sft(corpus, run_dir, *overrides):
    return run("sft.py", *asked(corpus, run_dir, *overrides))


def weights(path):
    install_cpu_host()
    initialize_parallel()
    found = dist_checkpointing.load_plain_tensors(str(path))
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    finished = sft(corpus, run_dir)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run_dir


def test_a_run_records_loss_accuracy_and_format_and_writes_a_report(trained):
    records = metrics(trained)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[-1]["val/loss"] < records[0]["val/loss"]
    assert {"val/accuracy", "val/accuracy_silent", "val/format"} <= records[-1].keys()
    assert {"loss", "accuracy", "format"} <= json.loads((trained / "run.json").read_text())["test"].keys()
    page = (trained / "report.html").read_text()
    # Players beside the held-out completions, and no chart of what supervised training has not.
    assert (trained / "rollouts.jsonl").is_file() and "<audio" in page
    assert "Loss on the targets" in page and 'href="#masks"' not in page and "Not recorded" not in page


def test_a_run_in_two_sessions_ends_as_one(corpus, trained, tmp_path):
    for steps in (2, 4):
        finished = sft(corpus, tmp_path / "run", RESUME, f"trainer.sft.max_steps={steps}")
        assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (weights(path / "checkpoints" / "step_000004") for path in (trained, tmp_path / "run"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_mapo_starts_from_merged_adapters(corpus, trained, tmp_path):
    start = f"pretrained_checkpoint.restore_from_path={trained / 'checkpoints' / 'step_000004'}"
    adapters = "model.lora={rank: 4, alpha: 8.0}"
    finished = sft(corpus, tmp_path / "lora", start, adapters, "model.packed_tokens=512", "data.test_ds=null")
    assert finished.returncode == 0, finished.stderr[-3000:]
    merged = f"pretrained_checkpoint.restore_from_path={tmp_path / 'lora' / 'merged'}"
    finished = train(corpus, tmp_path / "mapo", merged, "trainer.mapo.max_steps=2", "data.test_ds=null")
    assert finished.returncode == 0, finished.stderr[-3000:]
    adapted, merged = weights(tmp_path / "lora" / "checkpoints" / "step_000004"), weights(tmp_path / "lora" / "merged")
    assert not any("lora_" in name for name in merged)
    changed = [name for name in merged if name in adapted and not torch.equal(merged[name], adapted[name])]
    assert changed
    for name in changed:
        linear = name.removesuffix("weight")
        added = 2.0 * adapted[f"{linear}lora_b"] @ adapted[f"{linear}lora_a"]
        torch.testing.assert_close(merged[name], adapted[name] + added)


def test_mapo_starts_from_any_checkpoint_with_adapters(corpus, trained, tmp_path):
    start = f"pretrained_checkpoint.restore_from_path={trained / 'checkpoints' / 'step_000004'}"
    adapters = "model.lora={rank: 4, alpha: 8.0}"
    finished = sft(corpus, tmp_path / "lora", start, adapters, "data.test_ds=null")
    assert finished.returncode == 0, finished.stderr[-3000:]
    losses = []
    for name in ("merged", "checkpoints/step_000004"):
        start = f"pretrained_checkpoint.restore_from_path={tmp_path / 'lora' / name}"
        finished = train(corpus, tmp_path / name, start, "trainer.mapo.max_steps=2", "data.test_ds=null")
        assert finished.returncode == 0, finished.stderr[-3000:]
        losses.append([record["train/loss"] for record in metrics(tmp_path / name)[1:]])
    assert losses[0] == losses[1]
    # The adapters' alpha is in the config of their run.
    moved = (tmp_path / "lora" / "checkpoints").rename(tmp_path / "moved")
    start = f"pretrained_checkpoint.restore_from_path={moved / 'step_000004'}"
    refused = train(corpus, tmp_path / "refused", start, "data.test_ds=null")
    assert refused.returncode == 1 and "holds LoRA adapters" in refused.stderr and "RUN/merged" in refused.stderr


def test_instruction_pairs_without_choices_are_learned_by_their_loss(corpus, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "audio").symlink_to(corpus / "audio")
    (pairs / "tokenizer").symlink_to(corpus / "tokenizer")
    for split in SPLITS:
        cuts = [json.loads(line) for line in gzip.decompress(manifest_path(corpus, split).read_bytes()).splitlines()]
        for cut in cuts:
            del cut["custom"]["choices"]
        manifest_path(pairs, split).write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    finished = sft(pairs, tmp_path / "run", "data.target.form=plain")
    assert finished.returncode == 0, finished.stderr[-3000:]
    last = metrics(tmp_path / "run")[-1]
    assert "val/loss" in last and "val/accuracy" not in last
    refused = train(pairs, tmp_path / "mapo")
    assert refused.returncode == 1 and "field 'choices' is None" in refused.stderr


def test_what_ends_a_run_names_the_key_of_its_own_section(corpus, tmp_path):
    install_cpu_host()
    initialize_parallel()
    config = load(compose(ROOT / "conf" / "sft.yaml", asked(corpus, tmp_path)), RunConfig)
    trainer = SupervisedAssembly(config, RunDirectory(path=tmp_path)).trainer
    assert trainer.skipped.key == "trainer.sft.max_skipped_steps"


def test_a_target_longer_than_validation_generates_is_refused_at_start(corpus, tmp_path):
    refused = sft(corpus, tmp_path / "run", "rollout.sampling.max_new_tokens=8")
    assert refused.returncode == 1
    assert "data.train_ds: the target of" in refused.stderr and "rollout.sampling.max_new_tokens=8" in refused.stderr
