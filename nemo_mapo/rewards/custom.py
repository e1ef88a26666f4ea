"""Custom rewards: a user's function, named by its import path in the config of this run."""

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from nemo_mapo.config.rewards import CustomTerm
from nemo_mapo.rewards.protocol import RewardSample

RewardFunction = Callable[..., Sequence[float]]
"""Called as `function(samples, **arguments)` with a list of `RewardSample`; returns a finite number for each."""


class RewardError(ValueError):
    """A user's reward function raised, or returned something other than a finite number per completion."""


class CustomReward:
    """Calls a user's function on all completions of a batch, and accepts only numbers from it."""

    def __init__(self, name: str, term: CustomTerm) -> None:
        self._name = name
        self._path = term.path
        self._arguments = dict(term.arguments)
        self._function = import_function(name, term)

    @property
    def name(self) -> str:
        """Name of its entry in `rewards.terms`."""
        return self._name

    def __call__(self, samples: Sequence[RewardSample]) -> list[float]:
        """Return one value per sample; RewardError naming the entry if the function does not."""
        try:
            returned = self._function(list(samples), **self._arguments)
        except Exception as error:  # show the user any exception, with the entry that it belongs to
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"{self._where} raised {type(error).__name__} at {place.filename}:{place.lineno}: {error}"
            ) from error
        if isinstance(returned, str) or not isinstance(returned, Sequence) or len(returned) != len(samples):
            size = f" of {len(returned)}" if isinstance(returned, Sequence) else ""
            raise RewardError(
                f"{self._where} returned a {type(returned).__name__}{size} for {len(samples)} completions: return a "
                "list with one number for each"
            )
        return [self._number(value, sample) for value, sample in zip(returned, samples, strict=True)]

    def _number(self, value: Any, sample: RewardSample) -> float:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(
                f"{self._where} returned {value!r} for a completion of {sample.example.id}: return a finite number"
            )
        return float(value)

    @property
    def _where(self) -> str:
        return f"rewards.terms.{self._name} ({self._path})"


def import_function(name: str, term: CustomTerm) -> RewardFunction:
    """Import the function of an entry of `rewards.terms`.

    Raises:
        ValueError: naming the entry and its path, if there is no such module or function, importing the module fails,
            or the function does not take a list of completions and the entry's `arguments`.
    """
    where = f"rewards.terms.{name}.path={term.path}"
    module, _, attribute = term.path.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ValueError(f"{where}: {module} has no {attribute}") from error
    except Exception as error:  # a module may raise anything while it is imported
        raise ValueError(
            f"{where}: cannot import {module} ({type(error).__name__}: {error}): install its package into this "
            "environment, or name its directory in PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"{where}: {attribute} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind([], **term.arguments)
    except TypeError as error:
        raise ValueError(
            f"{where}: it is called as {attribute}(samples{''.join(f', {key}=...' for key in term.arguments)}), which "
            f"its signature does not allow ({error})"
        ) from error
    found: RewardFunction = function
    return found
