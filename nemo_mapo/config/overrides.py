"""Overrides of a command line: options of config groups, which Hydra composes, and values, which are set afterwards."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mapo.config.explain import nearest
from nemo_mapo.config.load import ConfigError

_SEARCH_PATH = "hydra.searchpath"
_GLOBAL = "@package _global_"
"""Header of a file that sets keys of the whole config; its group is not a section."""


@dataclass(frozen=True)
class Groups:
    """The config groups of some directories and of the registered defaults."""

    directories: tuple[Path, ...]

    def __contains__(self, name: object) -> bool:
        is_name = isinstance(name, str) and "." not in name and name != ""
        return is_name and (
            any(os.path.isdir(folder / str(name)) for folder in self.directories) or bool(_stored(name))
        )

    def options(self, name: str) -> list[str]:
        """The options of a group."""
        files = {path.stem for path in self._files(name)}
        return sorted(files | {entry.removesuffix(".yaml") for entry in _stored(name) if entry.endswith(".yaml")})

    def is_global(self, name: str) -> bool:
        """Whether its options set keys of the whole config."""
        return any(_GLOBAL in path.read_text() for path in self._files(name))

    def _files(self, name: str) -> Iterator[Path]:
        for folder in self.directories:
            yield from (folder / name).glob("*.yaml")


def _stored(group: object) -> tuple[str, ...]:
    """What is registered in a group: options as `name.yaml`, and groups inside it."""
    node: Any = ConfigStore.instance().repo
    for part in str(group).split("/"):
        node = node.get(part) if isinstance(node, dict) else None
    return tuple(node) if isinstance(node, dict) else ()


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def parse(texts: Sequence[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar; ConfigError naming those that do not follow it."""
    read = [_parse_one(text) for text in texts]
    if unreadable := [one for one in read if isinstance(one, str)]:
        raise ConfigError(*unreadable)
    return [one for one in read if isinstance(one, Override)]


def _parse_one(text: str) -> Override | str:
    """An override, or what is wrong with it."""
    key, equals, value = text.partition("=")
    try:
        read = _parser().parse_override(text)
    except (HydraException, RecursionError):
        if not equals or not key:
            return f"{text!r}: not key=value"
        return f"{text}: the value cannot be read; in quotes it is a text: \"{key}='{value}'\" ([a,b] is a list)"
    if not read.key_or_group:
        return f"{text!r}: not key=value"
    if read.is_sweep_override():
        return f"{text}: one value is needed: a list is {key}=[{value}], a text with a comma \"{key}='{value}'\""
    return read


def given_search_path(overrides: Sequence[Override]) -> list[Path] | None:
    """Directories of hydra.searchpath; None if it is not set."""
    for one in overrides:
        if _sets_search_path(one):
            value: Any = one.value()
            return [Path(str(path).removeprefix("file://")) for path in value]
    return None


def check_options(overrides: Sequence[Override], groups: Groups) -> None:
    """ConfigError naming every error that can be found before anything is composed."""
    if problems := [problem for one in overrides for problem in _problems(one, groups)]:
        raise ConfigError(*problems)


def _problems(override: Override, groups: Groups) -> Iterator[str]:
    text, key = override.input_line, override.key_or_group
    if key.startswith("hydra") and not _sets_search_path(override):
        yield f"{text}: Hydra's own settings have no effect here; a run is written to exp_manager.explicit_log_dir"
    elif "/" in key and key not in groups:
        yield f"{text}: no such config group"
    elif _chooses(override, groups):
        for option in _options(override):
            if str(option) not in (known := groups.options(key)):
                yield f"{text}: {key} has no option {option}{nearest(str(option), known)}"


def options_for_hydra(overrides: Sequence[Override], groups: Groups, chosen: Mapping[str, Any]) -> list[str]:
    """The chosen options in Hydra's syntax: `+` for a group that has no option yet, `~` to remove one that has.

    Args:
        overrides, groups: of the command line.
        chosen: the options of the primary config's groups.
    """
    return [text for one in overrides if one.key_or_group in groups for text in _choice(one, groups, chosen)]


def _choice(override: Override, groups: Groups, chosen: Mapping[str, Any]) -> list[str]:
    group = override.key_or_group
    if override.is_delete() or _is_nothing(override, groups):
        return [f"~{group}"] if chosen.get(group) is not None else []
    if not _chooses(override, groups):
        return []
    placed = group if override.package is None else f"{group}@{override.package}"
    plain = str(override.input_line).lstrip("+")
    return [plain if placed in chosen else f"+{plain}"]


def set_values(composed: DictConfig, overrides: Sequence[Override], groups: Groups) -> None:
    """Set and remove keys, in order; ConfigError naming an override that cannot be applied.

    A key that does not exist is added; the schema decides whether it is valid.
    """
    for one in overrides:
        key = one.key_or_group
        if _is_nothing(one, groups) and "/" not in key and not groups.is_global(key):
            # Without an option there is no section; the schema decides whether it is required.
            composed[key] = None
        elif _sets_search_path(one) or _chooses(one, groups) or (one.is_delete() and key in groups):
            continue
        elif one.is_delete():
            _delete(composed, one)
        else:
            _set(composed, one)


def _set(composed: DictConfig, override: Override) -> None:
    try:
        OmegaConf.update(composed, override.key_or_group, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{override.input_line}: {str(error).splitlines()[0]}") from error


def _delete(composed: DictConfig, override: Override) -> None:
    path, value = override.key_or_group, override.value()
    parent, _, name = path.rpartition(".")
    section = OmegaConf.select(composed, parent) if parent else composed
    if not isinstance(section, DictConfig) or name not in section:
        here = list(section) if isinstance(section, DictConfig) else []
        known = [f"{parent}.{key}" if parent else str(key) for key in here]
        raise ConfigError(f"{override.input_line}: there is no {path} to remove{nearest(path, known)}")
    if value is not None and value != section[name]:
        raise ConfigError(f"{override.input_line}: {path} is {section[name]}; ~{path} removes it whatever its value")
    del section[name]


def _chooses(override: Override, groups: Groups) -> bool:
    """Whether the override chooses an option of a group; a section that is written out is a value instead."""
    return override.key_or_group in groups and not override.is_delete() and not isinstance(override.value(), dict)


def _is_nothing(override: Override, groups: Groups) -> bool:
    return _chooses(override, groups) and override.value() is None


def _options(override: Override) -> list[Any]:
    value = override.value()
    return value if isinstance(value, list) else [] if value is None else [value]


def _sets_search_path(override: Override) -> bool:
    return bool(override.key_or_group == _SEARCH_PATH)
