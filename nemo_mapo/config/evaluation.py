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
    """The published file: .json, .jsonl or .parquet. With `multiple_choice` your questions: also .csv, or cuts."""
    audio_root: PathText | None = None
    """Directory that the file's audio paths start from; null is the directory of the file."""
    fields: dict[str, str | None] = Field(default_factory=dict)
    """Our name of a field to its key in the file, if that is not the published one; null leaves out its tables. With
    `multiple_choice` also fields of yours to tabulate by."""
    keep_defective: Flag = False
    """Keep items whose answer is not among their choices in the denominator, instead of refusing the file."""
    closed_rule: Literal["strict", "embedding"] = "strict"
    """How a response names a choice: by its text or letter, or as the one with the nearest embedding (MMAU-Pro's)."""


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
    """Join the clips of an item that has several, in published order, with this silence between them; null gives them
    to the model one by one."""


@config_class
class StatisticsConfig:
    """Confidence intervals."""

    bootstrap_samples: Count = 10000
    """Resampled item sets, for ratings: right and wrong answers have intervals in closed form."""
    seed: OrderSeed = 0
    """Of the resampling."""
    confidence: OpenFraction = 0.95
    """Of the intervals."""


@config_class
class EvaluationConfig:
    """The whole config of `examples/evaluate.py`."""

    output_dir: PathText = "runs/evaluation"
    """Where predictions and results are written; an interrupted evaluation continues from what is there."""
    seed: Seed = 0
    """Of sampling, where rollout.sampling.temperature is not 0."""
    shuffle_choices: OrderSeed | None = None
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
