"""Consistency as in the paper (Appendix B): a frozen model reads the reasoning and the answer."""

from collections.abc import Sequence

from nemo_mapo.config.rewards import ConsistencyTerm, RewardsConfig
from nemo_mapo.rewards.accuracy import AccuracyReward
from nemo_mapo.rewards.judged import judge_of, yes_or_no
from nemo_mapo.rewards.protocol import RewardSample
from nemo_mapo.rewards.templates import closed_reasoning, extract_answer

# Not to be polished: other words get other verdicts, and with them other rewards.
SYSTEM = (
    "You check whether a piece of reasoning and the answer after it belong together. You do not solve the question; "
    "whether the answer is true does not matter.\n"
    "Reply YES if both hold: the reasoning is complete (it comes to a conclusion and does not break off), and the "
    "answer is what this conclusion says. Reply NO if the reasoning breaks off, concludes nothing, leaves several "
    "answers open, or concludes something else than is answered.\n"
    "Reply with the single word YES or NO."
)


class JudgeConsistency:
    """1 if the judge says YES, 0 if it says NO, None if its reply has no verdict (r_cons).

    A completion whose reasoning is not closed or that gives no answer is 0 without asking, because that is what the
    judge would check. With `conditional_on_correct` the same holds for a wrong answer.
    """

    name = "consistency"

    def __init__(self, config: RewardsConfig, term: ConsistencyTerm) -> None:
        self._template = config.template
        self._right = AccuracyReward(config) if term.conditional_on_correct else None
        self._judge = judge_of(config.judge, config.judge_cache)

    def __call__(self, samples: Sequence[RewardSample]) -> list[float | None]:
        """Ask about all samples at once."""
        values: list[float | None] = [0.0] * len(samples)
        asked = {row: prompt for row, sample in enumerate(samples) if (prompt := self._prompt(sample)) is not None}
        verdicts = self._judge.ask(SYSTEM, list(asked.values()), yes_or_no)
        for row, verdict in zip(asked, verdicts, strict=True):
            values[row] = None if verdict is None else float(verdict)
        return values

    def _prompt(self, sample: RewardSample) -> str | None:
        reasoning = closed_reasoning(sample.text, self._template)
        answer = extract_answer(sample.text, self._template, finished=sample.finished)
        if not sample.finished or not reasoning or answer is None:
            return None
        if self._right is not None and self._right([sample]) == [0.0]:
            return None
        example = sample.example
        choices = "\n".join(f"- {choice}" for choice in example.choices)
        return f"Question: {example.question}\nChoices:\n{choices}\n\nReasoning:\n{reasoning}\n\nAnswer: {answer}"
