"""Hands the schemas' defaults to Hydra, so that every key can be overridden and shows in `--cfg job`."""

import dataclasses
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore

from nemo_mapo.config.data import DatasetConfig, PromptConfig, TargetConfig
from nemo_mapo.config.evaluation import BenchmarkConfig, EvaluationConfig, EvaluationDataConfig, StatisticsConfig
from nemo_mapo.config.exp_manager import ExpManagerConfig
from nemo_mapo.config.model import ConvPerceptionConfig, ModelConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import JudgeConfig, RewardsConfig
from nemo_mapo.config.run import PretrainedConfig, RolloutConfig
from nemo_mapo.config.trainer import TrainerConfig


@cache
def register_defaults() -> None:
    """Register each section as option `defaults` of its group, or under its own name if the section has kinds."""
    for group, section in (
        ("objective", ObjectiveConfig()),
        ("rollout", RolloutConfig()),
        ("rewards", RewardsConfig()),
        ("trainer", TrainerConfig()),
        ("judge", JudgeConfig()),
        ("statistics", StatisticsConfig()),
    ):
        _store("defaults", dataclasses.asdict(section), group)
    # The encoder has a group of its own: other kinds have other keys.
    _store("conv", dataclasses.asdict(ConvPerceptionConfig()), "model/perception")
    _store("defaults", _without(ModelConfig(), "perception"), "model")
    split = {field.name: field.default for field in dataclasses.fields(DatasetConfig) if field.name != "input_cfg"}
    words = {"prompt": dataclasses.asdict(PromptConfig()), "target": dataclasses.asdict(TargetConfig())}
    _store("split_defaults", {**words, "train_ds": split, "validation_ds": split, "test_ds": split}, "data")
    benchmark = BenchmarkConfig(name="mmau", items_path="unset")
    data = EvaluationDataConfig(tokenizer="unset")
    _store("defaults", _without(benchmark, "name", "items_path"), "benchmark")
    _store("evaluation_defaults", _without(data, "tokenizer"), "data")
    start = {"pretrained_checkpoint": dataclasses.asdict(PretrainedConfig())}
    _store("run_defaults", {"exp_manager": dataclasses.asdict(ExpManagerConfig()), **start})
    sections = ("benchmark", "data", "model", "rollout", "judge", "statistics")
    _store("evaluation_defaults", _without(EvaluationConfig(benchmark=benchmark, data=data), *sections))


def _store(name: str, node: dict[str, Any], group: str | None = None) -> None:
    ConfigStore.instance().store(name=name, node=node, group=group)


def _without(section: Any, *names: str) -> dict[str, Any]:
    """A section's values except those that have no default or come from their own group."""
    return {name: value for name, value in dataclasses.asdict(section).items() if name not in names}
