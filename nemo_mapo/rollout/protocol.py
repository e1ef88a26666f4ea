"""What the trainer and the evaluation ask of an engine that generates completions."""

from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.types import PromptBatch, Rollouts


@runtime_checkable
class RolloutBackend(Protocol):
    """An engine that samples completions from the policy."""

    @property
    def weight_version(self) -> int:
        """Version of the policy's weights that the next call of `generate` samples from."""
        ...

    def update_weights(self, version: int) -> None:
        """Sample from the trainer's present weights from now on and call them `version`."""
        ...

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        *,
        group_size: int,
        seeds: Int[Tensor, " batch"],
    ) -> Rollouts:
        """Sample `group_size` completions of every prompt.

        Args:
            prompts: right-padded prompts with their audio.
            sampling: how tokens are drawn, and the length limits.
            group_size: completions per prompt, at least 1.
            seeds: int64, one per completion, row = prompt * group_size + g. A completion depends on its prompt, the
                weights, `sampling` and its own seed, and on nothing else in the batch.

        Returns:
            Completions in the order of the seeds; `weight_version` is that of the weights they were sampled from.

        Raises:
            ValueError: if the seeds do not match the completions, or a prompt and its completion do not fit the model.
        """
        ...
