"""Accuracy: does the completion's answer name the right choice?"""

from collections.abc import Sequence

from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.rewards.answers import resolve_choice
from nemo_mapo.rewards.protocol import RewardSample
from nemo_mapo.rewards.templates import extract_answer


class AccuracyReward:
    """1 when the extracted answer resolves to the right choice, else 0; no partial credit (r_acc)."""

    name = "accuracy"

    def __init__(self, config: RewardsConfig) -> None:
        self._template = config.template

    def __call__(self, samples: Sequence[RewardSample]) -> list[float]:
        """Return 0 or 1 for every sample; ValueError when an example's answer is not among its choices."""
        return [float(self._is_right(sample)) for sample in samples]

    def _is_right(self, sample: RewardSample) -> bool:
        example = sample.example
        if example.answer not in example.choices:
            raise ValueError(f"{example.id}: answer {example.answer!r} is not among the choices {example.choices}")
        answer = extract_answer(sample.text, self._template, finished=sample.finished)
        return resolve_choice(answer, example.choices) == example.choices.index(example.answer)
