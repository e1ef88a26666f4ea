"""Format: does the completion follow the chain-of-thought template?"""

from collections.abc import Sequence

from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.rewards.protocol import RewardSample
from nemo_mapo.rewards.templates import mpar2_parts, split_completion


class FormatReward:
    """1 when a finished completion follows its template strictly (see templates.py), else 0 (r_format)."""

    name = "format"

    def __init__(self, config: RewardsConfig) -> None:
        self._template = config.template

    def __call__(self, samples: Sequence[RewardSample]) -> list[float]:
        """Return 0 or 1 for every sample."""
        return [float(sample.finished and self._follows(sample.text)) for sample in samples]

    def _follows(self, text: str) -> bool:
        parts = mpar2_parts(text) if self._template == "mpar2" else split_completion(text, self._template)
        return parts is not None
