"""Signs in a run's first steps that prompt and reward do not match, each with the key to change."""

import logging
from collections.abc import Mapping

from scipy.stats import binomtest

from nemo_mapo.config.run import RunConfig

logger = logging.getLogger(__name__)

FIRST_STEPS = 3
"""Rollout batches that have to agree before a warning: one may be chance."""
SIGNIFICANCE = 0.01
"""A guessing model is called worse than chance in at most one of a hundred evaluations."""


class EarlySigns:
    """Warns once about format and length after the first steps: `signs = EarlySigns(config); signs.watch(metrics)`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._seen: list[Mapping[str, float]] = []

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the next training step of this session; warns about what the first three share."""
        if len(self._seen) == FIRST_STEPS:
            return
        self._seen.append(metrics)
        if len(self._seen) < FIRST_STEPS:
            return
        if self._always_zero("rollout/finished_share"):
            logger.warning(self._truncated())
        # A truncated completion follows no format: one cause, one warning.
        elif self._always_zero("rollout/format"):
            logger.warning(self._no_format())

    def _always_zero(self, name: str) -> bool:
        return all(metrics.get(name) == 0 for metrics in self._seen)

    def _truncated(self) -> str:
        limit = self._config.rollout.sampling.max_new_tokens
        return (
            f"warning: in the first {FIRST_STEPS} steps every completion was truncated at rollout.sampling."
            f"max_new_tokens={limit}, so none is rewarded for its format. Raise it; if completions in rollouts.jsonl "
            "answer and then go on, the model ends its turn with a token other than the eos_token of data.tokenizer"
        )

    def _no_format(self) -> str:
        template, told = self._config.rewards.template, self._config.data.prompt.instruction
        cause = (
            "The prompts do not ask for it: set data.prompt.instruction=template, or start from a policy that was "
            "trained to write it"
            if told is None
            else "The model was told (data.prompt.instruction) and does otherwise: read rollouts.jsonl, set "
            "rewards.template to what it writes, or start from a policy that was trained to write it"
        )
        return (
            f"warning: in the first {FIRST_STEPS} steps no completion followed rewards.template={template} "
            f"(rollout/format 0 %). {cause}"
        )


def warn_below_chance(right: int, questions: int, *, chance: float, step: int) -> None:
    """Warn if `right` of `questions` is significantly worse than guessing (exact one-sided binomial test).

    Args:
        right: questions answered right.
        questions: questions asked, each once.
        chance: lowest probability of guessing any of them; then the test holds for questions with more, too.
        step: of the evaluation, for the message.
    """
    test = binomtest(right, questions, chance, alternative="less")
    if test.pvalue < SIGNIFICANCE:
        logger.warning(
            f"warning: step {step}: {right} of {questions} validation questions are right, fewer than guessing gives "
            f"({chance:.0%}; p = {test.pvalue:.2g}). Answers are probably not recognised: read the samples in "
            "rollouts.jsonl; the keys are data.prompt.instruction, rewards.template and rollout.sampling.max_new_tokens"
        )
