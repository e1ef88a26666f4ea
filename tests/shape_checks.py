"""The type checker that jaxtyping's import hook applies to every function of the package during the tests."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception, BeartypeDecorHintPep3119Exception

unchecked: dict[str, str] = {}
"""Functions left out, with the reason; conftest.py prints them after the tests."""


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply beartype, except to the two kinds of signature it cannot read when it is shown one function at a time.

    beartype rather than typeguard, because typeguard parses one-word shapes such as " batch" as Python and stops.
    """
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        reason = "returns typing.Self; name the class instead"
    except BeartypeDecorHintPep3119Exception:
        reason = "takes a Protocol that is not @runtime_checkable"
    unchecked[f"{function.__module__}.{function.__qualname__}"] = reason
    return function
