"""YAML as data: no tag builds an object, no alias expands without bound, and errors name file and line."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

MAX_NODES = 100_000
"""Most values in one file once its aliases are written out; the largest config here has a few hundred."""

UNREADABLE: Final = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError)
"""What PyYAML raises for a text that is not plain data; the last two for `!!bool x` and `!!timestamp x`."""


class Stamp(NamedTuple):
    """A file with the values that change if it is written again."""

    path: Path
    modified_ns: int
    size: int


def stamps_of(directories: Iterable[Path]) -> tuple[Stamp, ...]:
    """The YAML files of some directories and of those inside them."""
    found = [(path, path.stat()) for folder in directories for path in sorted(folder.rglob("*.yaml")) if path.is_file()]
    return tuple(Stamp(path, status.st_mtime_ns, status.st_size) for path, status in found)


@lru_cache(maxsize=1024)
def bomb_in(file: Stamp) -> str | None:
    """The problem of a file that is small on disk but huge once its aliases (`*name`) are written out; else None."""
    try:
        return _bomb(file.path.read_bytes(), file.path)
    except UNREADABLE:
        # Reported when the file is used, if at all.
        return None


def read_yaml(content: str | bytes, where: object) -> Any:
    """Parse a YAML text into plain data.

        read_yaml("a: [1, 2]", "mine.yaml")  # {"a": [1, 2]}

    Args:
        content: the text, or its bytes.
        where: its file, for messages.

    Raises:
        ValueError: naming the file, if the text is not YAML, builds anything but data, or is huge once its aliases are
            written out.
    """
    try:
        problem = _bomb(content, where)
        values = None if problem else yaml.safe_load(content)
    except UNREADABLE as error:
        raise ValueError(unreadable(error, where)) from error
    if problem:
        raise ValueError(problem)
    return values


def read_recorded(path: Path) -> dict[str, Any]:
    """The sections of a config recorded in a file; ValueError naming the file if it holds none."""
    try:
        recorded = read_yaml(path.read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{path}: holds {type(recorded).__name__}, not the sections of a config")
    return recorded


def unreadable(error: Exception, where: object) -> str:
    """`FILE:LINE: not YAML, at column N: ...`."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{where}:{mark.line + 1}: not YAML, at column {mark.column + 1}: {error.problem}"
    if isinstance(error, RecursionError):
        return f"{where}: nested too deeply"
    return f"{where}: not YAML: {' '.join(str(error).split())}"


def _bomb(content: str | bytes, where: object) -> str | None:
    text = content.encode() if isinstance(content, str) else content
    if b"*" not in text or b"&" not in text:
        return None
    root = yaml.compose(content, Loader=yaml.SafeLoader)
    size = 0 if root is None else _expanded(root, {})
    if size <= MAX_NODES:
        return None
    return f"{where}: {size:,} values once its aliases (*name) are written out; at most {MAX_NODES:,}"


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values below a node with every alias written out; too many for a node that contains itself."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = MAX_NODES + 1
    inner = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    size = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_expanded(child, sizes) for child in inner))
    sizes[id(node)] = size
    return size
