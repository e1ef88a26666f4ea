"""Rewards: their weights, and the model that judges."""

from typing import Annotated, Literal

from pydantic import Field

from nemo_mapo.config.base import config_class

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]

_MPAR2_REWARDS = ("reviewed_answer", "perception", "reasoning_steps")


@config_class
class JudgeConfig:
    """OpenAI-compatible server that judges texts and embeds them."""

    base_url: str | None = None
    """Address up to and with /v1; null is no server."""
    model: str | None = None
    """Chat model that judges; the authors of MMAU-Pro use Qwen2.5-7B-Instruct."""
    embedding_model: str | None = None
    """Model of `closed_rule: embedding`; the authors of MMAU-Pro use NV-Embed-v2."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the server wants one."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Of one request."""
    max_attempts: Count = 9
    """Requests for one reply, the first included; with the pauses of the defaults an outage of a minute is outlived."""
    pause_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Before the second attempt; doubled for each one after up to 30 s, and varied at random by half."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the judge; its authors sample at 0.1."""
    max_tokens: Count = 512
    """Of the judge's reply."""
    concurrency: Count = 8
    """Requests under way at a time."""


@config_class
class Mpar2Config:
    """What MPAR2 (arXiv 2603.02266) does not publish: values that you have to choose."""

    review_bonus: Weight
    """b in answer * (1 + b * review)."""
    step_floor: Annotated[float, Field(gt=0, lt=1)]
    """Least score of a reasoning step inside the geometric mean."""
    step_share: Annotated[float, Field(ge=0, le=1)]
    """Share of the steps in the reward of the reasoning; the rest is the judge's view of the whole."""


@config_class
class TarsConfig:
    """TARS (arXiv 2601.05543): half of a prompt's completions read its caption, the others are to resemble them."""

    representation: Weight = 1.0
    """alpha: mean over layers of the cosine of mean hidden states."""
    behaviour: Weight = 1.0
    """beta: cosine of the texts' embeddings, by judge.embedding_model of judge.base_url."""


@config_class
class RewardsConfig:
    """Weights of the rewards; a reward with weight 0 is not computed."""

    accuracy: Weight = 2.0
    """Weight of: the extracted answer is the right choice, exactly."""
    format: Weight = 1.0
    """Weight of: the completion follows the template."""
    consistency: Weight = 1.0
    """Weight of: the reasoning is complete and concludes what is answered."""
    reviewed_answer: Weight = 0.0
    """Weight of (MPAR2): right, with a bonus for a sound review, divided by 1 + bonus."""
    perception: Weight = 0.0
    """Weight of (MPAR2): the perception agrees with the clip's caption, as the judge sees it."""
    reasoning_steps: Weight = 0.0
    """Weight of (MPAR2): the sub-questions are answered from the perception, as the judge sees it."""
    template: Literal["think", "think_answer", "reasoning", "mpar2"] = "think"
    """`<think>...</think>answer`, with `<answer>...</answer>` around the answer (`think_answer`),
    `<reasoning>...</reasoning><answer>...</answer>`, or MPAR2's (docs/rewards.md)."""
    consistency_judge: Literal["rule", "model"] = "rule"
    """Who decides on consistency: a rule for templated text, or the judge."""
    conditional_on_correct: bool = False
    """Ask the judge about consistency only where the answer is right; elsewhere it is 0."""
    judge: JudgeConfig = JudgeConfig()
    judge_cache: str | None = None
    """File that remembers the judge's verdicts over steps and runs; null remembers nothing."""
    max_missing_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of a rollout batch's verdicts that may be missing; above it the run saves and stops."""
    mpar2: Mpar2Config | None = None
    tars: TarsConfig | None = None
    """Alignment with text-conditioned completions, added to the rewards of those that hear; null is off."""

    def __post_init__(self) -> None:
        judged = [name for name in _MPAR2_REWARDS if vars(self)[name] > 0]
        if judged and self.mpar2 is None:
            raise ValueError(f"{', '.join(judged)} above 0 needs mpar2.review_bonus, .step_floor and .step_share")
        if judged and self.template != "mpar2":
            raise ValueError(f"{', '.join(judged)} above 0 needs template=mpar2, whose parts it judges")
        embeds = self.tars is not None and self.tars.behaviour > 0
        if embeds and (self.judge.base_url is None or self.judge.embedding_model is None):
            raise ValueError(
                "tars.behaviour above 0 compares embeddings of texts: set judge.base_url and judge.embedding_model, or "
                "set it to 0"
            )
        if self.asks_judge and (self.judge.base_url is None or self.judge.model is None):
            asks = ", ".join(judged) if judged else "consistency_judge=model"
            raise ValueError(
                f"{asks}: needs a judge; set judge.base_url to an OpenAI-compatible server (http://HOST:8000/v1) and "
                "judge.model to its model"
            )

    @property
    def asks_judge(self) -> bool:
        """Whether any reward is a judge's verdict."""
        by_model = self.consistency_judge == "model" and self.consistency > 0
        return by_model or any(vars(self)[name] > 0 for name in _MPAR2_REWARDS)

    @property
    def accuracy_only(self) -> "RewardsConfig":
        """The same without any reward but accuracy: no judge is asked."""
        return RewardsConfig(accuracy=1.0, format=0.0, consistency=0.0, template=self.template)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every reward, by name."""
        names = ("accuracy", "format", "consistency", *_MPAR2_REWARDS)
        return {name: float(vars(self)[name]) for name in names}
