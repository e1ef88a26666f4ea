"""The actor with NeMo-Aligner's interface, for NeMo-Aligner's trainers; our own trainer uses the actor directly."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.aligner import AlignableGenerativeInterface
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rows import Completion, Prompt, Row, ScoredRow
from nemo_mapo.training.actor import MapoActor


class AlignableMapo(AlignableGenerativeInterface):  # type: ignore[misc]
    """NeMo-Aligner's names for what a `MapoActor` does: `AlignableMapo(actor).get_loss_and_metrics(batch, False)`.

    Gradients are reduced and adapters stay in place inside `get_loss_and_metrics`, so that the hooks around it only set
    the mode of the policy's modules.
    """

    def __init__(self, actor: MapoActor) -> None:
        self.actor = actor

    def prepare_for_inference(self) -> None:
        """Evaluation mode."""
        self.actor.prepare_for_inference()

    def infer(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, group_size: int, seeds: Int[Tensor, " batch"]
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt; one seed per completion."""
        return self.actor.infer(prompts, sampling, group_size=group_size, seeds=seeds)

    def finish_inference(self) -> None:
        """Training mode; an engine in this process makes room."""
        self.actor.finish_inference()

    def get_init_policy_logprobs(self, rows: Sequence[Row]) -> list[Float[Tensor, "_"]]:
        """log pi_ref of each completion token, nats, by row."""
        return self.actor.get_init_policy_logprobs(rows)

    def get_loss_and_metrics(self, batch: Sequence[ScoredRow], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Loss of one optimiser step, its gradient in Megatron's buffers unless `forward_only`."""
        return self.actor.get_loss_and_metrics(batch, forward_only)

    def prepare_for_training(self) -> None:
        """Training mode."""
        self.actor.policy.train()

    prepare_for_training_step = prepare_for_training
    finish_validation_step = prepare_for_training

    def prepare_for_validation_step(self) -> None:
        """Evaluation mode."""
        self.actor.policy.eval()

    def finish_training_step(self) -> None:
        """Nothing is left to do."""

    finish_training = finish_training_step
