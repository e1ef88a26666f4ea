"""The policy as NeMo-Aligner's trainers see it: it infers, and it gives loss and gradient."""

from jaxtyping import Float, Int
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from torch import Tensor

from nemo_mapo.attention.session import HeadReduction
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.objective.mapo import mapo_loss
from nemo_mapo.rollout.protocol import RolloutBackend
from nemo_mapo.training.references import FrozenReference
from nemo_mapo.training.sequences import row_slices, select_batch
from nemo_mapo.training.signals import TokenSignals, token_signals, token_signals_in_parts
from nemo_mapo.types import Metric, ObjectiveInputs, PromptBatch, RolloutBatch, Rollouts, TokenBatch, merge_metrics


class MapoActor(AlignableGenerativeInterface):  # type: ignore[misc]
    """The audio LLM that is trained, its rollout engine and its frozen reference."""

    def __init__(
        self,
        policy: AudioLLM,
        rollout: RolloutBackend,
        reference: FrozenReference,
        objective: ObjectiveConfig,
        *,
        micro_batch_size: int,
    ) -> None:
        self.policy = policy
        self.rollout = rollout
        self.reference = reference
        self.objective = objective
        self.micro_batch_size = micro_batch_size

    @property
    def _head_reduction(self) -> HeadReduction | None:
        return self.objective.head_reduction if self.objective.captures_audio_mass else None

    def prepare_for_inference(self) -> None:
        """Evaluation mode."""
        self.policy.eval()

    def finish_inference(self) -> None:
        """Back to training mode."""
        self.policy.train()

    def infer(
        self, prompts: PromptBatch, sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> Rollouts:
        """Sample `group_size` completions of each prompt; one seed per completion."""
        return self.rollout.generate(prompts, sampling, group_size=group_size, seeds=seeds)

    def get_inference_signals(self, sequences: TokenBatch) -> TokenSignals:
        """log pi_old, policy entropy and audio mass of the rollouts, without gradient."""
        return token_signals_in_parts(
            self.policy, sequences, head_reduction=self._head_reduction, rows_per_pass=self.micro_batch_size
        )

    def get_init_policy_logprobs(self, sequences: TokenBatch) -> Float[Tensor, "batch time"]:
        """log pi_ref of the rollouts."""
        return self.reference.log_probs(sequences)

    def prepare_for_training(self) -> None:
        """Training mode."""
        self.policy.train()

    def finish_training(self) -> None:
        """Nothing is offloaded on one device."""

    def prepare_for_training_step(self) -> None:
        """Nothing to gather on one device."""

    def finish_training_step(self) -> None:
        """Nothing to reduce on one device."""

    def prepare_for_validation_step(self) -> None:
        """Evaluation mode."""
        self.policy.eval()

    def finish_validation_step(self) -> None:
        """Back to training mode."""
        self.policy.train()

    def get_loss_and_metrics(self, batch: RolloutBatch, forward_only: bool) -> tuple[float, dict[str, float]]:
        """The MAPO loss of one optimiser step's rows; gradients are added up over micro-batches.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        num_rows = len(batch.advantages)
        parts: list[dict[str, Metric]] = []
        loss = 0.0
        for rows in row_slices(num_rows, self.micro_batch_size):
            part = select_batch(batch, rows)
            signals = token_signals(self.policy, part.sequences, head_reduction=self._head_reduction)
            output = mapo_loss(
                objective_inputs(
                    signals,
                    part,
                    global_sequences=num_rows,
                    global_tokens=int(batch.sequences.completion_lengths.sum()),
                ),
                self.objective,
            )
            if not output.loss.isfinite():
                raise FloatingPointError(
                    f"the loss is {float(output.loss.detach())} on rows {rows.start}..{rows.stop - 1}"
                )
            if not forward_only:
                output.loss.backward()  # type: ignore[no-untyped-call]
            loss += float(output.loss.detach())
            parts.append(output.metrics)
        return loss, merge_metrics(parts)


def objective_inputs(
    signals: TokenSignals, batch: RolloutBatch, *, global_sequences: int, global_tokens: int
) -> ObjectiveInputs:
    """Join what the policy says now with what the rollout batch remembers."""
    return ObjectiveInputs(
        log_probs=signals.log_probs,
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs,
        entropy_nats=signals.entropy_nats.detach(),
        text_ref_entropy_nats=batch.text_ref_entropy_nats,
        audio_mass=signals.audio_mass,
        pos_gate=batch.pos_gate,
        response_mask=batch.response_mask,
        advantages=batch.advantages,
        accuracy_rewards=batch.accuracy_rewards,
        finished=batch.finished,
        global_sequences=global_sequences,
        global_tokens=global_tokens,
    )
