"""The way of docs/qwen3_omni.md through its commands: import, train two steps, export, load with transformers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from integration.qwen_omni_tiny import FAMILIES, qwen_tokenizer, save_tiny, tower
from lhotse import CutSet, Recording
from transformers import Qwen2_5OmniForConditionalGeneration, Qwen3OmniMoeForConditionalGeneration

from forked_commands import checked as run
from nemo_mapo.data.manifests import load_cuts
from nemo_mapo.data.splits import SPLITS, manifest_path
from tests.integration.tiny_run import metrics, write_tiny_corpus

pytestmark = pytest.mark.integration

CLASSES = {
    "qwen2_5_omni": Qwen2_5OmniForConditionalGeneration,
    "qwen3_omni_moe": Qwen3OmniMoeForConditionalGeneration,
}
# The synthetic words; a multiple of nothing.
ROWS = 701


LONG_SECONDS = 40
SHORT_RUN = (
    *("trainer.num_threads=1", "trainer.mapo.max_steps=2", "trainer.mapo.val_check_interval=2"),
    *("trainer.mapo.save_interval=2", "trainer.mapo.num_rollouts_per_prompt=2", "data.train_ds.batch_size=4"),
    *("model.global_batch_size=4", "model.micro_batch_size=4", "rollout.sampling.max_new_tokens=8"),
    *("model.optim.lr=1e-3", "data.test_ds=null"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "synthetic")


def long_and_several(corpus, directory):
    """The corpus with questions about 40 seconds and about two clips in turn."""
    shutil.copytree(corpus, directory)
    noise = np.random.default_rng(0).normal(scale=0.1, size=LONG_SECONDS * 16000)
    soundfile.write(directory / "long.wav", noise, 16000)
    long = Recording.from_file(directory / "long.wav")
    for split in SPLITS:
        cuts = list(load_cuts(manifest_path(directory, split)))
        for number, cut in enumerate(cuts):
            if number % 2:
                cut.custom["audio_2"] = cuts[0].recording
        whole = [replace(long.to_cut(), id=cut.id, custom=cut.custom) for cut in cuts[::2]]
        CutSet.from_cuts([*whole, *cuts[1::2]]).to_file(manifest_path(directory, split))
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_is_trained_and_taken_out_again(family, corpus, tmp_path):
    original, imported, run_dir = tmp_path / "original", tmp_path / "imported", tmp_path / "run"
    save_tiny(original, family, tokenizer=qwen_tokenizer(family), vocab_size=ROWS)
    told = run("import_hf.py", "--model", original, "--output", imported)
    assert "--config-dir" in told and "of talker, vocoder and vision not imported" in told
    run(
        "train_mapo.py",
        *("--config-dir", imported / "conf", "model=imported", "~warm_start"),
        f"data.tokenizer={imported}/tokenizer",
        f"pretrained_checkpoint.restore_from_path={imported}/checkpoint",
        f"data.corpus_dir={corpus}",
        f"exp_manager.explicit_log_dir={run_dir}",
        *SHORT_RUN,
    )
    steps = metrics(run_dir)[1:]
    assert len(steps) == 2
    # What is generated from a cache is what training sees: positions, placeholders and attention agree.
    assert all(record["rollout/log_prob_gap"] < 1e-3 for record in steps)
    assert all(record["mapo/audio_mass"] > 0 for record in steps)
    checkpoint = run_dir / "checkpoints" / "step_000002"
    run("export_hf.py", "--checkpoint", checkpoint, "--original", original, "--output", tmp_path / "exported")
    before, after = (CLASSES[family].from_pretrained(path).thinker for path in (original, tmp_path / "exported"))
    moved = [
        name
        for (name, old), new in zip(before.model.named_parameters(), after.model.parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert any("q_proj" in name for name in moved) and any("norm" in name for name in moved)
    sight, still = (tower(thinker, "visual").parameters() for thinker in (before, after))
    assert all(torch.equal(old, new) for old, new in zip(sight, still, strict=True))


def test_a_model_is_trained_and_evaluated_on_40_seconds_and_on_two_clips(corpus, tmp_path):
    original, imported, run_dir = tmp_path / "original", tmp_path / "imported", tmp_path / "run"
    mixed = long_and_several(corpus, tmp_path / "mixed")
    save_tiny(original, "qwen3_omni_moe", tokenizer=qwen_tokenizer("qwen3_omni_moe"), vocab_size=ROWS)
    run("import_hf.py", "--model", original, "--output", imported)
    model = ("--config-dir", imported / "conf", "model=imported", f"data.tokenizer={imported}/tokenizer")
    run(
        "train_mapo.py",
        *(*model, "~warm_start", f"pretrained_checkpoint.restore_from_path={imported}/checkpoint"),
        *(f"data.corpus_dir={mixed}", f"exp_manager.explicit_log_dir={run_dir}", *SHORT_RUN),
        *(f"data.{name}.max_duration={LONG_SECONDS}" for name in ("train_ds", "validation_ds")),
    )
    steps = metrics(run_dir)[1:]
    assert len(steps) == 2
    assert all(record["rollout/log_prob_gap"] < 1e-3 and record["mapo/audio_mass"] > 0 for record in steps)
    run(
        "evaluate.py",
        *(*model, "benchmark=multiple_choice", f"benchmark.items_path={manifest_path(mixed, 'test')}"),
        f"pretrained_checkpoint.restore_from_path={run_dir}/checkpoints/best",
        *(f"output_dir={tmp_path / 'evaluation'}", "rollout.sampling.max_new_tokens=8", "num_threads=1"),
    )
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["overall"]["items"] == len(list(load_cuts(manifest_path(mixed, "test"))))
