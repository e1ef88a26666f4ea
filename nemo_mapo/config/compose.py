"""Hydra's composition of `conf/` and overrides, with errors in the words of `load` instead of Hydra's."""

import copy
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import yaml
from hydra import compose as compose_by_hydra
from hydra import initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mapo.config.defaults import register_defaults
from nemo_mapo.config.explain import nearest
from nemo_mapo.config.load import ConfigError
from nemo_mapo.config.overrides import (
    Groups,
    check_options,
    given_search_path,
    options_for_hydra,
    parse,
    set_values,
)
from nemo_mapo.config.yaml_files import UNREADABLE, Stamp, bomb_in, read_yaml, stamps_of, unreadable

_ADVICE = ("To append", "See https", "full_key", "object_type")
"""Beginnings of the lines in Hydra's errors that concern Hydra's own checks."""


def compose(primary: Path, overrides: Sequence[str] = (), *, search_path: Sequence[Path] = ()) -> DictConfig:
    """Compose a config as Hydra does, without checking it against a schema.

        compose(Path("conf/train_mapo.yaml"), ["objective=grpo", "trainer.mapo.max_steps=20", "~warm_start"])

    A value can be set with or without `+`: the schema decides whether the key exists (`load`).

    Args:
        primary: the file that the composition begins with; its directory holds the config groups.
        overrides: key=value, group=option, ~key.
        search_path: directories with more options for the groups.

    Raises:
        ConfigError: naming every override, group option or file that cannot be used.
    """
    composed = compose_with_hydra(primary, overrides, search_path=search_path)
    composed.pop("hydra")
    return composed


def compose_with_hydra(primary: Path, overrides: Sequence[str] = (), *, search_path: Sequence[Path] = ()) -> DictConfig:
    """Like `compose`, but with Hydra's own settings under the key `hydra`."""
    register_defaults()
    _check_directories(primary, search_path)
    asked = parse(overrides)
    given = given_search_path(asked)
    groups = Groups((primary.parent, *search_path, *(_written_search_path(primary) if given is None else given)))
    stamps = stamps_of(groups.directories)
    if bombs := [problem for stamp in stamps if (problem := bomb_in(stamp)) is not None]:
        raise ConfigError(*bombs)
    check_options(asked, groups)
    searched = f"hydra.searchpath=[{','.join(_quoted(path) for path in groups.directories[1:])}]"
    chosen = _by_hydra(primary.absolute(), (searched,), stamps).hydra.runtime.choices
    options = options_for_hydra(asked, groups, chosen)
    composed = copy.deepcopy(_by_hydra(primary.absolute(), (searched, *options), stamps))
    OmegaConf.set_struct(composed, False)
    set_values(composed, asked, groups)
    return composed


@lru_cache(maxsize=256)
def _by_hydra(primary: Path, overrides: tuple[str, ...], stamps: tuple[Stamp, ...]) -> DictConfig:
    """Hydra's composition of these files, cached for processes that compose often (tests, an ablation)."""
    try:
        with initialize_config_dir(str(primary.parent), version_base=None):
            return compose_by_hydra(primary.stem, overrides=list(overrides), return_hydra_config=True)
    except MissingConfigException as error:
        raise ConfigError(_missing(error)) from error
    except (HydraException, OmegaConfBaseException, OSError, *UNREADABLE) as error:
        raise ConfigError(_blamed(error, stamps)) from error


def _blamed(error: BaseException, stamps: Sequence[Stamp]) -> str:
    """Name the unreadable file, searching these files if the error does not name it; otherwise quote Hydra."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return unreadable(error, error.problem_mark.name)
    if isinstance(error, UNREADABLE) and not isinstance(error, OmegaConfBaseException):
        for stamp in stamps:
            try:
                read_yaml(stamp.path.read_bytes(), stamp.path)
            except ValueError as problem:
                return str(problem)
    return _own_words(error)


def _missing(error: MissingConfigException) -> str:
    """`In 'train_mapo': Could not find 'model/tiny'`, with what is available."""
    first = str(error).splitlines()[0]
    wanted = Path(error.missing_cfg_file or "").name
    return first + (nearest(wanted, error.options) if error.options else "")


def _own_words(error: BaseException) -> str:
    """The error without Hydra's advice, or its cause if it says nothing."""
    if isinstance(error, RecursionError):
        return "sections are nested too deeply, or contain themselves"
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(_ADVICE)]
    if not told and error.__cause__ is not None:
        return _own_words(error.__cause__)
    return " ".join(told) or type(error).__name__


def _written_search_path(primary: Path) -> list[Path]:
    """Directories that the primary config names under hydra.searchpath."""
    text = primary.read_text(errors="replace")
    try:
        written = read_yaml(text, primary) if "searchpath" in text else None
    except ValueError as error:
        raise ConfigError(str(error)) from error
    hydra = written.get("hydra") if isinstance(written, dict) else None
    found = hydra.get("searchpath") if isinstance(hydra, dict) else None
    return [Path(str(path).removeprefix("file://")) for path in found] if isinstance(found, list) else []


def _check_directories(primary: Path, search_path: Sequence[Path]) -> None:
    if not os.path.isfile(primary):
        beside = primary.parent.glob("*.yaml") if os.path.isdir(primary.parent) else ()
        known = sorted(path.stem for path in beside)
        raise ConfigError(f"no config file {primary}{nearest(primary.stem, known)}")
    if missing := [str(path) for path in search_path if not os.path.isdir(path)]:
        raise ConfigError(*(f"--config-dir {path}: no such directory" for path in missing))


def _quoted(path: Path) -> str:
    text = str(path.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'file://{text}'"
