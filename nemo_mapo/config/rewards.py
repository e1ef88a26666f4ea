"""Rewards: a class per type with its weight and its own settings, and the judge model."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from nemo_mapo.config.base import config_class
from nemo_mapo.config.fields import (
    Count,
    Flag,
    Fraction,
    OpenFraction,
    PathText,
    Seconds,
    SecondsOrZero,
    Temperature,
    Url,
    Variable,
    Weight,
)

if TYPE_CHECKING:
    from nemo_mapo.config.run import RunConfig


@config_class
class JudgeConfig:
    """OpenAI-compatible server that judges texts and embeds them."""

    base_url: Url | None = None
    """Address up to and including /v1; null is no server."""
    model: str | None = None
    """Chat model that judges; the authors of MMAU-Pro use Qwen2.5-7B-Instruct."""
    embedding_model: str | None = None
    """Model of `closed_rule: embedding`; the authors of MMAU-Pro use NV-Embed-v2."""
    api_key_variable: Variable = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the server requires one."""
    timeout_seconds: Seconds = 60.0
    """Timeout of one request."""
    max_attempts: Count = 9
    """Requests for one reply, including the first; with the default pauses they outlast an outage of a minute."""
    pause_seconds: SecondsOrZero = 1.0
    """Pause before the second attempt; doubled for each further one, up to 30 s, and randomly varied by half."""
    temperature: Temperature = 0.0
    """Sampling temperature of the judge; its authors use 0.1."""
    max_tokens: Count = 512
    """Longest reply of the judge."""
    concurrency: Count = 8
    """Concurrent requests."""


@config_class
class RewardTerm:
    """A part of the reward."""

    weight: Weight
    """Factor in the sum; a reward with weight 0 is not computed."""
    asks_judge: ClassVar[bool] = False


@config_class
class AccuracyTerm(RewardTerm):
    """The extracted answer equals the correct choice exactly."""

    type: Literal["accuracy"] = "accuracy"
    """Which reward."""


@config_class
class FormatTerm(RewardTerm):
    """The completion follows the template."""

    type: Literal["format"] = "format"
    """Which reward."""


@config_class
class ConsistencyTerm(RewardTerm):
    """The reasoning is complete and concludes with the given answer."""

    type: Literal["consistency"] = "consistency"
    """Which reward."""
    decided_by: Literal["rule", "model"] = "rule"
    """A rule for templated text, or the judge."""
    conditional_on_correct: Flag = False
    """Ask the judge only if the answer is right; otherwise the reward is 0."""

    @property
    def asks_judge(self) -> bool:  # type: ignore[override]
        """Whether it is a judge's verdict."""
        return self.decided_by == "model"


@config_class
class ReviewedAnswerTerm(RewardTerm):
    """MPAR2 (arXiv 2603.02266): right, with a bonus for a sound review, divided by 1 + bonus."""

    type: Literal["reviewed_answer"] = "reviewed_answer"
    """Which reward."""
    review_bonus: Weight
    """b in answer * (1 + b * review); not published."""
    asks_judge: ClassVar[bool] = True


@config_class
class PerceptionTerm(RewardTerm):
    """MPAR2: the perception agrees with the clip's caption, according to the judge."""

    type: Literal["perception"] = "perception"
    """Which reward."""
    asks_judge: ClassVar[bool] = True


@config_class
class ReasoningStepsTerm(RewardTerm):
    """MPAR2: the sub-questions are answered from the perception, according to the judge."""

    type: Literal["reasoning_steps"] = "reasoning_steps"
    """Which reward."""
    step_floor: OpenFraction
    """Lowest score of a reasoning step inside the geometric mean; not published."""
    step_share: Fraction
    """Weight of the steps in the reward of the reasoning; the rest is the judge's score of the whole. Not published."""
    asks_judge: ClassVar[bool] = True


@config_class
class CustomTerm(RewardTerm):
    """Your own function, imported when the run starts (docs/rewards.md)."""

    type: Literal["custom"] = "custom"
    """Which reward."""
    path: str
    """Module and function, e.g. my_pkg.rewards:length."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function, besides the completions."""

    def __post_init__(self) -> None:
        module, colon, function = self.path.partition(":")
        if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"path is {self.path!r}: give module and function, e.g. my_pkg.rewards:length")


Mpar2Term = ReviewedAnswerTerm | PerceptionTerm | ReasoningStepsTerm
Term = Annotated[
    AccuracyTerm | FormatTerm | ConsistencyTerm | ReviewedAnswerTerm | PerceptionTerm | ReasoningStepsTerm | CustomTerm,
    Field(discriminator="type"),
]
"""One reward of a completion, and its weight in the sum; its `type` says which."""

SHIPPED = ("accuracy", "format", "consistency", "reviewed_answer", "perception", "reasoning_steps")
"""Types that are also the names of their entries."""

TAKEN_NAMES = frozenset(
    {
        *("total", "reward_mean", "completion_tokens", "reasoning_words", "finished_share", "equal_reward_groups"),
        *("overlong_penalty", "verdicts_missing", "log_prob_gap", "log_prob_mismatch", "log_prob_correlation"),
        *("log_prob_outside", "accuracy_speech", "accuracy_text", "generation_rounds", "kept_share", "replaced_groups"),
        *("staleness", "tars_behaviour", "tars_representation", "tars_without_reference", "tokens_per_second"),
    }
)
"""Rollout metrics that are not rewards; no entry of `terms` may have such a name."""

_OLD_KEYS = {
    **{name: f"rewards.terms.{name}.weight" for name in SHIPPED},
    "consistency_judge": "rewards.terms.consistency.decided_by",
    "conditional_on_correct": "rewards.terms.consistency.conditional_on_correct",
    "mpar2": "rewards.terms.reviewed_answer.review_bonus, rewards.terms.reasoning_steps.step_floor and .step_share",
}
"""Keys of earlier versions, and where their values are now."""


