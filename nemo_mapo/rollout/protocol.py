"""The interface that trainer and evaluation require of an engine that generates completions."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.console import Unavailable
from nemo_mapo.rows import Completion, Prompt


class RolloutUnavailable(Unavailable):
    """No completions are available, or no engine has the weights: the run has to save and stop."""


@runtime_checkable
class RolloutBackend(Protocol):
    """An engine that samples completions from the policy."""

    @property
    def weight_version(self) -> int:
        """Version of the policy's weights that the next call of `generate` samples from."""
        ...

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on and call them `version`.

        Args:
            version: number of the weights; `weight_version` once they are taken.
            tensors: all tensors of `AudioLLM.state_dict()`, whole, one after the other. An engine that reads the
                training weights in place does not consume them. If the model is sharded, only rank 0 gets them, and
                an engine that consumes them has to exhaust the iterator on all ranks (`policy_tensors`).

        Raises:
            ValueError: the tensors are not those of the engine's model; it keeps its weights and their version.
            RolloutUnavailable: the engine cannot be reached.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        group_size: int,
        seeds: Int[Tensor, " batch"],
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of every prompt.

        Args:
            prompts: to complete.
            sampling: how tokens are drawn, and the length limits.
            group_size: completions per prompt, at least 1.
            seeds: int64, one per completion, those of one prompt adjacent. A completion depends only on its prompt,
                the weights, `sampling` and its own seed, not on the rest of the batch.

        Returns:
            The completions of each prompt, in the order of the seeds.

        Raises:
            ValueError: if the seeds do not match the completions, or a prompt and its completion do not fit the model.
        """
        ...

    def release(self) -> None:
        """No more generation before the next `update_weights`: release resources that training can use."""
        ...


@runtime_checkable
class PendingCompletions(Protocol):
    """Completions in flight."""

    def result(self) -> list[list[Completion]]:
        """Wait for them, prompt by prompt. To be called by all ranks.

        Raises:
            RolloutUnavailable: there are none.
        """
        ...

    def abandon(self) -> None:
        """Stop requesting them; they are no longer needed."""
        ...


@runtime_checkable
class OverlappingBackend(RolloutBackend, Protocol):
    """An engine that generates concurrently with the trainer."""

    def begin(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        group_size: int,
        seeds: Int[Tensor, " batch"],
    ) -> PendingCompletions:
        """Begin what `generate` does and return at once.

        Weights must not be updated before `PendingCompletions.result` has returned.
        """
        ...
