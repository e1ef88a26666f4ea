"""Problems of a config in terms of the keys that the user typed: a line for each, with the nearest known key."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from nemo_mapo.config.habits import HABITS

_LONGEST_VALUE = 200
"""Characters of a value that a message repeats."""
_MOST_PLACES = 3
"""Keys or sections that a message names as examples."""


def explain(error: ValidationError, schema: type, *, under: str = "", unresolved: bool = False) -> list[str]:
    """One line per problem.

    Args:
        error: what the schema said.
        schema: the class that was to be built.
        under: path of the section that was checked.
        unresolved: whether values may contain unresolved references; problems that these may cause are left out.
    """
    problems = error.errors(include_url=False, include_context=False)
    kept = [problem for problem in problems if not (unresolved and _may_be_unresolved(problem))]
    return [_line(problem, schema, under) for problem in kept]


def _may_be_unresolved(problem: Mapping[str, Any]) -> bool:
    value = problem["input"]
    return problem["type"] == "value_error" or (isinstance(value, str) and ("${" in value or value == "???"))


def nearest(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or what is known, for the end of a message."""
    names = list(known)
    near = difflib.get_close_matches(wrong, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names)}" if names else ""


def keys_of(schema: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all keys of a config class, including those inside sections."""
    for section in _sections(schema):
        for name, kind in _fields(section).items():
            yield f"{path}{name}"
            yield from keys_of(kind, f"{path}{name}.")


def _line(problem: Mapping[str, Any], schema: type, under: str) -> str:
    keys, holder, kind = _walk(schema, problem["loc"])
    path, value = ".".join([*filter(None, [under]), *keys]), problem["input"]
    # A section is too long to repeat.
    place = path if isinstance(value, dict) else f"{path}={_shown(value)}"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{place}: unknown key{_suggest(path, keys[-1], holder, schema)}"
    if problem["type"] == "missing":
        return f"{path}: missing; it must be set"
    if problem["type"] == "value_error":
        said = problem["msg"].removeprefix("Value error, ")
        return f"{place}: {said}" if path else str(said)
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"{path}: {_wrong_tag(keys[-1], value, kind)}"
    if problem["type"] in ("dataclass_type", "model_attributes_type"):
        return f"{place}: a section with keys belongs here ({', '.join(_keys(kind)[:_MOST_PLACES])}, ...)"
    return f"{path}={_shown(value)}: {problem['msg']}"


def _wrong_tag(name: str, value: Any, kind: Any) -> str:
    """What to write as `type` of a section that can be of several kinds."""
    tags = [str(_tag(section)) for section in _sections(kind)]
    given = value.get("type") if isinstance(value, Mapping) else None
    if given is None:
        near = difflib.get_close_matches(name, tags, n=1)
        return f"type: missing; one of {', '.join(tags)}" + (f"; did you mean {near[0]}?" if near else "")
    return f"type={given!r}: unknown{nearest(str(given), tags)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _walk(schema: type, location: tuple[int | str, ...]) -> tuple[list[str], Any, Any]:
    """The keys of a location as typed (without union tags), the type that holds the last key, and that key's type."""
    keys: list[str] = []
    holder: Any = schema
    kind: Any = schema
    for part in location:
        options = list(_sections(kind))
        if len(options) > 1 and (tagged := [option for option in options if _tag(option) == part]):
            kind = tagged[0]
            continue
        keys.append(str(part))
        holder, kind = kind, _inside(kind, part)
    return keys, holder, kind


def _inside(kind: Any, part: int | str) -> Any:
    """The type of a key of a section, or of an item of a list; None if that is not known."""
    for section in _sections(kind):
        if part in (fields := _fields(section)):
            return fields[str(part)]
    arguments = get_args(_bare(kind))
    if get_origin(_bare(kind)) is dict:
        return arguments[1]
    return next((argument for argument in arguments if argument is not Ellipsis), None)


def _sections(kind: Any) -> Iterator[type]:
    """The config classes that a value of this type can be an instance of."""
    kind = _bare(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield kind
    elif get_origin(kind) in (Union, types.UnionType, tuple):
        for option in get_args(kind):
            yield from _sections(option)


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _fields(section: type) -> dict[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _tag(section: type) -> Any:
    return next((field.default for field in dataclasses.fields(section) if field.name == "type"), None)


def _suggest(path: str, name: str, section: Any, schema: type) -> str:
    """What to do about an unknown key: a habit's equivalent, another type, a similar key here, or its real place."""
    if path in HABITS:
        return f"; {HABITS[path]}"
    elsewhere = [key for key in dict.fromkeys(keys_of(schema)) if key.rsplit(".", 1)[-1] == name]
    if path in elsewhere:
        return f"; it belongs to another {path.removesuffix(name)}type"
    here = _keys(section)
    if near := difflib.get_close_matches(name, here, n=1):
        return f"; did you mean {near[0]}?"
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:_MOST_PLACES])}?"
    return nearest(name, here)


def _keys(kind: Any) -> list[str]:
    return list(dict.fromkeys(key for section in _sections(kind) for key in _fields(section)))
