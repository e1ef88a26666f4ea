"""MMAR-Rubrics: a judge scores the reasoning behind right answers by the rubric of each item, several times over.

Its rules are those of MMAR's evaluation_rubrics.py (February 2026): a wrong answer scores 0; otherwise each of five
ratings gives points for every criterion, the share of the possible points is a score, and an item's value is the mean
of the middle three. The prompt is MMAR's own and not included here: it is read from a file.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from nemo_mapo.evaluation.benchmarks.official import official_string_match
from nemo_mapo.evaluation.benchmarks.records import named_records, read_records
from nemo_mapo.http_client import decode_json
from nemo_mapo.rewards.judge import ChatModel, JudgeError
from nemo_mapo.training.records import JsonLines

RATERS: Final = 5
_SEPARATOR = "\n===\n"
_FIELDS: Final = ("question", "answer", "ideal_reasoning", "reasoning", "prediction")
_OF_CRITERION: Final = ("name", "scoring_point", "choices")
_GROUPS: Final = ("modality", "category")
"""Fields by which scores are grouped."""
_BLOCK = re.compile(r"\{#criteria\}(.*?)\{/criteria\}", re.DOTALL)
_NAMED = re.compile(r"\{(\w+)\}")
_LIST = re.compile(r"\[\s*\{.*\}\s*\]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One line of an item's rubric."""

    name: str
    scoring_point: str
    choices: tuple[int, ...]
    """The points that may be given."""


