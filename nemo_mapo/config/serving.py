"""The whole config of `examples/serve_rollouts.py`."""

import dataclasses
from typing import Annotated, Any, Literal

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

from nemo_mapo.config.base import config_class
from nemo_mapo.config.load import ConfigError, register_defaults
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.rollout import ServingConfig
from nemo_mapo.config.run import PretrainedConfig, RolloutConfig

Count = Annotated[int, Field(ge=1)]


@config_class
class ServedDataConfig:
    """What prompts are made of."""

    tokenizer: str
    """Directory of a Hugging Face tokenizer, the trainer's."""
    sample_rate: Count = 16000
    """Hz; clips of another rate are refused."""


@config_class
class ServedHostConfig:
    """Where the model runs; the keys are those of training."""

    accelerator: Literal["cpu", "gpu"] = "cpu"
    """`gpu` has not been run yet."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights; has to be the trainer's."""
    num_threads: Count | None = None
    """torch threads on a CPU host; null leaves torch's choice."""


@config_class
class ServeConfig:
    """A server of one model, in one process."""

    trainer: ServedHostConfig = ServedHostConfig()
    pretrained_checkpoint: PretrainedConfig = PretrainedConfig()
    data: ServedDataConfig
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    serving: ServingConfig = ServingConfig()

    def __post_init__(self) -> None:
        if self.rollout.backend != "megatron":
            raise ValueError(f"rollout.backend={self.rollout.backend}: a server serves rollout.backend=megatron")
        if spread := self.model.cut_over_ranks:
            raise ValueError(
                f"{', '.join(spread)}: the trainer may cut its model, the server's copy is whole, in one process; "
                "set 1 (start several servers for more speed)"
            )


def register_serving_defaults() -> None:
    """Give Hydra every key with its default, so that each can be overridden."""
    register_defaults()
    store = ConfigStore.instance()
    store.store(group="serving", name="defaults", node=dataclasses.asdict(ServingConfig()))
    start = {
        "trainer": dataclasses.asdict(ServedHostConfig()),
        "pretrained_checkpoint": dataclasses.asdict(PretrainedConfig()),
    }
    store.store(name="serving_defaults", node=start)


def validate_serving(composed: DictConfig | dict[str, Any]) -> ServeConfig:
    """Check the whole config at once; ConfigError names every offending path with its value."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else composed
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {error}") from error
    try:
        return TypeAdapter(ServeConfig).validate_python(plain)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [
            f"  {'.'.join(map(str, one['loc'])) or '(whole config)'}{_value(one)}: {one['msg']}" for one in problems
        ]
        raise ConfigError("\n".join([f"config, {len(lines)} to correct:", *lines])) from error


def _value(problem: Any) -> str:
    """The offending value, unless it is a whole section."""
    return "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
