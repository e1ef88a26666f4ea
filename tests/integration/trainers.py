"""Trainers of short runs in the process of a test."""

from pathlib import Path

from nemo_mapo.config.compose import compose
from nemo_mapo.config.load import load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.launch import Assembly
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.training.run_directory import RunDirectory
from nemo_mapo.training.trainer import MapoTrainer
from tests.integration.tiny_run import ROOT, command


def trainer_of(corpus: Path, run_dir: Path, *overrides: str) -> MapoTrainer:
    """The trainer of a run of four steps, in this process."""
    install_cpu_host()
    initialize_parallel()
    config = config_of(corpus, run_dir, *overrides)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Assembly(config, RunDirectory(path=run_dir)).trainer


def config_of(corpus: Path, run_dir: Path, *overrides: str) -> RunConfig:
    """The config of a run of four steps."""
    once = ["trainer.mapo.val_check_interval=0", "trainer.mapo.max_steps=4", "data.test_ds=null"]
    asked = [*command(corpus, run_dir)[2:], *once, *overrides]
    return load(compose(ROOT / "conf" / "train_mapo.yaml", asked), RunConfig)


def fit(trainer: MapoTrainer) -> bool:
    """Train; what `MapoTrainer.fit` says."""
    trainer.run_timer.start_time()
    return trainer.fit()
