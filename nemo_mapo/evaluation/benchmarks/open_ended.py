"""MMAU-Pro's open-ended part: a judge rates a response against the reference answer; its rules, our wording."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_mapo.evaluation.benchmarks.items import Item
from nemo_mapo.evaluation.benchmarks.records import read_records
from nemo_mapo.rewards.judge import ChatModel, JudgeError
from nemo_mapo.training.records import JsonLines

CRITERIA = ("correctness", "relevance", "completeness", "clarity")
OVERALL = "overall"
LOWEST, HIGHEST = 1.0, 5.0
"""The judge's scale; a response's score is its overall rating over the highest one."""

SYSTEM = "You grade answers fairly and keep to the requested format."
PROMPT = """Grade an answer to a question about an audio recording. You cannot hear the recording; go by the reference.

Question: {question}

Reference answer: {reference}

Answer to grade: {response}

Give a rating from 1 (worst) to 5 (best) for each of these:
- correctness: does the answer agree with the facts of the reference?
- relevance: does it answer the question that was asked?
- completeness: does it cover what matters in the reference?
- clarity: is it clear and well structured?

Reply with these five lines and nothing else, overall being the mean of the four ratings:
CORRECTNESS: <rating> - <reason in a sentence>
RELEVANCE: <rating> - <reason in a sentence>
COMPLETENESS: <rating> - <reason in a sentence>
CLARITY: <rating> - <reason in a sentence>
OVERALL: <mean> - <verdict in a sentence>"""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The judgement of one response."""

    id: str
    digest: str
    """Digest of judge name and prompt: a judgement is reused only for the same prompt to the same judge."""
    ratings: dict[str, float]
    """By criterion, and overall."""
    reply: str

    @property
    def score(self) -> float:
        """Overall rating over the highest, as MMAU-Pro averages it: in [0.2, 1]."""
        return self.ratings[OVERALL] / HIGHEST


class OpenEndedJudge:
    """Judges responses to open-ended questions; judgements are cached in a file if one is given."""

    def __init__(self, model: ChatModel, *, file: Path | None, attempts: int, concurrency: int) -> None:
        """`attempts`: how often the judge is asked in all if its replies lack a rating."""
        self.model = model
        self.attempts = attempts
        self.concurrency = concurrency
        self._file = JsonLines(file) if file is not None else None
        kept = read_records(file) if file is not None and file.exists() else []
        self._known = {record["digest"]: Judgement(**record) for record in kept}

    def __call__(self, responses: Sequence[tuple[Item, str]]) -> list[Judgement]:
        """Judge every response, in order; JudgeError if there is no judgement, never a default rating."""
        judgements = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            for judgement in pool.map(lambda pair: self._judge(*pair), responses):
                judgements.append(judgement)
                if self._file is not None and judgement.digest not in self._known:
                    self._file.append([asdict(judgement)])
                self._known[judgement.digest] = judgement
        return judgements

    def _judge(self, item: Item, response: str) -> Judgement:
        prompt = PROMPT.format(question=item.question, reference=item.answer, response=response)
        digest = hashlib.sha256(f"{self.model.name}\0{prompt}".encode()).hexdigest()
        if digest in self._known:
            return self._known[digest]
        reply = ""
        for _ in range(self.attempts):
            reply = self.model.chat(SYSTEM, prompt)
            ratings = read_ratings(reply)
            if ratings is not None:
                return Judgement(id=item.id, digest=digest, ratings=ratings, reply=reply)
        raise JudgeError(
            f"item {item.id}: {self.attempts} replies of the judge lack a rating in 1..5, the last: {reply!r}"
        )


def read_ratings(reply: str) -> dict[str, float] | None:
    """The five ratings of a reply, or None if one is missing, given twice or outside the scale."""
    found = dict(_ratings(reply, (*CRITERIA, OVERALL)))
    return found if len(found) == len(CRITERIA) + 1 else None


def _ratings(reply: str, names: Iterable[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        matches = re.findall(
            rf"^\W*{name}[*_\s]*:[*_\s\[(]*(\d+(?:\.\d+)?)(?![\d.]*\d)", reply, re.IGNORECASE | re.MULTILINE
        )
        if len(matches) == 1 and LOWEST <= float(matches[0]) <= HIGHEST:
            yield name, float(matches[0])
