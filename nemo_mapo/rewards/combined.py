"""The reward of a completion: the weighted sum of the configured ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_mapo.config.run import RewardsConfig
from nemo_mapo.rewards.accuracy import AccuracyReward
from nemo_mapo.rewards.consistency import RuleConsistency
from nemo_mapo.rewards.format import FormatReward
from nemo_mapo.rewards.registry import Reward, RewardSample, build_reward, reward_weights

BUILT_IN: tuple[type[Reward], ...] = (AccuracyReward, FormatReward, RuleConsistency)
"""Importing these registers them."""


@dataclass(frozen=True, kw_only=True)
class RewardTable:
    """Rewards of a batch of completions, in the order of the samples."""

    by_reward: dict[str, list[float]]
    """Each computed reward in [0, 1]; accuracy is always there."""
    total: list[float]
    """r = sum of weight * reward (2 accuracy + 1 format + 1 consistency by default)."""

    @property
    def accuracy(self) -> list[float]:
        """The accuracy reward, which the attention loss and the evaluation read whatever its weight."""
        return self.by_reward[AccuracyReward.name]


def score(samples: Sequence[RewardSample], config: RewardsConfig) -> RewardTable:
    """Compute r = sum_k w_k r_k for every sample (paper Eq. 6: 2 r_acc + 1 r_format + 1 r_cons).

    A reward with weight 0 is not computed, except accuracy: the attention loss asks it which completions failed.

    Raises:
        ValueError: a reward returned the wrong number of values, or one outside [0, 1] (NaN included).
    """
    weights = reward_weights(config)
    computed = [name for name, weight in weights.items() if weight > 0 or name == AccuracyReward.name]
    by_reward = {name: _checked(build_reward(name, config), samples) for name in computed}
    total = [sum(weights[name] * values[row] for name, values in by_reward.items()) for row in range(len(samples))]
    return RewardTable(by_reward=by_reward, total=[float(value) for value in total])


def _checked(reward: Reward, samples: Sequence[RewardSample]) -> list[float]:
    values = reward(samples)
    if len(values) != len(samples):
        raise ValueError(f"reward {reward.name!r} returned {len(values)} values for {len(samples)} samples")
    for row, value in enumerate(values):
        if math.isnan(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"reward {reward.name!r} is {value} on sample {row}; rewards lie in [0, 1]")
    return values
