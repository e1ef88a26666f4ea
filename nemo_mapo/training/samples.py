"""Sample completions: rollouts.jsonl, with the objective's signals per token, and a table for the loggers."""

import html
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.aligner import CustomLoggerWrapper
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.models.layout import objective_inputs
from nemo_mapo.objective.weights import token_weights
from nemo_mapo.rows import Completion, Group, Prompt, ScoredRow, TokenSignals
from nemo_mapo.training.records import JsonLines
from nemo_mapo.training.scoring import ScoredRollouts

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
        keep_clip: Callable[[int, Prompt], None],
    ) -> None:
        """`keep_clip` is called with each step's sampled prompt."""
        self.file = file
        self.tokenizer = tokenizer
        self.objective = objective
        self.keep_clip = keep_clip
        self._table: list[dict[str, Any]] = []

    def write_training(self, step: int, group: Group, scored: ScoredRollouts) -> None:
        """Record two completions of `group`, the batch's first, with the objective's signals for each token."""
        self._table = [_table_row(step, row, group, scored) for row in range(len(group))]
        totals = scored.rewards.total[: len(group)]
        rows = sorted({totals.index(max(totals)), totals.index(min(totals))})
        self.keep_clip(step, group.prompt)
        self.file.append(self._record(step, row, group, scored) for row in rows)

    def log_table(self, logger: CustomLoggerWrapper, step: int) -> None:
        """Show the last group to every logger that has tables (W&B) or texts (TensorBoard)."""
        columns, data = list(self._table[0]), [list(row.values()) for row in self._table]
        logger.log_table(key=TABLE, columns=columns, data=data, step=step)
        for each in logger.loggers:
            if isinstance(each, TensorBoardLogger):
                each.experiment.add_text(TABLE, _markdown(columns, data), step)

    def _per_token(self, row: ScoredRow, signals: TokenSignals) -> dict[str, Float[Tensor, "_"]]:
        found: dict[str, Float[Tensor, "_"]] = {}
        if row.text_ref_entropy_nats is not None:
            inputs = objective_inputs([row], [signals], global_sequences=1, global_tokens=len(row.token_ids))
            (found["omega"],), (found["nu"],) = token_weights(inputs, self.objective)
            found["delta_h_nats"] = row.text_ref_entropy_nats - signals.entropy_nats
        if signals.audio_mass is not None:
            found["audio_mass"] = signals.audio_mass
        return found

    def _record(self, step: int, row: int, group: Group, scored: ScoredRollouts) -> dict[str, Any]:
        completion = group.completions[row]
        per_token = self._per_token(scored.rows[row], scored.signals[row])
        return {
            **sample_record(step, "train", group, completion, scored.rewards.row(row)),
            "advantage": round(float(scored.rows[row].advantages), _DIGITS),
            "weight_version": completion.weight_version,
            "tokens": [self.tokenizer.decode([token]) for token in completion.token_ids.tolist()],
            **{name: _rounded(values) for name, values in per_token.items()},
        }


def sample_record(
    step: int, split: str, group: Group, completion: Completion, rewards: dict[str, float | None]
) -> dict[str, Any]:
    """Question, completion and rewards of one of the group's completions."""
    example = group.example
    return {
        "step": step,
        "split": split,
        "id": example.id,
        "question": example.question,
        "choices": list(example.choices),
        "answer": example.answer,
        "task": example.task,
        "text": completion.text,
        "reward": rewards,
    }


def _table_row(step: int, row: int, group: Group, scored: ScoredRollouts) -> dict[str, Any]:
    record = sample_record(step, "train", group, group.completions[row], scored.rewards.row(row))
    rewards = {f"reward_{name}": value for name, value in record["reward"].items()}
    named = {name: record[name] for name in ("step", "id", "question", "answer", "text")}
    return {**named, **rewards, "advantage": round(float(scored.rows[row].advantages), _DIGITS)}


def _markdown(columns: list[str], data: list[list[Any]]) -> str:
    """A table whose cells show what they hold: TensorBoard drops tags such as <think> that are not escaped."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in data)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return html.escape(str(value)).replace("|", "&#124;").replace("\n", "<br>")


def _rounded(values: Float[Tensor, " time"]) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
