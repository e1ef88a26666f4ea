"""Sources of a step's completions: one class per way of getting them, combined as the config says.

    source = Refilled(Synchronous(requests, sampler, timer), requests, sampler, score, timer, max_rounds=3)
    source.next(step, version=optimization_step).groups  # of this rank's share of the step's prompts

Sampling depends only on seed, step and place: neither the number of ranks nor the time at which a batch is begun
changes a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.fields import MAX_COMPLETIONS_PER_STEP
from nemo_mapo.config.run import RunConfig, SamplingConfig
from nemo_mapo.models.tensors import policy_tensors
from nemo_mapo.ranks import data_parallel_prompts
from nemo_mapo.rewards.combined import RewardTable
from nemo_mapo.rewards.templates import prompt_wording
from nemo_mapo.rollout.protocol import OverlappingBackend, PendingCompletions
from nemo_mapo.rows import Completion, Group, Problem, completions_of
from nemo_mapo.training.actor import MapoActor
from nemo_mapo.training.dynamic_sampling import RefillingPromptStream, Score, refill
from nemo_mapo.training.prompts import PromptStream
from nemo_mapo.training.scoring import RolloutScorer, Timer
from nemo_mapo.training.tars import MODALITIES, with_text_twins
from nemo_mapo.types import Wording

_SEEDS_PER_STEP = MAX_COMPLETIONS_PER_STEP
"""Rows of a step get consecutive seeds; steps are this far apart."""
_SEEDS_PER_RUN = 2**44
"""Runs with different `seed` are this far apart: no two rows of any two runs share a seed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepGroups:
    """What a source gives for one step."""

    groups: list[Group]
    """Of this rank's share of the prompts."""
    tokens: int
    """That this rank's first round of generation drew."""
    sampled: int
    """Completions that all ranks sampled, in all rounds."""
    rewards: RewardTable | None = None
    """Set if the source needed them; otherwise they are still to be computed."""
    metrics: dict[str, float]


@runtime_checkable
class RolloutSource(Protocol):
    """Gives the groups of each training step; all ranks call it together."""

    def next(self, step: int, *, version: int) -> StepGroups:
        """The groups that `step` trains on; `version` is that of the policy's weights now.

        Raises:
            RolloutUnavailable: the engine cannot be reached.
            RewardsUnavailable: the source needs rewards, and a judge cannot be reached.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The data position before anything not returned yet, from which a resumed run draws again."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        ...

    def close(self) -> None:
        """Stop; no further groups are needed."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Problems to be completed: `Request(problems=problems, group_size=8, seeds=torch.arange(8 * len(problems)))`."""

    problems: Sequence[Problem]
    group_size: int
    """Completions of each problem."""
    seeds: Int[Tensor, " batch"]


