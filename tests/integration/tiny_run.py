"""A training run small enough for a test, through the command that users type."""

import json
import subprocess
import sys
from pathlib import Path

import forked_commands
from forked_commands import ROOT, environment
from nemo_mapo.embedded.synthetic import SyntheticCorpusConfig, write_corpus
from nemo_mapo.embedded.tokenizer import build_tokenizer

__all__ = ["ROOT", "environment"]
STEPS = 6
TINY_MODEL = (
    "trainer.num_threads=1",
    "trainer.mapo.num_rollouts_per_prompt=2",
    "data.train_ds.batch_size=4",
    "model.global_batch_size=4",
    "model.micro_batch_size=4",
    "model.from_scratch=true",
    "model.decoder.num_layers=2",
    "model.decoder.hidden_size=32",
    "model.decoder.ffn_hidden_size=64",
    "model.decoder.num_attention_heads=4",
    "model.decoder.kv_channels=8",
    "model.perception.channels=16",
    "model.target_layers=[1]",
    "rollout.sampling.max_new_tokens=8",
)
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
"""What two runs that learn the same agree in."""


def write_tiny_corpus(directory: Path) -> Path:
    """A synthetic corpus of a few clips, with its tokenizer."""
    write_corpus(SyntheticCorpusConfig(train=16, validation=4, test=4), directory, progress=False)
    build_tokenizer().save_pretrained(directory / "tokenizer")
    return directory


def command(corpus: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The train command with a model that takes a second a step at most."""
    return [
        sys.executable,
        str(ROOT / "examples" / "train_mapo.py"),
        f"data.corpus_dir={corpus}",
        f"exp_manager.explicit_log_dir={run_dir}",
        "~warm_start",
        f"trainer.mapo.max_steps={STEPS}",
        "trainer.mapo.val_check_interval=2",
        "trainer.mapo.save_interval=2",
        *TINY_MODEL,
        *overrides,
    ]


def train(corpus: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run to the end and return what was printed."""
    return forked_commands.run("train_mapo.py", *command(corpus, run_dir, *overrides)[2:])


def train_on_ranks(ranks: int, corpus: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The same command on several processes of this machine, which find themselves as under torchrun."""
    arguments = [*command(corpus, run_dir, *overrides)[2:], f"trainer.devices={ranks}"]
    return forked_commands.run_on_ranks(ranks, "train_mapo.py", *arguments)


def train_with_torchrun(ranks: int, corpus: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The same under torchrun itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [*command(corpus, run_dir, *overrides)[1:], f"trainer.devices={ranks}"]
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, check=False, env=environment())


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