@dataclass(frozen=True, kw_only=True)
class RubricItem:
    """The information about a question that the judge gets."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: str
    ideal_reasoning: str
    rubric: tuple[Criterion, ...]
    groups: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Reasoned:
    """A prediction, split into reasoning and answer."""

    reasoning: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class RubricScore:
    """The score of an item."""

    id: str
    value: float
    correct: bool


def read_rubric_items(path: Path) -> list[RubricItem]:
    """Read MMAR-meta.jsonl; ValueError, naming the item, if one has no usable rubric."""
    items = []
    for where, record in named_records(path, "id"):
        for name in ("question", "answer", "thinking"):
            if not isinstance(record.get(name), str):
                raise ValueError(f"{where}: field {name!r} is {record.get(name)!r}: it must be a text")
        choices = record.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{where}: field 'choices' is {choices!r}: it must be a list of texts")
        items.append(
            RubricItem(
                id=str(record["id"]),
                question=record["question"],
                choices=tuple(choices),
                answer=record["answer"],
                ideal_reasoning=record["thinking"],
                rubric=_rubric(record.get("rubric"), where),
                groups={name: str(record.get(name)) for name in _GROUPS},
            )
        )
    return items


def _rubric(value: Any, where: str) -> tuple[Criterion, ...]:
    found = []
    for entry in value if isinstance(value, list) else []:
        points = entry.get("choices") if isinstance(entry, dict) else None
        if not isinstance(points, list) or not points or any(type(point) is not int for point in points):
            raise ValueError(f"{where}: field 'rubric' has a criterion without a list of points: {entry!r}")
        name, scoring_point = entry.get("name"), entry.get("scoring_point")
        if not isinstance(name, str) or not isinstance(scoring_point, str):
            raise ValueError(f"{where}: field 'rubric' has a criterion without name or scoring_point: {entry!r}")
        found.append(Criterion(name=name, scoring_point=scoring_point, choices=tuple(points)))
    if sum(max(criterion.choices) for criterion in found) <= 0:
        raise ValueError(f"{where}: field 'rubric' gives no points; take MMAR-meta.jsonl of February 2026 or later")
    return tuple(found)


def read_reasoned(path: Path, items: Sequence[RubricItem]) -> dict[str, Reasoned]:
    """Read `thinking_prediction` and `answer_prediction` by id, the keys of MMAR's script; null is a missing one.

    Raises:
        ValueError: naming record and field: an id of no item, or a value that is not a text.
    """
    known, found = {item.id for item in items}, {}
    for where, record in named_records(path, "id"):
        if str(record["id"]) not in known:
            raise ValueError(f"{where}: field 'id' is not an item of the benchmark")
        texts = [record.get(name) for name in ("thinking_prediction", "answer_prediction")]
        if texts == [None, None]:
            continue
        for name, text in zip(("thinking_prediction", "answer_prediction"), texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{where}: field {name!r} is {text!r}: it must be a text")
        found[str(record["id"])] = Reasoned(reasoning=str(texts[0]), answer=str(texts[1]))
    if not found:
        raise ValueError(f"{path}: no record has thinking_prediction and answer_prediction")
    return found


class RubricPrompt:
    """The published prompt as a file: system message, a line `===`, then the question to the judge.

    `{question}`, `{answer}`, `{ideal_reasoning}`, `{reasoning}` and `{prediction}` are filled in; the text between
    `{#criteria}` and `{/criteria}` is repeated for each criterion with its `{name}`, `{scoring_point}`, `{choices}` and
    `{comma}`, which is empty for the last one.
    """

    def __init__(self, path: Path) -> None:
        """Read it; ValueError names missing and unknown fields."""
        if not path.is_file():
            raise ValueError(f"no prompt at {path}: write MMAR's own there (docs/evaluation.md says how)")
        self.system, separator, self._user = path.read_text(encoding="utf-8").partition(_SEPARATOR)
        if not separator:
            raise ValueError(f"{path}: the prompt lacks a line === between system message and question")
        blocks = "".join(_BLOCK.findall(self._user))
        named = set(_NAMED.findall(_BLOCK.sub("", self._user)))
        missing = [f"{{{name}}}" for name in _FIELDS if name not in named]
        missing += [f"{{{name}}}" for name in _OF_CRITERION if name not in _NAMED.findall(blocks)]
        if missing:
            raise ValueError(f"{path}: the prompt lacks {', '.join(missing)}")
        if unknown := sorted((named - set(_FIELDS)) | (set(_NAMED.findall(blocks)) - {*_OF_CRITERION, "comma"})):
            raise ValueError(f"{path}: the prompt has the unknown field {{{unknown[0]}}}")

    def filled(self, item: RubricItem, said: Reasoned) -> str:
        """The question to the judge about one prediction."""
        values = {**vars(item), "reasoning": said.reasoning, "prediction": said.answer}

        def repeated(block: re.Match[str]) -> str:
            last = len(item.rubric) - 1
            return "".join(
                _filled(
                    block[1], {**vars(criterion), "choices": list(criterion.choices), "comma": "," * (place < last)}
                )
                for place, criterion in enumerate(item.rubric)
            )

        # Outside the blocks first and in one pass, so that no filled-in text is taken for a field.
        parts = _BLOCK.split(self._user)
        blocks = [repeated(match) for match in _BLOCK.finditer(self._user)]
        texts = [_filled(part, values) for part in parts[::2]]
        return "".join(text for pair in zip(texts, [*blocks, ""], strict=True) for text in pair)


def _filled(text: str, values: Mapping[str, Any]) -> str:
    return _NAMED.sub(lambda match: str(values[match[1]]), text)


def points_share(reply: str, rubric: Sequence[Criterion]) -> float | None:
    """Points over possible points; None for a reply that does not give points to every criterion in order."""
    found = _LIST.search(reply)
    try:
        given = decode_json(found.group() if found else reply)
    except ValueError:
        return None
    if not isinstance(given, list) or len(given) != len(rubric):
        return None
    total = 0
    for entry, criterion in zip(given, rubric, strict=True):
        score = entry.get("score") if isinstance(entry, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float) or score not in criterion.choices:
            return None
        total += int(score)
    return total / sum(max(criterion.choices) for criterion in rubric)


def middle_mean(scores: Sequence[float]) -> float:
    """Mean without the lowest and the highest of at least three."""
    middle = sorted(scores)[1:-1]
    return sum(middle) / len(middle)


class RubricJudge:
    """Scores predictions of all items; ratings are cached in a file if one is given."""

    def __init__(
        self, model: ChatModel, prompt: RubricPrompt, *, file: Path | None, attempts: int, concurrency: int
    ) -> None:
        """`attempts`: how often the judge is asked in all if its replies have no score."""
        self.model, self.prompt, self.attempts, self.concurrency = model, prompt, attempts, concurrency
        self._file = JsonLines(file) if file is not None else None
        kept = read_records(file) if file is not None and file.exists() else []
        self._known: dict[str, float] = {record["digest"]: record["score"] for record in kept}

    def __call__(self, items: Sequence[RubricItem], said: Mapping[str, Reasoned]) -> list[RubricScore]:
        """One score per item, in order: a missing prediction and a wrong answer are 0, without asking.

        Raises:
            JudgeError: a rating is missing. It is never made up, and existing ratings are kept.
        """
        right = [item for item in items if item.id in said and _is_right(item, said[item.id])]
        asked = [(item, rater) for item in right for rater in range(RATERS)]
        scores: dict[str, list[float]] = {item.id: [] for item in right}
        with ThreadPoolExecutor(self.concurrency) as pool:
            rated = pool.map(lambda one: self._rate(one[0], said[one[0].id], one[1]), asked)
            for (item, _), (digest, score) in zip(asked, rated, strict=True):
                if self._file is not None and digest not in self._known:
                    self._file.append([{"id": item.id, "digest": digest, "score": score}])
                self._known[digest] = score
                scores[item.id].append(score)
        return [
            RubricScore(id=item.id, value=middle_mean(scores[item.id]) if item.id in scores else 0.0,
                        correct=item.id in scores)
            for item in items
        ]  # fmt: skip

    def _rate(self, item: RubricItem, said: Reasoned, rater: int) -> tuple[str, float]:
        prompt = self.prompt.filled(item, said)
        digest = hashlib.sha256(
            "\0".join([self.model.name, self.prompt.system, prompt, item.id, str(rater)]).encode()
        ).hexdigest()
        if digest in self._known:
            return digest, self._known[digest]
        reply = ""
        for _ in range(self.attempts):
            reply = self.model.chat(self.prompt.system, prompt)
            score = points_share(reply, item.rubric)
            if score is not None:
                return digest, score
        raise JudgeError(
            f"item {item.id}: {self.attempts} replies of the judge score no rubric, the last: {reply[:300]!r}"
        )


def _is_right(item: RubricItem, said: Reasoned) -> bool:
    return official_string_match(said.answer, item.answer, item.choices)


def summary(items: Sequence[RubricItem], scores: Sequence[RubricScore]) -> dict[str, Any]:
    """Means over all items and by group; `of_right` is the mean over right answers only."""
    right = [score.value for score in scores if score.correct]
    by_group: dict[str, dict[str, list[float]]] = {}
    for item, score in zip(items, scores, strict=True):
        for field, group in item.groups.items():
            by_group.setdefault(field, {}).setdefault(group, []).append(score.value)
    return {
        "items": len(scores),
        "score": sum(score.value for score in scores) / len(scores),
        "accuracy": len(right) / len(scores),
        "of_right": sum(right) / len(right) if right else None,
        "by_group": {
            field: {
                group: {"items": len(values), "score": sum(values) / len(values)} for group, values in groups.items()
            }
            for field, groups in by_group.items()
        },
        "scores": [asdict(score) for score in scores],
    }
