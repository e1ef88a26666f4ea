"""From Hydra's composed DictConfig to the typed `RunConfig`; DictConfig stops here."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from nemo_mapo.config.data import DatasetConfig, PromptConfig, TargetConfig
from nemo_mapo.config.model import ConvPerceptionConfig, ModelConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import (
    ExpManagerConfig,
    PretrainedConfig,
    RolloutConfig,
    RunConfig,
)
from nemo_mapo.config.trainer import TrainerConfig


class ConfigError(ValueError):
    """The composed config cannot be run; the message lists path, value and what would be right."""


def register_defaults() -> None:
    """Give Hydra every key with its default, so that each can be overridden and shows in `--cfg job`."""
    store = ConfigStore.instance()
    for group, name, default in (
        ("objective", "defaults", ObjectiveConfig()),
        ("model/perception", "conv", ConvPerceptionConfig()),
        ("rollout", "defaults", RolloutConfig()),
        ("rewards", "defaults", RewardsConfig()),
        ("trainer", "defaults", TrainerConfig()),
    ):
        store.store(group=group, name=name, node=dataclasses.asdict(default))
    # The encoder has a group of its own: other kinds have other keys.
    model = {key: value for key, value in dataclasses.asdict(ModelConfig()).items() if key != "perception"}
    store.store(group="model", name="defaults", node=model)
    store.store(
        name="run_defaults",
        node={
            "exp_manager": dataclasses.asdict(ExpManagerConfig()),
            "pretrained_checkpoint": dataclasses.asdict(PretrainedConfig()),
        },
    )
    split = {field.name: field.default for field in dataclasses.fields(DatasetConfig) if field.name != "input_cfg"}
    splits = {"train_ds": split, "validation_ds": split, "test_ds": split}
    words = {"prompt": dataclasses.asdict(PromptConfig()), "target": dataclasses.asdict(TargetConfig())}
    store.store(group="data", name="split_defaults", node={**words, **splits})


def validate(composed: DictConfig | dict[str, Any]) -> RunConfig:
    """Check the whole config at once.

    Raises:
        ConfigError: naming every offending path with its value and what would be right.
    """
    if isinstance(composed, DictConfig) and (left_open := list(_left_open(OmegaConf.to_container(composed)))):
        raise ConfigError(
            "\n".join(["config: left to you", *(f"  {key}: missing; it must be set" for key in left_open)])
        )
    try:
        plain = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else composed
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {error}") from error
    try:
        return TypeAdapter(RunConfig).validate_python(plain)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


_REQUIRED = "${required:}"
"""Our mark for what the user has to give in place of a default; Hydra's own, ???, does not displace one."""
OmegaConf.register_new_resolver("required", lambda: "???", replace=True)


def _left_open(value: Any, path: str = "") -> Iterator[str]:
    """Paths of the values that the user has to give."""
    if value in ("???", _REQUIRED):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _left_open(inner, f"{path}.{key}" if path else str(key))


def as_plain(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries of builtins, for writing the resolved config."""
    plain: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return plain


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    lines = [f"config: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    for problem in problems:
        path = ".".join(_as_typed(problem["loc"])) or "(whole config)"
        if problem["type"] == "unexpected_keyword_argument":
            lines.append(f"  {path}={problem['input']!r}: unknown key{_suggest(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"  {path}: missing; it must be set")
        elif problem["type"] == "value_error":
            lines.append(f"  {path}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {path}={problem['input']!r}: {problem['msg']}")
    return "\n".join(lines)


def _as_typed(location: tuple[int | str, ...]) -> list[str]:
    """The keys as the user writes them: without the tag that says which member of a union was tried."""
    parts = [str(part) for part in location]
    return [part for before, part in zip(["", *parts], parts, strict=False) if not _is_union_tag(before, part)]


def _is_union_tag(section: str, part: str) -> bool:
    return section == "perception" and part in ("conv", "nemo", "qwen_omni", "whisper")


def _suggest(location: tuple[int | str, ...]) -> str:
    """Name the nearest known key of the same section."""
    section: Any = RunConfig
    for part in location[:-1]:
        field = {f.name: f for f in dataclasses.fields(section)}.get(str(part))
        if field is None or not dataclasses.is_dataclass(field.type):
            return ""
        section = field.type
    known = [field.name for field in dataclasses.fields(section)]
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"
