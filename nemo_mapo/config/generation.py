"""When rollout batches are generated, and whether prompts are replaced: `trainer.mapo.generation`."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import MAX_COMPLETIONS_PER_STEP, Count

if TYPE_CHECKING:
    from nemo_mapo.config.run import RunConfig


@config_class
class SynchronousConfig:
    """Each rollout batch is generated when it is needed, with the newest weights."""

    type: Literal["synchronous"] = "synchronous"
    """Generate each rollout batch when it is needed."""

    def check(self, run: "RunConfig") -> None:
        """Nothing: every run can generate like this."""


@config_class
class DynamicSamplingConfig:
    """Prompts whose completions all have the same reward are replaced by other prompts (docs/rollouts.md)."""

    type: Literal["dynamic_sampling"] = "dynamic_sampling"
    """As `synchronous`, and replace prompts whose completions all have the same reward."""
    max_generation_rounds: Count = 3
    """Most extra rounds of generation for a rollout batch; groups that still have equal rewards then stay."""

    def check(self, run: "RunConfig") -> None:
        """ValueError if it is not known in time which groups have equal rewards, or seeds would run out."""
        if run.rewards.tars is not None:
            raise ValueError(
                "trainer.mapo.generation.type=dynamic_sampling needs the rewards while it samples, but rewards.tars "
                "adds to them later: set the type to synchronous, or rewards.tars to null"
            )
        completions = run.data.train_ds.batch_size * run.completions_per_prompt
        if (most := MAX_COMPLETIONS_PER_STEP // completions - 1) < self.max_generation_rounds:
            raise ValueError(
                f"trainer.mapo.generation.max_generation_rounds={self.max_generation_rounds} exceeds {most}: "
                f"with {completions} completions per round there are no seeds for more rounds"
            )


@config_class
class OneAheadConfig:
    """The next rollout batch is generated while this one is trained on (docs/rollouts.md)."""

    type: Literal["one_ahead"] = "one_ahead"
    """Generate the next rollout batch while training on this one."""

    def check(self, run: "RunConfig") -> None:
        """ValueError if generating ahead is impossible, or its samples would be treated as on-policy."""
        option = "trainer.mapo.generation.type=one_ahead"
        if run.rollout.backend != "vllm":
            raise ValueError(
                f"{option}: rollout.backend={run.rollout.backend} generates in the training process and cannot do "
                "both at the same time; use rollout=vllm"
            )
        if run.resolved_objective.behaviour_clip is None:
            raise ValueError(
                f"{option} trains on samples of earlier weights, which must be weighted: set "
                "objective.behaviour_clip, e.g. to 2"
            )


GenerationConfig = Annotated[SynchronousConfig | DynamicSamplingConfig | OneAheadConfig, Field(discriminator="type")]
