"""Format: does the completion keep to the chain-of-thought template?"""

from collections.abc import Sequence

from nemo_mapo.config.run import RewardsConfig
from nemo_mapo.rewards.registry import RewardSample, register_reward
from nemo_mapo.rewards.templates import split_completion


@register_reward("format")
class FormatReward:
    """1 when a finished completion follows its template strictly (see `split_completion`), else 0 (r_format)."""

    name = "format"

    def __init__(self, config: RewardsConfig) -> None:
        self._template = config.template

    def __call__(self, samples: Sequence[RewardSample]) -> list[float]:
        """Return 0 or 1 for every sample."""
        return [
            float(sample.finished and split_completion(sample.text, self._template) is not None) for sample in samples
        ]
