"""YAML files before Hydra expands them: those that would grow without bound, and errors with file and line."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml

from nemo_mapo.config.load import ConfigError

MAX_NODES = 100_000
"""Values of one file once its aliases are written out; the largest config here has some hundreds."""


class Stamp(NamedTuple):
    """A file and what changes when it is written again."""

    path: Path
    modified_ns: int
    size: int


def stamps_of(directories: Iterable[Path]) -> tuple[Stamp, ...]:
    """The YAML files of some directories and of those inside them."""
    found = [(path, path.stat()) for folder in directories for path in sorted(folder.rglob("*.yaml")) if path.is_file()]
    return tuple(Stamp(path, status.st_mtime_ns, status.st_size) for path, status in found)


@lru_cache(maxsize=1024)
def check_aliases(file: Stamp) -> None:
    """ConfigError for a file that is small to read and huge once its aliases (`*name`) are written out."""
    text = file.path.read_bytes()
    if b"*" not in text or b"&" not in text:
        return
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = 0 if root is None else _expanded(root, {})
    except (yaml.YAMLError, RecursionError):
        # Said when the file is used, if it is.
        return
    if size > MAX_NODES:
        raise ConfigError(f"{file.path}: {size:,} values once its aliases (*name) are written out; at most {MAX_NODES}")


def yaml_problem(error: yaml.YAMLError) -> str:
    """`FILE:LINE: not YAML, at column N: ...`."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not YAML, at column {mark.column + 1}: {error.problem}"
    return f"not YAML: {' '.join(str(error).split())}"


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below a node with every alias written out; one that contains itself never ends."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = MAX_NODES + 1
    inner = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    size = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_expanded(child, sizes) for child in inner))
    sizes[id(node)] = size
    return size
