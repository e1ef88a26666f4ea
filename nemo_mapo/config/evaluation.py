"""The whole config of `examples/evaluate.py`."""

from typing import Literal

from pydantic import Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.data import PromptConfig
from nemo_mapo.config.fields import Count, Flag, OpenFraction, OrderSeed, PathText, Seconds, SecondsOrZero, Seed
from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.config.run import PretrainedConfig, RolloutConfig


@config_class
class BenchmarkConfig:
    """Which benchmark, and where its published file is."""

    name: Literal["mmau", "mmar", "mmsu", "mmau_pro", "multiple_choice"]
    """The layout of the file."""
    items_path: PathText
    """The published file: .json, .jsonl or .parquet. With `multiple_choice` your own questions: also .csv, or cuts."""
    audio_root: PathText | None = None
    """Directory that the file's audio paths are relative to; null means the file's own directory."""
    fields: dict[str, str | None] = Field(default_factory=dict)
    """Maps our name of a field to its key in the file, if that is not the published one; null omits its tables. With
    `multiple_choice` also your own fields to tabulate by."""
    keep_defective: Flag = False
    """Keep items whose answer is not among their choices in the denominator, instead of refusing the file."""
    closed_rule: Literal["strict", "embedding"] = "strict"
    """How a response is matched to a choice: by text or letter, or by the nearest embedding (MMAU-Pro's rule)."""


@config_class
class EvaluationDataConfig:
    """How items become prompts."""

    tokenizer: PathText
    """Directory of a Hugging Face tokenizer."""
    prompt: PromptConfig = PromptConfig()
    sample_rate: Count = 16000
    """Hz; clips of another rate are resampled, channels are averaged."""
    max_clip_seconds: Seconds | None = None
    """Longer clips are truncated and counted in the results; null reads them whole."""
    clip_gap_seconds: SecondsOrZero | None = None
    """Join the clips of an item that has several, in published order, with this silence between them; null passes them
    to the model one by one."""


@config_class
class StatisticsConfig:
    """Confidence intervals."""

    bootstrap_samples: Count = 10000
    """Resampled item sets, for ratings: right and wrong answers have intervals in closed form."""
    seed: OrderSeed = 0
    """Seed of the resampling."""
    confidence: OpenFraction = 0.95
    """Confidence level of the intervals."""


@config_class
class EvaluationConfig:
    """The whole config of `examples/evaluate.py`."""

    output_dir: PathText = "runs/evaluation"
    """Where predictions and results are written; an interrupted evaluation continues from what is there."""
    seed: Seed = 0
    """Seed of sampling, if rollout.sampling.temperature is not 0."""
    shuffle_choices: OrderSeed | None = None
    """Seed for shuffling each question's choices; null keeps the published order."""
    template: Literal["think", "think_answer", "reasoning", "mpar2", "none"] = "think"
    """What surrounds the answer in a completion; `none` takes the whole completion as the answer."""
    num_threads: Count | None = None
    """torch threads on a CPU host; null keeps torch's default."""
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
