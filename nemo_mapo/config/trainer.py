"""The host of a run, and how long it trains: Lightning's and NeMo-Aligner's trainer section."""

import os
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import AtLeastTwo, Count, CountOrZero, Positive, Steps
from nemo_mapo.config.generation import GenerationConfig, SynchronousConfig


@config_class
class LoopConfig:
    """How long a run trains, and how often it validates and saves."""

    max_epochs: Count = 1
    """Passes over the training split, unless `max_steps` ends the run earlier."""
    max_steps: Steps = -1
    """Batches of the training split to train on; -1 is whole epochs."""
    val_check_interval: CountOrZero = 20
    """Validate every this many steps (and at the end); 0 is never."""
    save_interval: CountOrZero = 20
    """Checkpoint every this many steps and at the end; 0 is never."""
    gradient_clip_val: Positive = 1.0
    """Global gradient norm is clipped to this."""
    max_time_per_run: Annotated[str, Field(pattern=r"^\d+:\d{1,2}:\d{1,2}:\d{1,2}$")] | None = None
    """DD:HH:MM:SS after which the run saves and stops."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    max_skipped_steps: Count = 5
    """Consecutive updates that may be skipped because a gradient is not finite; then the run stops."""

    def __post_init__(self) -> None:
        if self.val_check_interval and self.save_interval % self.val_check_interval:
            raise ValueError(
                f"save_interval={self.save_interval} must be a multiple of val_check_interval="
                f"{self.val_check_interval} (NeMo-Aligner validates before it saves)"
            )


@config_class
class MapoTrainerConfig(LoopConfig):
    """NeMo-Aligner's trainer section."""

    num_rollouts_per_prompt: AtLeastTwo = 8
    """G, the group size; group advantages need at least 2."""
    generation: GenerationConfig = SynchronousConfig()
    """When rollout batches are generated, and whether prompts are replaced."""


@config_class
class SftTrainerConfig(LoopConfig):
    """Supervised training instead of MAPO (examples/sft.py): a batch of data.train_ds is one batch of targets."""


_PRECISIONS: Final = {
    "32": "fp32",
    "32-true": "fp32",
    "bf16-mixed": "bf16",
}
"""Lightning's names and our equivalents."""
_NO_PRECISIONS: Final = {
    "bf16-true": "no float32 weights would be kept, and updates of a small learning rate vanish in bfloat16",
    "16-mixed": "float16 needs loss scaling, which is not supported",
    "16-true": "float16 needs loss scaling, which is not supported",
    "16": "float16 needs loss scaling, which is not supported",
    "64": "float64 is not supported; use 32",
    "64-true": "float64 is not supported; use 32",
}


def _our_precision(value: Any) -> Any:
    if str(value) in _NO_PRECISIONS:
        raise ValueError(f"{_NO_PRECISIONS[str(value)]}; use bf16-mixed, which keeps float32 main weights")
    return value if isinstance(value, bool) else _PRECISIONS.get(str(value), value)


def _started_here(value: Any) -> Any:
    """`auto` and -1 mean, as in Lightning, as many processes as torchrun started on this machine, or 1."""
    if value == "auto" or (value == -1 and not isinstance(value, bool)):
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return value


@config_class
class TrainerConfig:
    """Lightning-style host section."""

    num_nodes: Count = 1
    """Machines."""
    devices: Annotated[Count, BeforeValidator(_started_here)] = 1
    """Processes per machine; start as many, e.g. with torchrun --nproc-per-node. `auto` or -1: as many as started."""
    accelerator: Literal["cpu", "gpu"] = "cpu"
    """Where the run computes; docs/status.md says what has run on a GPU."""
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(_our_precision)] = "fp32"
    """Type of weights and activations; `bf16` also keeps float32 main weights and gradients. Lightning's names are
    understood: 32 and 32-true are fp32, bf16-mixed is bf16."""
    num_threads: Count | None = None
    """torch threads on a CPU host; null keeps torch's default."""
    mapo: MapoTrainerConfig = MapoTrainerConfig()
    sft: SftTrainerConfig | None = None
    """Supervised training on `data.target` instead of MAPO; conf/sft.yaml sets it."""

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self.num_nodes * self.devices

    @property
    def loop(self) -> LoopConfig:
        """The section that says how long this run trains."""
        return self.mapo if self.sft is None else self.sft

    @property
    def loop_name(self) -> str:
        """Path of `loop` in the config, for messages."""
        return "trainer.mapo" if self.sft is None else "trainer.sft"
