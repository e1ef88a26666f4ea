"""The host of a run, and how long it trains: Lightning's and NeMo-Aligner's trainer section."""

import os
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, Strict

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import AtLeastTwo, Count, CountOrZero, Positive, Steps


@config_class
class DynamicSamplingConfig:
    """Other prompts take the place of those whose completions all have the same reward (docs/rollouts.md)."""

    max_generation_rounds: Count = 3
    """Further rounds of generation for a rollout batch, at most; what has equal rewards then stays."""


@config_class
class AsynchronousConfig:
    """The next rollout batch is generated while this one is trained on (docs/rollouts.md)."""

    max_staleness: Annotated[int, Strict(), Field(ge=0, le=1)] = 1
    """Rollout batches that the weights sampled from may be behind those that are trained; 0 is the synchronous run."""


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
    """Updates in a row that may be skipped because a gradient is not finite; then the run stops."""

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
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Replace prompts whose completions all have the same reward; null trains on whatever was drawn."""
    asynchronous: AsynchronousConfig | None = None
    """Generate a batch ahead on rollout servers; null waits for each batch, sampled from the newest weights."""


@config_class
class SftTrainerConfig(LoopConfig):
    """Supervised training in place of MAPO (examples/sft.py): a batch of data.train_ds is one batch of targets."""


_PRECISIONS: Final = {
    "32": "fp32",
    "32-true": "fp32",
    "bf16-mixed": "bf16",
}
"""Lightning's names, and ours for what it means by them."""
_NO_PRECISIONS: Final = {
    "bf16-true": "no float32 weights would be kept, and updates of a small learning rate vanish in bfloat16",
    "16-mixed": "float16 needs loss scaling, which is not here",
    "16-true": "float16 needs loss scaling, which is not here",
    "16": "float16 needs loss scaling, which is not here",
    "64": "float64 is not computed here; use 32",
    "64-true": "float64 is not computed here; use 32",
}


def _our_precision(value: Any) -> Any:
    if str(value) in _NO_PRECISIONS:
        raise ValueError(f"{_NO_PRECISIONS[str(value)]}; use bf16-mixed, which keeps float32 main weights")
    return value if isinstance(value, bool) else _PRECISIONS.get(str(value), value)


def _started_here(value: Any) -> Any:
    """`auto` and -1, as in Lightning, are the processes that torchrun started on this machine, or 1."""
    if value == "auto" or (value == -1 and not isinstance(value, bool)):
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return value


@config_class
class TrainerConfig:
    """Lightning-style host section."""

    num_nodes: Count = 1
    """Machines."""
    devices: Annotated[Count, BeforeValidator(_started_here)] = 1
    """Processes per machine; start as many, e.g. with torchrun --nproc-per-node. `auto` or -1 is what was started."""
    accelerator: Literal["cpu", "gpu"] = "cpu"
    """Where the run computes; docs/status.md says what has run on a GPU."""
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(_our_precision)] = "fp32"
    """Of weights and activations; `bf16` keeps float32 main weights and gradients beside them. Lightning's names are
    understood: 32 and 32-true are fp32, bf16-mixed is bf16."""
    num_threads: Count | None = None
    """torch threads on a CPU host; null leaves torch's choice."""
    mapo: MapoTrainerConfig = MapoTrainerConfig()
    sft: SftTrainerConfig | None = None
    """Supervised training on `data.target` in place of MAPO; conf/sft.yaml sets it."""

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.num_nodes * self.devices

    @property
    def loop(self) -> LoopConfig:
        """The section that says how long this run trains."""
        return self.mapo if self.sft is None else self.sft

    @property
    def loop_name(self) -> str:
        """Its path in the config, for messages."""
        return "trainer.mapo" if self.sft is None else "trainer.sft"
