"""The class decorator of all configs."""

from typing import Any, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

_STRICT_KEYS = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_class(cls: type[Any]) -> Any:
    """Make a frozen, keyword-only dataclass that refuses unknown keys and checks types when it is built."""
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=_STRICT_KEYS)
