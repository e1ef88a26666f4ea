"""The reward of a completion: the weighted sum of the configured ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from nemo_mapo.config.rewards import (
    AccuracyTerm,
    ConsistencyTerm,
    CustomTerm,
    FormatTerm,
    PerceptionTerm,
    ReasoningStepsTerm,
    ReviewedAnswerTerm,
    RewardsConfig,
    Term,
)
from nemo_mapo.rewards.accuracy import AccuracyReward
from nemo_mapo.rewards.consistency import RuleConsistency
from nemo_mapo.rewards.consistency_judge import JudgeConsistency
from nemo_mapo.rewards.custom import CustomReward
from nemo_mapo.rewards.format import FormatReward
from nemo_mapo.rewards.mpar2 import Perception, ReasoningSteps, ReviewedAnswer
from nemo_mapo.rewards.protocol import Reward, RewardSample
from nemo_mapo.rows import Group


@dataclass(frozen=True, kw_only=True)
class RewardTable:
    """Rewards of a batch of completions, in the order of the samples."""

    by_reward: dict[str, list[float | None]]
    """Each computed reward, None if its judge gave no verdict; accuracy is always included."""
    total: list[float]
    """r = sum of weight * reward (2 accuracy + 1 format + 1 consistency by default); see `score` for missing ones."""

    @property
    def accuracy(self) -> list[float]:
        """The accuracy reward, which the attention loss and the evaluation read whatever its weight."""
        return [value for value in self.by_reward[AccuracyReward.name] if value is not None]

    def row(self, row: int) -> dict[str, float | None]:
        """The total and every reward of one sample."""
        return {"total": self.total[row], **{name: values[row] for name, values in self.by_reward.items()}}

    def by_group(self, groups: Sequence[Group]) -> "list[RewardTable]":
        """The table of each group, whose completions are the samples in their order."""
        ends = list(accumulate(map(len, groups)))
        return [self._rows(slice(end - len(group), end)) for group, end in zip(groups, ends, strict=True)]

    @classmethod
    def joined(cls, tables: "Sequence[RewardTable]") -> "RewardTable":
        """One table of the samples of several with the same rewards."""
        names = tables[0].by_reward
        return cls(
            by_reward={name: [value for table in tables for value in table.by_reward[name]] for name in names},
            total=[value for table in tables for value in table.total],
        )

    def _rows(self, rows: slice) -> "RewardTable":
        by_reward = {name: values[rows] for name, values in self.by_reward.items()}
        return RewardTable(by_reward=by_reward, total=self.total[rows])

    @property
    def missing_share(self) -> float:
        """Largest share of missing verdicts among the rewards."""
        return max(values.count(None) / len(values) for values in self.by_reward.values())


def build_rewards(config: RewardsConfig) -> dict[str, Reward]:
    """The rewards that are computed, by name; a user's function is imported only here.

    Raises:
        ValueError: naming the entry, if its function cannot be imported or called with a list of completions.
    """
    return {name: _build(name, term, config) for name, term in config.computed.items()}


def _build(name: str, term: Term, config: RewardsConfig) -> Reward:
    match term:
        case AccuracyTerm():
            return AccuracyReward(config)
        case FormatTerm():
            return FormatReward(config)
        case ConsistencyTerm():
            return JudgeConsistency(config, term) if term.asks_judge else RuleConsistency(config)
        case ReviewedAnswerTerm():
            return ReviewedAnswer(config, term)
        case PerceptionTerm():
            return Perception(config)
        case ReasoningStepsTerm():
            return ReasoningSteps(config, term)
        case CustomTerm():
            return CustomReward(name, term)


def score(samples: Sequence[RewardSample], config: RewardsConfig) -> RewardTable:
    """Compute r = sum_k w_k r_k for every sample (paper Eq. 6: 2 r_acc + 1 r_format + 1 r_cons).

    A reward with weight 0 is not computed, except accuracy: the attention loss asks it which completions failed.
    A missing verdict does not count as zero: the completion's other rewards are scaled to the full weight,
    r = (sum_k w_k) / (sum_there w_k) * sum_there w_k r_k, so that it competes with its group on its known rewards.

    Raises:
        ValueError: a reward returned the wrong number of values, or a shipped one a value outside [0, 1].
        RewardError: a user's function raised, or returned anything but a finite number per sample.
    """
    weights = config.weights
    by_reward = {name: _checked(reward, samples) for name, reward in build_rewards(config).items()}
    total = [_total({name: values[row] for name, values in by_reward.items()}, weights) for row in range(len(samples))]
    return RewardTable(by_reward=by_reward, total=total)


def _total(rewards: dict[str, float | None], weights: dict[str, float]) -> float:
    there = {name: value for name, value in rewards.items() if value is not None}
    total = sum(weights[name] * value for name, value in there.items())
    if len(there) == len(rewards):
        return float(total)
    whole, known = (sum(weights[name] for name in names) for names in (rewards, there))
    return float(total * whole / known) if known > 0 else 0.0


def _checked(reward: Reward, samples: Sequence[RewardSample]) -> list[float | None]:
    values = list(reward(samples))
    if len(values) != len(samples):
        raise ValueError(f"reward {reward.name!r} returned {len(values)} values for {len(samples)} samples")
    if isinstance(reward, CustomReward):
        return values
    for row, value in enumerate(values):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"reward {reward.name!r} is {value} on sample {row}; rewards lie in [0, 1]")
    return values
