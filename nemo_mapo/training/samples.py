"""rollouts.jsonl: completions to read, with what the objective thought of each of their tokens."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.weights import token_weights
from nemo_mapo.rewards.combined import RewardTable
from nemo_mapo.training.actor import objective_inputs
from nemo_mapo.training.records import JsonLines
from nemo_mapo.training.scoring import ScoredRollouts
from nemo_mapo.types import Rollouts

_DIGITS = 4


class SampleWriter:
    """Appends the best and the worst completion of each step's first prompt."""

    def __init__(self, file: JsonLines, tokenizer: PreTrainedTokenizerBase, objective: ObjectiveConfig) -> None:
        self.file = file
        self.tokenizer = tokenizer
        self.objective = objective

    def write_training(self, step: int, rollouts: Rollouts, scored: ScoredRollouts) -> None:
        """Record two completions with omega, nu, mass and differential entropy per token."""
        totals = scored.rewards.total[: rollouts.group_size]
        rows = sorted({totals.index(max(totals)), totals.index(min(totals))})
        arrays = self._token_arrays(scored)
        self.file.append(self._record(step, row, rollouts, scored, arrays) for row in rows)

    def _token_arrays(self, scored: ScoredRollouts) -> dict[str, Float[Tensor, "batch time"]]:
        batch, signals = scored.batch, scored.signals
        inputs = objective_inputs(
            signals,
            batch,
            global_sequences=len(batch.advantages),
            global_tokens=int(batch.sequences.completion_lengths.sum()),
        )
        arrays: dict[str, Float[Tensor, "batch time"]] = {}
        if batch.text_ref_entropy_nats is not None:
            arrays["omega"], arrays["nu"] = token_weights(inputs, self.objective)
            arrays["delta_h_nats"] = batch.text_ref_entropy_nats - signals.entropy_nats
        if signals.audio_mass is not None:
            arrays["audio_mass"] = signals.audio_mass
        return arrays

    def _record(
        self,
        step: int,
        row: int,
        rollouts: Rollouts,
        scored: ScoredRollouts,
        arrays: dict[str, Float[Tensor, "batch time"]],
    ) -> dict[str, Any]:
        length = int(rollouts.completion_lengths[row])
        ids = rollouts.completions[row, :length].tolist()
        per_token = {name: _rounded(values[row, :length]) for name, values in arrays.items()}
        return {
            **sample_record(step, "train", row, rollouts, scored.rewards),
            "advantage": round(float(scored.batch.advantages[row]), _DIGITS),
            "tokens": [self.tokenizer.decode([token]) for token in ids],
            **per_token,
        }


def sample_record(step: int, split: str, row: int, rollouts: Rollouts, rewards: RewardTable) -> dict[str, Any]:
    """Question, completion and rewards of one row."""
    example = rollouts.prompts.examples[row // rollouts.group_size]
    return {
        "step": step,
        "split": split,
        "id": example.id,
        "question": example.question,
        "choices": list(example.choices),
        "answer": example.answer,
        "task": example.task,
        "text": rollouts.texts[row],
        "reward": {
            "total": rewards.total[row],
            **{name: values[row] for name, values in rewards.by_reward.items()},
        },
    }


def _rounded(values: Float[Tensor, " time"]) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
