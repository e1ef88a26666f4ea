"""Turns what Hydra composed, or a recorded file, into a typed config; DictConfig stops here."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from nemo_mapo.config.explain import explain

T = TypeVar("T")


class ConfigError(ValueError):
    """An invalid config; the message has a line per problem: path, value, what would be right."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([f"config: {count}", *(f"  {problem}" for problem in problems)]))


def load(composed: Any, schema: type[T], *, under: str = "") -> T:
    """Check a whole config at once.

        load(compose(Path("conf/train_mapo.yaml"), ["objective=grpo"]), RunConfig).objective.mask  # "none"

    Args:
        composed: what Hydra composed, or recorded nested dictionaries; None is an empty section.
        schema: class of the result, defined with `config_class`.
        under: path of the section, if it is not the whole config.

    Raises:
        ConfigError: naming every offending path with its value and what would be right.
    """
    plain = _plain(composed) if isinstance(composed, DictConfig) else {} if composed is None else composed
    left_open = [f"{key}: missing; it must be set" for key in _left_open(plain, under)]
    try:
        config = TypeAdapter(schema).validate_python(plain)
    except ValidationError as error:
        problems = explain(error, schema, under=under, unresolved=bool(left_open))
        raise ConfigError(*left_open, *problems) from error
    if left_open:
        raise ConfigError(*left_open)
    return config


def as_plain(config: Any) -> dict[str, Any]:
    """Nested dictionaries of builtins, for writing a config; `load` turns them into the same config again."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def differences(before: dict[str, Any], now: dict[str, Any], *, free: Collection[str]) -> list[str]:
    """Differences of two configs as `key: this then, that now`, except for `free` keys and everything below them."""
    old, new = flat(before), flat(now)
    return [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{one}.") for one in free)
    ]


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key: `flat({"a": {"b": 1}})` is `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


_REQUIRED = "${required:}"
"""Our mark of a required value; unlike Hydra's own, ???, it also overrides a default."""
OmegaConf.register_new_resolver("required", lambda: "???", replace=True)


def _plain(composed: DictConfig) -> Any:
    # A value that refers to a missing one cannot be resolved, but is not a second problem.
    unresolved = OmegaConf.to_container(composed)
    if list(_left_open(unresolved)):
        return unresolved
    try:
        return OmegaConf.to_container(composed, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(interpolation_problem(error)) from error


def interpolation_problem(error: Exception) -> str:
    """The problem of a value that refers to another one: `data.tokenizer: Interpolation key 'x' not found`."""
    if isinstance(error, RecursionError):
        return "values refer to each other in a circle, or sections are nested too deeply"
    key = getattr(error, "full_key", None)
    return f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]


def _left_open(value: Any, path: str = "") -> Iterator[str]:
    """Paths of required values that are not set."""
    if value in ("???", _REQUIRED):
        yield path
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _left_open(inner, f"{path}.{key}" if path else str(key))
