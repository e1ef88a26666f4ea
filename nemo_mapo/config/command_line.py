"""The command line of every entry point that has a Hydra config: overrides, options, help, and a checked config.

Nothing here imports torch or NeMo, so that a typo is reported at once.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mapo.config.compose import compose, compose_with_hydra
from nemo_mapo.config.explain import nearest
from nemo_mapo.config.load import ConfigError, interpolation_problem, load
from nemo_mapo.config.overrides import Groups
from nemo_mapo.processes import is_main_rank

T = TypeVar("T")

_HEAD_START_SECONDS = 1.0

_OPTIONS = """
Options:
  --cfg job [--resolve]   print the composed config and stop (--resolve: with references resolved)
  --info                  print where it was composed from and stop
  --config-name NAME      another primary config of conf/, or a file of your own
  --config-path DIR       the directory of the primary config and its groups
  --config-dir DIR        a directory with more options for the groups
Every key with its type, default and meaning: docs/configuration.md
"""


def read_command_line(
    primary: Path, schema: type[T], arguments: Sequence[str] | None = None, *, check: Callable[[T], None] | None = None
) -> T:
    """Read and check the config of this process's command line; if it is wrong, end the process with one message.

    --help, --cfg and --info are handled here and end the process too.

    Args:
        primary: the config that is composed, unless the command line names another.
        schema: class of the result.
        arguments: the command line without the program's name; None is that of this process.
        check: a further check of the config, e.g. of its paths; raises ConfigError.
    """
    try:
        config = load(compose_command_line(primary, arguments), schema)
        if check is not None:
            check(config)
        return config
    except ConfigError as error:
        end_with(error)


def compose_command_line(
    primary: Path, arguments: Sequence[str] | None = None, *, description: str | None = None
) -> DictConfig:
    """Compose the config of the command line without checking it; --help, --cfg and --info end the process.

    Args:
        primary, arguments: as in `read_command_line`.
        description: first text that --help prints, instead of the config's hydra.help.header.

    Raises:
        ConfigError: naming every override, group option or file that cannot be used.
    """
    given = _parse(sys.argv[1:] if arguments is None else arguments)
    path = _primary(primary, given)
    search_path = [] if given.config_dir is None else [given.config_dir]
    if given.help:
        print(_help(path, search_path, description))
        sys.exit(0)
    if given.info:
        print(_information(path, given.overrides, search_path))
        sys.exit(0)
    composed = compose(path, given.overrides, search_path=search_path)
    if given.cfg:
        print(_as_yaml(composed, resolve=given.resolve))
        sys.exit(0)
    return composed


def end_with(error: Exception) -> NoReturn:
    """End the process with a message that the main rank prints; other ranks wait a moment for it.

    They wait because torchrun ends all processes as soon as one has ended.
    """
    if is_main_rank():
        sys.exit(str(error))
    time.sleep(_HEAD_START_SECONDS)
    sys.exit(1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report an unknown option."""
        known = [option for action in self._actions for option in action.option_strings]
        wrong = message.removeprefix("unrecognized arguments: ").split()[0]
        raise ConfigError(f"{message}{nearest(wrong, known)}" if wrong.startswith("-") else message)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--info", "-i", action="store_true")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-path", "-cp", type=Path)
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--multirun", "-m", action="store_true")
    given = parser.parse_intermixed_args(list(arguments))
    if given.multirun:
        raise ConfigError(
            "--multirun: a command makes one run; write a loop in the shell, as examples/ablation.py does"
        )
    return given


def _primary(default: Path, given: argparse.Namespace) -> Path:
    """The file that --config-path and --config-name name: in conf/, below the working directory, or as a path."""
    folder = default.parent if given.config_path is None else given.config_path
    if given.config_name is None:
        return folder / default.name
    named = Path(given.config_name)
    named = named if named.suffix in (".yaml", ".yml") else named.with_name(f"{named.name}.yaml")
    inside = folder / named
    return named if os.path.isfile(named) and not os.path.isfile(inside) else inside


def _help(primary: Path, search_path: Sequence[Path], description: str | None) -> str:
    composed = compose_with_hydra(primary, search_path=search_path)
    groups = Groups((primary.parent, *search_path))
    about = description or str(composed.hydra.help.header)
    lines = [f"  {name}: {', '.join(_shown(groups.options(name)))}" for name in _choices(composed)]
    return "\n".join([about.strip(), "", "Config groups (group=option):", *lines, _OPTIONS.rstrip()])


def _shown(options: Sequence[str]) -> list[str]:
    """The options that a user chooses; the others only hold their defaults."""
    return [option for option in options if not option.endswith("_defaults")]


def _information(primary: Path, overrides: Sequence[str], search_path: Sequence[Path]) -> str:
    composed = compose_with_hydra(primary, overrides, search_path=search_path)
    chosen = [f"  {name}={'null' if option is None else option}" for name, option in _choices(composed).items()]
    places = [f"  {source.path}" for source in composed.hydra.runtime.config_sources if source.schema == "file"]
    return "\n".join([f"Primary config:\n  {primary.absolute()}", "Search path:", *places, "Chosen:", *chosen])


def _choices(composed: DictConfig) -> dict[str, str | None]:
    """The option of each group of this config."""
    choices = composed.hydra.runtime.choices.items()
    return {str(name): option for name, option in sorted(choices) if not str(name).startswith("hydra/")}


def _as_yaml(composed: DictConfig, *, resolve: bool) -> str:
    try:
        return str(OmegaConf.to_yaml(composed, resolve=resolve)).rstrip()
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(interpolation_problem(error)) from error
