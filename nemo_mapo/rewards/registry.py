"""Rewards by name: what a reward is, how one is added, and how a config chooses among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.types import Example


@dataclass(frozen=True, kw_only=True)
class RewardSample:
    """One completion to judge."""

    text: str
    """The completion without end-of-turn tokens, reasoning tags kept."""
    example: Example
    finished: bool
    """Whether the model stopped by itself; False when it was cut at the length limit."""


@runtime_checkable
class Reward(Protocol):
    """Judges completions; every value lies in [0, 1], or is None where a model that judges gave no verdict."""

    @property
    def name(self) -> str:
        """Name of its weight in the config and of its metric."""
        ...

    def __call__(self, samples: Sequence[RewardSample]) -> Sequence[float | None]:
        """Return one value a sample, in order."""
        ...


RewardFactory = Callable[[RewardsConfig], Reward]

_FACTORIES: dict[str, RewardFactory] = {}


def register_reward(name: str) -> Callable[[RewardFactory], RewardFactory]:
    """Register a class or function that builds the reward whose weight is `RewardsConfig.<name>`.

    Raises:
        ValueError: the name is taken, or `RewardsConfig` has no weight of this name.
    """
    if name in _FACTORIES:
        raise ValueError(f"a reward named {name!r} is registered already")
    if name not in RewardsConfig().weights:
        raise ValueError(f"reward {name!r} has no weight: RewardsConfig knows {sorted(RewardsConfig().weights)}")

    def register(factory: RewardFactory) -> RewardFactory:
        _FACTORIES[name] = factory
        return factory

    return register


def build_reward(name: str, config: RewardsConfig) -> Reward:
    """Build one reward; ValueError names the known ones when there is none called `name`."""
    if name not in _FACTORIES:
        raise ValueError(f"no reward named {name!r}; known: {sorted(_FACTORIES)}")
    return _FACTORIES[name](config)


def reward_weights(config: RewardsConfig) -> dict[str, float]:
    """Return the weight of every registered reward, zeros included."""
    return {name: weight for name, weight in config.weights.items() if name in _FACTORIES}
