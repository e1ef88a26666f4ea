"""The tests themselves: collected alike by every worker, and right beside any load."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
CLOCKS = {"monotonic", "now", "perf_counter", "time", "today", "utcnow"}
CHANCE = {"free_port", "getpid", "mkdtemp", "token_hex", "uuid4"}


def nodes(kind: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path in TESTS.rglob("*.py"):
        tree = ast.parse(path.read_text())
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kind))


def called(node: ast.AST) -> set[str]:
    """Last names of the functions that are called in there."""
    functions = (part.func for part in ast.walk(node) if isinstance(part, ast.Call))
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_no_parameter_is_read_from_a_clock_or_drawn() -> None:
    """Workers that collect different tests stop the whole run."""
    found = [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for path, node in nodes(ast.Call)
        if getattr(node.func, "attr", "") == "parametrize" and called(node) & (CLOCKS | CHANCE)
    ]
    assert not found


def test_no_test_asserts_how_long_something_takes() -> None:
    """A deadline after which a test gives up waiting is none of that."""
    found = [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for path, node in nodes(ast.Assert)
        if called(node) & CLOCKS and "deadline" not in names(node)
    ]
    assert not found
