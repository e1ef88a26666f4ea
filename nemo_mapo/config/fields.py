"""Types of the numbers, switches and names in a config, each with its valid range.

Numbers are finite; booleans, strings and (for counts) fractions are refused. Switches are true or false only.
"""

from typing import Annotated, Final

from pydantic import AfterValidator, Field, Strict

LARGEST_COUNT: Final = 10**9
MAX_COMPLETIONS_PER_STEP: Final = 2**20
"""Most rows of a step that can have seeds of their own."""
MAX_SEED: Final = 2**19
"""Every row of every step of every run gets its own seed in 63 bits: 2**19 runs, 2**24 steps, 2**20 rows."""

Flag = Annotated[bool, Strict()]
"""true or false."""
Count = Annotated[int, Strict(), Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Strict(), Field(ge=0, le=LARGEST_COUNT)]
"""0 is off, or none."""
AtLeastTwo = Annotated[int, Strict(), Field(ge=2, le=LARGEST_COUNT)]
Index = Annotated[int, Strict(), Field(ge=0, le=LARGEST_COUNT)]
"""0-based."""
Seed = Annotated[int, Strict(), Field(ge=0, lt=MAX_SEED)]
OrderSeed = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
"""Seed of an order, or of what is drawn from data."""
Port = Annotated[int, Strict(), Field(ge=1, le=65535)]

Fraction = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, Strict(), Field(gt=0, lt=1, allow_inf_nan=False)]
Decay = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)]
"""Decay of a moving mean."""
Weight = Annotated[float, Strict(), Field(ge=0, le=1e4, allow_inf_nan=False)]
"""Weight of a term in a sum; 0 is off."""
Positive = Annotated[float, Strict(), Field(gt=0, le=1e6, allow_inf_nan=False)]
"""A scale, cap or factor."""
AboveOne = Annotated[float, Strict(), Field(gt=1, le=1e6, allow_inf_nan=False)]
OneOrAbove = Annotated[float, Strict(), Field(ge=1, le=1e6, allow_inf_nan=False)]
Epsilon = Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)]
"""Added to avoid division by 0."""
Threshold = Annotated[float, Strict(), Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
"""Value that a reward is compared with."""
LearningRate = Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)]
LearningRateOrZero = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Strict(), Field(ge=0, le=100, allow_inf_nan=False)]
"""0 is greedy."""
Seconds = Annotated[float, Strict(), Field(gt=0, le=1e7, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Strict(), Field(ge=0, le=1e7, allow_inf_nan=False)]


def _steps(value: int) -> int:
    if value == 0:
        raise ValueError("0 steps train nothing; give 1 or more, or -1 for whole epochs")
    return value


Steps = Annotated[int, Strict(), Field(ge=-1, le=LARGEST_COUNT), AfterValidator(_steps)]
"""-1 means unlimited."""


def _path(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{value!r} is not a path: give one without line breaks or control characters")
    return value


PathText = Annotated[str, AfterValidator(_path)]
"""Path of a file or directory."""
Name = Annotated[str, Field(min_length=1, max_length=200)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/]\S*$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$", max_length=253)]
"""Name or address of a machine."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable."""
