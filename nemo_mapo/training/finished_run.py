"""Reads a finished run directory: its config, and one of its checkpoints."""

from dataclasses import asdict, replace
from pathlib import Path

from nemo_mapo.config.load import load
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.config.yaml_files import read_recorded
from nemo_mapo.training.checkpoint import CheckpointStore, followed, read_checkpoint
from nemo_mapo.training.run_directory import RunDirectory, renewed
from nemo_mapo.types import Wording


def read_run_config(run_dir: Path) -> RunConfig:
    """The resolved config of a run; ValueError if there is none.

    Without the run's custom rewards: code is imported only if the user names it for the run that imports it.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no config.yaml")
    recorded = renewed(read_recorded(path))
    if isinstance(recorded.get("data"), dict):
        recorded["data"]["prompt"] = asdict(recorded_wording(run_dir) or Wording())
    config = load(recorded, RunConfig)
    return replace(config, rewards=config.rewards.without_code)


def recorded_wording(run_dir: Path) -> Wording | None:
    """What the prompts of a run contained besides their questions; None if the directory is not a run's."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None
    # A run without a record had no instruction: today's default did not exist then.
    data = read_recorded(path).get("data")
    return load(data.get("prompt") if isinstance(data, dict) else None, Wording, under="data.prompt")


def unsharded(model: ModelConfig) -> ModelConfig:
    """The same model in one process, which loads a checkpoint of any layout."""
    return replace(
        model,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        sequence_parallel=False,
    )


def find_checkpoint(run_dir: Path, name: str | None) -> Path:
    """The checkpoint of this name (`best` is that of the best validation), or the newest.

    Raises:
        ValueError: it is not there, or not whole.
    """
    directory = RunDirectory(path=run_dir).checkpoints
    if name is not None:
        return read_checkpoint(followed(directory / name)).path
    newest = CheckpointStore(directory, keep=1).latest()
    if newest is None:
        raise ValueError(f"{run_dir} has no checkpoint")
    return newest.path
