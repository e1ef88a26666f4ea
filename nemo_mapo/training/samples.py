"""Completions to read: rollouts.jsonl, with what the objective thought of each token, and a table for the loggers."""

import html
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.aligner import CustomLoggerWrapper
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.weights import token_weights
from nemo_mapo.rewards.combined import RewardTable
from nemo_mapo.training.actor import objective_inputs
from nemo_mapo.training.records import JsonLines
from nemo_mapo.training.scoring import ScoredRollouts
from nemo_mapo.types import PromptBatch, Rollouts

_DIGITS = 4
TABLE = "rollouts"
"""Name of the table in W&B and TensorBoard."""


class SampleWriter:
    """Appends the best and the worst completion of each step's first prompt; shows its whole group as a table."""

    def __init__(
        self,
        file: JsonLines,
        tokenizer: PreTrainedTokenizerBase,
        objective: ObjectiveConfig,
        *,
        keep_clip: Callable[[int, PromptBatch], None],
    ) -> None:
        """`keep_clip` is told of each step's prompts, the sampled question first."""
        self.file = file
        self.tokenizer = tokenizer
        self.objective = objective
        self.keep_clip = keep_clip
        self._table: list[dict[str, Any]] = []

    def write_training(self, step: int, rollouts: Rollouts, scored: ScoredRollouts) -> None:
        """Record two completions with omega, nu, mass and differential entropy per token; remember the group."""
        self._table = [_table_row(step, row, rollouts, scored) for row in range(rollouts.group_size)]
        totals = scored.rewards.total[: rollouts.group_size]
        rows = sorted({totals.index(max(totals)), totals.index(min(totals))})
        arrays = self._token_arrays(scored)
        self.keep_clip(step, rollouts.prompts)
        self.file.append(self._record(step, row, rollouts, scored, arrays) for row in rows)

    def log_table(self, logger: CustomLoggerWrapper, step: int) -> None:
        """Show the last group to every logger that has tables (W&B) or texts (TensorBoard)."""
        columns, data = list(self._table[0]), [list(row.values()) for row in self._table]
        logger.log_table(key=TABLE, columns=columns, data=data, step=step)
        for each in logger.loggers:
            if isinstance(each, TensorBoardLogger):
                each.experiment.add_text(TABLE, _markdown(columns, data), step)

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
            "weight_version": rollouts.weight_version,
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


def _table_row(step: int, row: int, rollouts: Rollouts, scored: ScoredRollouts) -> dict[str, Any]:
    record = sample_record(step, "train", row, rollouts, scored.rewards)
    rewards = {f"reward_{name}": value for name, value in record["reward"].items()}
    named = {name: record[name] for name in ("step", "id", "question", "answer", "text")}
    return {**named, **rewards, "advantage": round(float(scored.batch.advantages[row]), _DIGITS)}


def _markdown(columns: list[str], data: list[list[Any]]) -> str:
    """A table whose cells show what they hold: TensorBoard drops tags such as <think> that are not escaped."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in data)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return html.escape(str(value)).replace("|", "&#124;").replace("\n", "<br>")


def _rounded(values: Float[Tensor, " time"]) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
