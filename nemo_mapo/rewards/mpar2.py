"""Rewards in the style of MPAR2 (arXiv 2603.02266): perception, steps and review judged separately.

Its format reward is `FormatReward` with `template=mpar2`. Values that the paper does not publish are keys
of their entries.
"""

import math
from collections.abc import Sequence

from nemo_mapo.config.rewards import ReasoningStepsTerm, ReviewedAnswerTerm, RewardsConfig
from nemo_mapo.rewards.accuracy import AccuracyReward
from nemo_mapo.rewards.judged import judge_of, unit_score, yes_or_no
from nemo_mapo.rewards.protocol import RewardSample
from nemo_mapo.rewards.templates import Mpar2Parts, mpar2_parts

_NUMBER = "Reply with a single number from 0 to 1, such as 0.4, and nothing else."
REVIEW_SYSTEM = (
    "You read a review that a listener wrote of their own reasoning. Reply YES if the review really checks the "
    "reasoning against what was perceived and ends in the answer that is given; NO if it only repeats it, contradicts "
    "it, or checks nothing. Reply with the single word YES or NO."
)
PERCEPTION_SYSTEM = (
    "You compare what a listener claims to hear with a description of what is to be heard. Lower the score for sounds "
    "that are claimed and not there, for sources or an order that are wrong, for what matters and is left out, for "
    "claims that contradict each other, and for padding. " + _NUMBER
)
STEP_SYSTEM = (
    "You grade one step of a listener's reasoning: a sub-question and its answer. A good step is useful for the "
    "question, and its answer follows from what the listener perceived, which is all you may rely on. " + _NUMBER
)
WHOLE_SYSTEM = (
    "You grade a listener's reasoning as a whole: do its steps build on each other, rest on what was perceived, and "
    "lead to an answer of the question? " + _NUMBER
)


class _Judged:
    """Common part of the three rewards: their judge, and the parts of a completion."""

    def __init__(self, config: RewardsConfig) -> None:
        self.judge = judge_of(config.judge, config.judge_cache)
        self.right = AccuracyReward(config)

    @staticmethod
    def parts(sample: RewardSample) -> Mpar2Parts | None:
        """The parts of the completion; None if it does not have the structure."""
        return mpar2_parts(sample.text) if sample.finished else None


class ReviewedAnswer(_Judged):
    """EM (1 + b R_rev) / (1 + b): EM the accuracy, R_rev whether the judge accepts the review; asked where EM = 1."""

    name = "reviewed_answer"

    def __init__(self, config: RewardsConfig, term: ReviewedAnswerTerm) -> None:
        super().__init__(config)
        self._bonus = term.review_bonus

    def __call__(self, samples: Sequence[RewardSample]) -> list[float | None]:
        """Return one value per sample; None if there is no verdict."""
        bonus = self._bonus
        values: list[float | None] = [right / (1 + bonus) for right in self.right(samples)]
        asked = {row: parts for row, sample in enumerate(samples) if values[row] and (parts := self.parts(sample))}
        prompts = [
            f"{_perceived(parts)}\n\nReasoning:\n{_steps(parts)}\n\nReview:\n{parts.review}\n\nAnswer: {parts.answer}"
            for parts in asked.values()
        ]
        for row, verdict in zip(asked, self.judge.ask(REVIEW_SYSTEM, prompts, yes_or_no), strict=True):
            values[row] = None if verdict is None else (1 + bonus * verdict) / (1 + bonus)
        return values


class Perception(_Judged):
    """The judge's score of the perception against the clip's caption; 0 without the structure."""

    name = "perception"

    def __call__(self, samples: Sequence[RewardSample]) -> list[float | None]:
        """Return one value per sample; ValueError naming a question without a caption."""
        values: list[float | None] = [0.0] * len(samples)
        asked = {row: parts for row, sample in enumerate(samples) if (parts := self.parts(sample))}
        prompts = [
            f"To be heard:\n{_caption(samples[row])}\n\nClaimed:\n{parts.perception}" for row, parts in asked.items()
        ]
        for row, score in zip(asked, self.judge.ask(PERCEPTION_SYSTEM, prompts, unit_score), strict=True):
            values[row] = score
        return values


class ReasoningSteps(_Judged):
    """s (prod_i max(s_i, floor))^(1/n) + (1 - s) whole: judged step by step and as a whole; 0 without the structure."""

    name = "reasoning_steps"

    def __init__(self, config: RewardsConfig, term: ReasoningStepsTerm) -> None:
        super().__init__(config)
        self._floor, self._share = term.step_floor, term.step_share

    def __call__(self, samples: Sequence[RewardSample]) -> list[float | None]:
        """Return one value per sample; None if any of its verdicts is missing."""
        values: list[float | None] = [0.0] * len(samples)
        asked = {row: parts for row, sample in enumerate(samples) if (parts := self.parts(sample))}
        steps = [(row, step) for row, parts in asked.items() for step in parts.steps]
        step_prompts = [
            f"Question: {samples[row].example.question}\n\n{_perceived(asked[row])}\n\nSub-question: {question}\n"
            f"Answer: {answer}"
            for row, (question, answer) in steps
        ]
        whole_prompts = [
            f"Question: {samples[row].example.question}\n\n{_perceived(parts)}\n\nReasoning:\n{_steps(parts)}"
            for row, parts in asked.items()
        ]
        scores: dict[int, list[float | None]] = {row: [] for row in asked}
        for (row, _), score in zip(steps, self.judge.ask(STEP_SYSTEM, step_prompts, unit_score), strict=True):
            scores[row].append(score)
        for row, whole in zip(asked, self.judge.ask(WHOLE_SYSTEM, whole_prompts, unit_score), strict=True):
            values[row] = self._joined(scores[row], whole)
        return values

    def _joined(self, steps: list[float | None], whole: float | None) -> float | None:
        known = [score for score in steps if score is not None]
        if whole is None or len(known) < len(steps):
            return None
        return self._share * floored_geometric_mean(known, self._floor) + (1 - self._share) * whole


def floored_geometric_mean(scores: Sequence[float], floor: float) -> float:
    """(prod_i max(s_i, floor))^(1/n): one unfounded step lowers the whole score, but not to zero."""
    return math.exp(math.fsum(math.log(max(score, floor)) for score in scores) / len(scores))


def _caption(sample: RewardSample) -> str:
    if sample.example.caption is None:
        raise ValueError(
            f"{sample.example.id}: field 'caption' is missing: rewards.terms.perception compares the perception with "
            "it; add it to the manifest or set the weight to 0"
        )
    return sample.example.caption


def _perceived(parts: Mpar2Parts) -> str:
    return f"Perceived:\n{parts.perception}"


def _steps(parts: Mpar2Parts) -> str:
    return "\n".join(f"Sub-question: {question}\nAnswer: {answer}" for question, answer in parts.steps)
