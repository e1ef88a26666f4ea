"""The whole config of `examples/evaluate.py`."""

import dataclasses
from typing import Annotated, Any, Literal

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

from nemo_mapo.config.base import config_class
from nemo_mapo.config.data import PromptConfig
from nemo_mapo.config.load import ConfigError, register_defaults
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.config.run import MAX_SEED, PretrainedConfig, RolloutConfig

Count = Annotated[int, Field(ge=1)]


@config_class
class BenchmarkConfig:
    """Which benchmark, and where its published file is."""

    name: Literal["mmau", "mmar", "mmsu", "mmau_pro"]
    """The layout of the file."""
    items_path: str
    """The published file: .json, .jsonl or .parquet."""
    audio_root: str | None = None
    """Directory that the file's audio paths start from; null is the directory of the file."""
    fields: dict[str, str | None] = Field(default_factory=dict)
    """Our name of a field to its key in the file, where that is not the published one; null leaves out its tables."""
    keep_defective: bool = False
    """Keep items whose answer is not among their choices in the denominator, instead of refusing the file."""
    closed_rule: Literal["strict", "embedding"] = "strict"
    """How a response names a choice: by its text or letter, or as the one with the nearest embedding (MMAU-Pro's)."""


@config_class
class EvaluationDataConfig:
    """How items become prompts."""

    tokenizer: str
    """Directory of a Hugging Face tokenizer."""
    prompt: PromptConfig = PromptConfig()
    sample_rate: Count = 16000
    """Hz; clips of another rate are resampled, channels are averaged."""
    max_clip_seconds: Annotated[float, Field(gt=0)] | None = None
    """Longer clips are cut to their beginning, and counted in the results; null reads them whole."""
    clip_gap_seconds: Annotated[float, Field(ge=0)] | None = None
    """Join the clips of an item that has several, in published order, with this silence between them; null gives them
    to the model one by one."""


@config_class
class StatisticsConfig:
    """Confidence intervals."""

    bootstrap_samples: Count = 10000
    """Resampled item sets, for ratings: right and wrong answers have intervals in closed form."""
    seed: int = 0
    """Of the resampling."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the intervals."""


@config_class
class EvaluationConfig:
    """The whole config of `examples/evaluate.py`."""

    output_dir: str = "runs/evaluation"
    """Where predictions and results are written; an evaluation that was cut off goes on from what is there."""
    seed: Annotated[int, Field(ge=0, lt=MAX_SEED)] = 0
    """Of sampling, where rollout.sampling.temperature is not 0."""
    shuffle_choices: int | None = None
    """Seed of another order of each question's choices; null shows the published order."""
    template: Literal["think", "think_answer", "reasoning", "mpar2", "none"] = "think"
    """What surrounds the answer in a completion; `none` takes the whole completion as the answer."""
    num_threads: Count | None = None
    """torch threads on a CPU host; null leaves torch's choice."""
    pretrained_checkpoint: PretrainedConfig = PretrainedConfig()
    benchmark: BenchmarkConfig
    data: EvaluationDataConfig
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    judge: JudgeConfig = JudgeConfig()
    statistics: StatisticsConfig = StatisticsConfig()

    def __post_init__(self) -> None:
        if self.rollout.vllm is not None:
            self.rollout.vllm.check_model(self.model)


def register_evaluation_defaults() -> None:
    """Give Hydra every key with its default, so that each can be overridden."""
    register_defaults()
    store = ConfigStore.instance()
    for group, section in (("judge", JudgeConfig()), ("statistics", StatisticsConfig())):
        store.store(group=group, name="defaults", node=dataclasses.asdict(section))
    benchmark = BenchmarkConfig(name="mmau", items_path="")
    store.store(group="benchmark", name="defaults", node=_without(benchmark, "name", "items_path"))
    store.store(
        group="data", name="evaluation_defaults", node=_without(EvaluationDataConfig(tokenizer=""), "tokenizer")
    )
    whole = EvaluationConfig(benchmark=benchmark, data=EvaluationDataConfig(tokenizer=""))
    sections = ("benchmark", "data", "model", "rollout", "judge", "statistics")
    store.store(name="evaluation_defaults", node=_without(whole, *sections))


def validate_evaluation(composed: DictConfig | dict[str, Any]) -> EvaluationConfig:
    """Check the whole config at once; ConfigError names every offending path with its value."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else composed
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {error}") from error
    try:
        return TypeAdapter(EvaluationConfig).validate_python(plain)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [f"  {'.'.join(map(str, one['loc']))}={one['input']!r}: {one['msg']}" for one in problems]
        raise ConfigError("\n".join([f"config, {len(lines)} to correct:", *lines])) from error


def as_plain_evaluation(config: EvaluationConfig) -> dict[str, Any]:
    """Nested dictionaries of builtins, for writing the resolved config."""
    plain: dict[str, Any] = TypeAdapter(EvaluationConfig).dump_python(config, mode="json")
    return plain


def _without(section: Any, *names: str) -> dict[str, Any]:
    """A section's keys but for those that have no default or come from a group of their own."""
    return {name: value for name, value in dataclasses.asdict(section).items() if name not in names}
