"""The policy of a MAPO run with its engine and reference: generation, inference, loss and gradient."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM, AudioLLMOutput
from nemo_mapo.models.layout import MicroBatching, ModelInputs, in_row_order, objective_inputs
from nemo_mapo.objective.mapo import mapo_loss
from nemo_mapo.ranks import gather_metrics, gather_over_data_parallel
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.rollout.scoring import Drawing
from nemo_mapo.rows import Completion, Prompt, Row, ScoredRow, TokenSignals
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.signals import on_all_stages, read_signals, token_signals_in_parts
from nemo_mapo.types import Metric, merge_metrics


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """What `MapoActor.training_pass` returns besides the gradient, on every rank."""

    loss: float
    """Of the whole step, as the metrics are."""
    metrics: dict[str, float]
    signals: list[TokenSignals]
    """The policy's signals for each of this rank's rows, from the same pass."""


class MapoActor:
    """The audio LLM that is trained, its rollout engine and its frozen reference."""

    def __init__(
        self,
        policy: DistributedDataParallel,
        rollout: RolloutBackend,
        reference: FrozenReference,
        objective: ObjectiveConfig,
        batching: MicroBatching,
    ) -> None:
        """Combine the policy (in Megatron's data-parallel wrapper), its rollout engine and its reference."""
        self.wrapped = policy
        self.policy: AudioLLM = policy.module
        self.rollout = rollout
        self.reference = reference
        self.objective = objective
        self.batching = batching

    @property
    def captures_audio_mass(self) -> bool:
        """Whether the policy's signals include the audio mass."""
        return self.objective.captures_audio_mass

    @property
    def _head_reduction(self) -> HeadReduction | None:
        return self.objective.head_reduction if self.captures_audio_mass else None

    def prepare_for_inference(self) -> None:
        """Evaluation mode."""
        self.policy.eval()

    def finish_inference(self) -> None:
        """Back to training mode; an engine in this process makes room."""
        self.rollout.release()
        self.policy.train()

    def infer(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of each prompt; one seed per completion."""
        return self.rollout.generate(prompts, sampling, group_size=group_size, seeds=seeds)

    def get_inference_signals(self, rows: Sequence[Row], drawing: Drawing | None = None) -> list[TokenSignals]:
        """log pi_old, policy entropy and audio mass of the rollouts, without gradient; with `drawing` log mu too."""
        return token_signals_in_parts(
            self.policy, rows, head_reduction=self._head_reduction, batching=self.batching, drawing=drawing
        )

    def get_init_policy_logprobs(self, rows: Sequence[Row]) -> list[Float[Tensor, "_"]]:
        """log pi_ref of the rollouts."""
        return self.reference.log_probs(rows)

    def get_loss_and_metrics(self, batch: Sequence[ScoredRow], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Loss and metrics of `training_pass`."""
        passed = self.training_pass(batch, forward_only=forward_only)
        return passed.loss, passed.metrics

    def training_pass(self, rows: Sequence[ScoredRow], *, forward_only: bool = False) -> TrainingPass:
        """The MAPO loss of one optimiser step, of which `rows` are this data-parallel rank's share.

        Megatron's schedule runs the micro-batches, accumulates their gradients and reduces them over all ranks: on
        return they are the gradients of the whole step's loss.
        """
        parts = self.batching.split(rows)
        micro_batches = [[rows[number] for number in part] for part in parts]
        said: list[list[TokenSignals] | None] = []
        global_sequences = sum(gather_over_data_parallel(len(rows)))
        global_tokens = sum(gather_over_data_parallel(sum(len(row.token_ids) for row in rows)))
        # The schedule divides by the number of micro-batches and data parallelism by its ranks, but our loss is a sum.
        scale = len(parts) * parallel_state.get_data_parallel_world_size()

        def forward_step(batches: Iterator[list[ScoredRow]], model: DistributedDataParallel) -> tuple[Any, Any]:
            part = next(batches)
            inputs = self.batching.lay_out(part, self.policy)
            output = inputs.call(model, self._head_reduction)
            return output, partial(loss_of, part=part, inputs=inputs)

        def loss_of(
            output: AudioLLMOutput, *, part: list[ScoredRow], inputs: ModelInputs
        ) -> tuple[Tensor, dict[str, Metric]]:
            signals = read_signals(self.policy, output, inputs)
            said.append([one.detached() for one in signals])
            joined = objective_inputs(part, signals, global_sequences=global_sequences, global_tokens=global_tokens)
            loss = mapo_loss(joined, self.objective)
            return loss.loss * scale, loss.metrics

        metrics: list[dict[str, Metric]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.wrapped],
            num_microbatches=len(parts),
            # Both are exchanged with the hidden states, because padding ends at the longest row.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        merged = merge_metrics(gather_metrics(metrics))
        known = (
            on_all_stages(read, part, self.policy, mass=self.captures_audio_mass)
            for read, part in zip(said or [None] * len(parts), micro_batches, strict=True)
        )
        return TrainingPass(loss=merged["train/loss"], metrics=merged, signals=in_row_order(parts, known))
