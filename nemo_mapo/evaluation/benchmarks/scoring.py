"""Scores of predictions: exactly one per item of the benchmark."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from nemo_mapo.evaluation.benchmarks.instructions import count_sentences, follows_instruction, needs_sentences
from nemo_mapo.evaluation.benchmarks.items import Benchmark, Item
from nemo_mapo.evaluation.benchmarks.official import official_string_match
from nemo_mapo.evaluation.benchmarks.open_ended import OpenEndedJudge
from nemo_mapo.evaluation.benchmarks.predictions import Prediction
from nemo_mapo.rewards.answers import normalise_answer, resolve_choice
from nemo_mapo.rewards.judge import EmbeddingModel
from nemo_mapo.rewards.templates import extract_answer

AnswerTemplate = Literal["think", "think_answer", "reasoning", "mpar2", "none"]
Status = Literal["answered", "missing", "unparsable"]

_NOTHING = "\ue000{}"
"""Placeholder for an empty slot, which no answer may name; a private-use character, so never in an answer."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one item."""

    id: str
    value: float
    """1 or 0 for closed questions and instructions, the judge's overall rating / 5 for open ones."""
    status: Status
    """`missing`: there is no prediction. `unparsable`: it holds no answer, or one that names no choice. Both are 0."""
    official: bool | None = None
    """Whether it is right by `official_string_match`; None if the benchmark's own script has another rule."""


NamesChoice = Callable[[str, Item, tuple[str, ...] | None], str | None]
"""Answer, item and the order in which its choices were shown, to the choice that is named or None."""


def read_answer(prediction: Prediction, template: AnswerTemplate) -> str | None:
    """The answer in a completion, or None if it gives none."""
    if template == "none":
        return prediction.completion.strip() or None
    return extract_answer(prediction.completion, template, finished=prediction.finished)


def named_choice(answer: str, item: Item, shown: tuple[str, ...] | None) -> str | None:
    """The choice that an answer names by its text, its letter or both; None if it names none or may name several.

    Strict: see `rewards.answers.resolve_choice`. A letter counts in the order in which the choices were shown (by
    default as published, empty slots included); what counts in the end is the text, so the order does not matter. A
    choice that is listed twice is one choice with two letters.
    """
    slots: Sequence[str | None] = item.slots if shown is None else shown
    spelled = [
        _NOTHING.format(place) if text is None or text in slots[:place] else text for place, text in enumerate(slots)
    ]
    place = resolve_choice(answer, spelled)
    return None if place is None else slots[place]


class NearestChoice:
    """Names the choice whose embedding has the largest cosine with the answer's: MMAU-Pro's rule for closed questions.

    It always names a choice, even for a refusal; so only a completion without any answer is `unparsable`.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self._model = model

    def __call__(self, answer: str, item: Item, shown: tuple[str, ...] | None) -> str | None:
        """The first of the nearest choices, in published order; None if there are no choices."""
        if not item.choices:
            return None
        target, *vectors = self._model.embed([answer, *item.choices])
        cosines = [_dot(target, vector) / _dot(vector, vector) ** 0.5 for vector in vectors]
        return item.choices[cosines.index(max(cosines))]


class Scorer:
    """Scores the predictions of a benchmark."""

    def __init__(
        self,
        benchmark: Benchmark,
        *,
        template: AnswerTemplate,
        judge: OpenEndedJudge | None = None,
        names_choice: NamesChoice = named_choice,
        concurrency: int = 1,
    ) -> None:
        """Check that scoring has everything it needs.

        Args:
            benchmark: its items are scored, all of them.
            template: what surrounds the answer in a completion.
            judge: needed if there are open-ended questions.
            names_choice: the rule for closed questions.
            concurrency: closed questions passed to `names_choice` at a time.

        Raises:
            ValueError: open-ended questions without a judge; instructions about sentences without NLTK's data.
        """
        if judge is None and any(item.part == "open" for item in benchmark.items):
            raise ValueError(
                f"{benchmark.path} has open-ended questions, which a judge scores: set judge.base_url and judge.model"
            )
        if any(needs_sentences(item.rule) for item in benchmark.items):
            count_sentences("One. Two.")
        self.benchmark = benchmark
        self.template = template
        self._judge = judge
        self._names_choice = names_choice
        self._concurrency = concurrency

    def __call__(self, predictions: Mapping[str, Prediction]) -> list[Score]:
        """One score per item, in the order of the benchmark.

        Raises:
            ValueError: the answers are withheld.
            JudgeError: a model needed for scoring cannot be reached.
        """
        if self.benchmark.is_withheld:
            raise ValueError(
                f"{self.benchmark.path}: the answers are withheld; only the benchmark's authors can score it"
            )
        scores: dict[str, Score] = {}
        closed: list[tuple[Item, str, tuple[str, ...] | None]] = []
        judged: list[tuple[Item, str]] = []
        for item in self.benchmark.items:
            prediction = predictions.get(item.id)
            answer = None if prediction is None else read_answer(prediction, self.template)
            if prediction is None or answer is None:
                status: Status = "missing" if prediction is None else "unparsable"
                scores[item.id] = Score(id=item.id, value=0.0, status=status)
            elif item.part == "closed":
                closed.append((item, answer, prediction.shown_choices))
            elif item.part == "open":
                judged.append((item, answer))
            else:
                assert item.rule is not None
                follows = follows_instruction(answer, item.rule, item.arguments, item.question)
                scores[item.id] = Score(id=item.id, value=float(follows), status="answered")
        scores |= self._closed(closed) | self._open(judged)
        answers = {item.id: answer for item, answer, _ in closed}
        return [self._with_official(scores[item.id], item, answers.get(item.id)) for item in self.benchmark.items]

    def _with_official(self, score: Score, item: Item, answer: str | None) -> Score:
        if not self.benchmark.layout.string_match:
            return score
        right = answer is not None and official_string_match(answer, item.answer or "", item.choices)
        return replace(score, official=right)

    def _closed(self, answers: Sequence[tuple[Item, str, tuple[str, ...] | None]]) -> dict[str, Score]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            named = list(pool.map(lambda one: self._names_choice(one[1], one[0], one[2]), answers))
        return {
            item.id: _closed_score(item, answer, choice)
            for (item, answer, _), choice in zip(answers, named, strict=True)
        }

    def _open(self, answers: Sequence[tuple[Item, str]]) -> dict[str, Score]:
        if self._judge is None:
            return {}
        return {one.id: Score(id=one.id, value=one.score, status="answered") for one in self._judge(answers)}


def _closed_score(item: Item, answer: str, named: str | None) -> Score:
    assert item.answer is not None
    # If the published answer is not among the choices, only the same text can be right.
    spelled = item.is_defective and normalise_answer(answer) == normalise_answer(item.answer)
    value = float(named == item.answer or spelled)
    return Score(id=item.id, value=value, status="answered" if named is not None or spelled else "unparsable")


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(one * other for one, other in zip(first, second, strict=True))