class Requests:
    """The request of each step: every problem of the stream, with a group of `num_rollouts_per_prompt`."""

    def __init__(self, config: RunConfig, prompts: PromptStream) -> None:
        self.prompts = prompts
        self.group_size = config.trainer.mapo.num_rollouts_per_prompt
        self.places = data_parallel_prompts(prompts.batch_size, config.steps_per_generation)
        """Positions of this rank's problems in the whole batch."""
        self._first_seed = config.seed * _SEEDS_PER_RUN

    @property
    def completions_per_step(self) -> int:
        """Of all ranks, in one round."""
        return self.prompts.batch_size * self.group_size

    def next(self, step: int) -> Request:
        """The next problems, with the seeds of `step`."""
        return Request(problems=next(self.prompts), group_size=self.group_size, seeds=self.seeds(self.places, step))

    def seeds(self, places: Sequence[int], step: int, number: int = 0) -> Int[Tensor, " batch"]:
        """A seed for every completion of the problems at `places`, in a round of generation (0 the first) of `step`."""
        first = self._first_seed + step * _SEEDS_PER_STEP + number * self.completions_per_step
        return first + (torch.tensor(places)[:, None] * self.group_size + torch.arange(self.group_size)).flatten()

    def metrics(self) -> dict[str, float]:
        """Of the data, as of the last request."""
        return self.prompts.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return {"epoch": self.prompts.epoch, "prompts": self.prompts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.prompts.load_state_dict(state["prompts"])


class Twinned(Requests):
    """TARS: half of each group gets the clip, the other half its caption."""

    def __init__(
        self, config: RunConfig, prompts: PromptStream, tokenizer: PreTrainedTokenizerBase, wording: Wording
    ) -> None:
        super().__init__(config, prompts)
        self.tokenizer = tokenizer
        self.wording = wording

    def next(self, step: int) -> Request:
        """As without twins, each problem twice; ValueError naming a question without a caption."""
        request = super().next(step)
        twins = with_text_twins(request.problems, self.tokenizer, self.wording)
        return replace(request, problems=twins, group_size=request.group_size // MODALITIES)


class Sampler:
    """The actor's engine, which is sent the actor's weights: `Sampler(actor, sampling).draw(request)`."""

    def __init__(self, actor: MapoActor, sampling: SamplingConfig) -> None:
        self.actor = actor
        self.sampling = sampling

    def send_weights(self, version: int) -> None:
        """Sample from the policy's present weights from now on."""
        self.actor.rollout.update_weights(version, policy_tensors(self.actor.policy))

    def draw(self, request: Request) -> list[Group]:
        """The groups of a request."""
        prompts = [problem.prompt for problem in request.problems]
        drawn = self.actor.infer(prompts, self.sampling, group_size=request.group_size, seeds=request.seeds)
        return answered(request, drawn)

    def begin(self, request: Request) -> PendingCompletions:
        """Begin what `draw` does, concurrently with the trainer."""
        engine, prompts = self.actor.rollout, [problem.prompt for problem in request.problems]
        assert isinstance(engine, OverlappingBackend), "the config demands it"
        return engine.begin(prompts, self.sampling, group_size=request.group_size, seeds=request.seeds)


def answered(request: Request, drawn: Sequence[Sequence[Completion]]) -> list[Group]:
    """Each problem of a request with its completions."""
    return [problem.answered(group) for problem, group in zip(request.problems, drawn, strict=True)]


class Synchronous:
    """Generates a step's batch when it is asked for, with the weights of that moment."""

    def __init__(self, requests: Requests, sampler: Sampler, timer: Timer) -> None:
        self.requests = requests
        self.sampler = sampler
        self.timer = timer

    def next(self, step: int, *, version: int) -> StepGroups:
        """See `RolloutSource`."""
        with self.timer("data"):
            request = self.requests.next(step)
        self.sampler.send_weights(version)
        with self.timer("rollout"):
            groups = self.sampler.draw(request)
        return _drawn(groups, self.requests, self.requests.metrics())

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return self.requests.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.requests.load_state_dict(state)

    def close(self) -> None:
        """Nothing is in flight."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Begun:
    """A batch in flight."""

    request: Request
    pending: PendingCompletions
    before: dict[str, Any]
    """State of the requests before it."""
    metrics: dict[str, float]


class OneAhead:
    """Begins the next step's batch as soon as one has arrived, before that one is trained on."""

    def __init__(self, requests: Requests, sampler: Sampler, timer: Timer, *, steps: int) -> None:
        """`steps` of the run: nothing is begun beyond them."""
        self.requests = requests
        self.sampler = sampler
        self.timer = timer
        self.steps = steps
        self._begun: _Begun | None = None

    def next(self, step: int, *, version: int) -> StepGroups:
        """See `RolloutSource`."""
        begun = self._begun or self._begin(step, version)
        with self.timer("rollout"):
            groups = answered(begun.request, begun.pending.result())
        with self.timer("begin_next"):
            self._begun = self._begin(step + 1, version) if step + 1 < self.steps else None
        return _drawn(groups, self.requests, begun.metrics)

    def _begin(self, step: int, version: int) -> _Begun:
        before = self.requests.state_dict()
        request = self.requests.next(step)
        self.sampler.send_weights(version)
        pending = self.sampler.begin(request)
        return _Begun(request=request, pending=pending, before=before, metrics=self.requests.metrics())

    def state_dict(self) -> dict[str, Any]:
        """Position in the data before the batch in flight: the resumed run begins it again."""
        return self.requests.state_dict() if self._begun is None else self._begun.before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.requests.load_state_dict(state)

    def close(self) -> None:
        """Send no further requests to the engine."""
        if self._begun is not None:
            self._begun.pending.abandon()


class Refilled:
    """Dynamic sampling: other prompts replace groups whose rewards are equal (`dynamic_sampling`)."""

    def __init__(
        self,
        inner: RolloutSource,
        requests: Requests,
        sampler: Sampler,
        score: Score,
        timer: Timer,
        *,
        max_rounds: int,
    ) -> None:
        """Refill the groups of `inner` from the reserve of the stream that `requests` reads."""
        self.inner = inner
        self.requests = requests
        self.sampler = sampler
        self.score = score
        self.timer = timer
        self.max_rounds = max_rounds

    def next(self, step: int, *, version: int) -> StepGroups:
        """See `RolloutSource`; the rewards are known."""
        drawn = self.inner.next(step, version=version)
        stream, requests = self.requests.prompts, self.requests
        assert isinstance(stream, RefillingPromptStream)

        def sample(number: int, places: list[int], mine: list[int]) -> list[Group]:
            problems = stream.spare(len(places), mine)
            seeds = requests.seeds([places[index] for index in mine], step, number)
            return self.sampler.draw(Request(problems=problems, group_size=requests.group_size, seeds=seeds))

        with self.timer("refill"):
            refilled = refill(
                drawn.groups, places=requests.places, max_rounds=self.max_rounds, score=self.score, sample=sample
            )
        return StepGroups(
            groups=refilled.groups,
            tokens=drawn.tokens,
            sampled=refilled.sampled * requests.group_size,
            rewards=refilled.rewards,
            metrics=drawn.metrics | refilled.metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the inner source; the stream's state includes the reserve."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the inner source."""
        self.inner.load_state_dict(state)

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()


def build_source(
    config: RunConfig, prompts: PromptStream, actor: MapoActor, scorer: RolloutScorer, timer: Timer, *, steps: int
) -> RolloutSource:
    """The source that `config` asks for, on a stream of problems; with dynamic sampling one that has a reserve."""
    sampler = Sampler(actor, config.rollout.sampling)
    requests = Requests(config, prompts)
    if config.rewards.tars is not None:
        wording = prompt_wording(config.data.prompt, config.rewards.template)
        requests = Twinned(config, prompts, scorer.tokenizer, wording)
    generation = config.trainer.mapo.generation
    if generation.type == "one_ahead":
        return OneAhead(requests, sampler, timer, steps=steps)
    source = Synchronous(requests, sampler, timer)
    if generation.type == "synchronous":
        return source
    return Refilled(source, requests, sampler, scorer.rewards_of, timer, max_rounds=generation.max_generation_rounds)


def _drawn(groups: list[Group], requests: Requests, metrics: dict[str, float]) -> StepGroups:
    tokens = sum(map(len, completions_of(groups)))
    return StepGroups(groups=groups, tokens=tokens, sampled=requests.completions_per_step, metrics=metrics)