@config_class
class TarsConfig:
    """TARS (arXiv 2601.05543): half of a prompt's completions read its caption, the others learn to resemble them."""

    representation: Weight = 1.0
    """alpha: mean over layers of the cosine of mean hidden states."""
    behaviour: Weight = 1.0
    """beta: cosine of the texts' embeddings, by judge.embedding_model of judge.base_url."""

    def check(self, run: "RunConfig") -> None:
        """ValueError if the two halves of a group cannot be formed or trained."""
        group = run.completions_per_prompt
        if group % 2 or group < 4:
            raise ValueError(
                f"trainer.mapo.num_rollouts_per_prompt={group} must be even and at least 4 with rewards.tars: one half "
                "hears the clip, the other reads its caption"
            )
        if run.objective.mask != "none" or run.objective.eta > 0 or run.objective.log_grounding:
            raise ValueError(
                "rewards.tars trains rows without audio, which have no audio mass and no differential entropy: set "
                "objective=tars (objective.mask=none objective.eta=0 objective.log_grounding=false)"
            )
        if run.model.pipeline_model_parallel_size > 1 or run.model.sequence_parallel:
            raise ValueError(
                "rewards.tars reads hidden states of all layers: set model.pipeline_model_parallel_size=1 and "
                "model.sequence_parallel=false"
            )


def _first_terms() -> dict[str, Term]:
    return {
        "accuracy": AccuracyTerm(weight=2.0),
        "format": FormatTerm(weight=1.0),
        "consistency": ConsistencyTerm(weight=1.0),
    }


@config_class
class RewardsConfig:
    """What a completion earns: the weighted sum of `terms`."""

    terms: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Term] = Field(default_factory=_first_terms)
    """The rewards by name: {name: {type: ..., weight: ...}}. A shipped type is also the name of its entry, `custom`
    ones are named freely; with weight 0 a reward is not computed. One weight: rewards.terms.accuracy.weight=2."""
    template: Literal["think", "think_answer", "reasoning", "mpar2"] = "think"
    """`<think>...</think>answer`, with `<answer>...</answer>` around the answer (`think_answer`),
    `<reasoning>...</reasoning><answer>...</answer>`, or MPAR2's (docs/rewards.md)."""
    judge: JudgeConfig = JudgeConfig()
    judge_cache: PathText | None = None
    """File that caches the judge's verdicts across steps and runs; null caches nothing."""
    max_missing_share: Fraction = 0.1
    """Share of a rollout batch's verdicts that may be missing; above it the run saves and stops."""
    tars: TarsConfig | None = None
    """Alignment with text-conditioned completions, added to the rewards of those that hear the clip; null is off."""

    @model_validator(mode="before")
    @classmethod
    def _answer_old_keys(cls, given: Any) -> Any:
        """ValueError that says where the value of a key of earlier versions is now."""
        keys = given.kwargs if isinstance(given, ArgsKwargs) else given
        if isinstance(keys, dict) and (old := [key for key in _OLD_KEYS if key in keys]):
            now = "; ".join(f"rewards.{key} is now {_OLD_KEYS[key]}" for key in old)
            raise ValueError(f"{now} (each reward is an entry with type and weight; docs/rewards.md)")
        return given

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            self._check_name(name, term)
        judged = [name for name, term in self.computed.items() if isinstance(term, Mpar2Term)]
        if judged and self.template != "mpar2":
            raise ValueError(f"{', '.join(judged)} above 0 needs template=mpar2, whose parts it judges")
        embeds = self.tars is not None and self.tars.behaviour > 0
        if embeds and (self.judge.base_url is None or self.judge.embedding_model is None):
            raise ValueError(
                "tars.behaviour above 0 compares embeddings of texts: set judge.base_url and judge.embedding_model, or "
                "set it to 0"
            )
        if self.asks_judge and (self.judge.base_url is None or self.judge.model is None):
            asks = ", ".join(judged) if judged else "terms.consistency.decided_by=model"
            raise ValueError(
                f"{asks}: needs a judge; set judge.base_url to an OpenAI-compatible server (http://HOST:8000/v1) and "
                "judge.model to its model"
            )

    @staticmethod
    def _check_name(name: str, term: Term) -> None:
        if term.type != "custom" and name != term.type:
            raise ValueError(f"terms.{name}: type is {term.type}, and so must be the name: write terms.{term.type}")
        if term.type == "custom" and name in (*SHIPPED, *TAKEN_NAMES):
            raise ValueError(f"terms.{name}: the name is taken by a shipped reward or metric: choose another")

    @property
    def computed(self) -> dict[str, Term]:
        """Rewards to compute, by name: those with a weight, and accuracy, which the attention loss always needs."""
        accuracy: dict[str, Term] = {"accuracy": self.terms.get("accuracy", AccuracyTerm(weight=0.0))}
        return accuracy | {name: term for name, term in self.terms.items() if term.weight > 0}

    @property
    def asks_judge(self) -> bool:
        """Whether any reward is a judge's verdict."""
        return any(term.asks_judge for term in self.computed.values())

    @property
    def accuracy_only(self) -> "RewardsConfig":
        """The same with accuracy as the only reward, which needs no judge."""
        return RewardsConfig(terms={"accuracy": AccuracyTerm(weight=1.0)}, template=self.template)

    @property
    def without_code(self) -> "RewardsConfig":
        """The same without the user's own functions, for recorded configs, whose code is not to be run."""
        return replace(self, terms={name: term for name, term in self.terms.items() if term.type != "custom"})

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every reward that is computed, by name."""
        return {name: float(term.weight) for name, term in self.computed.items()}
