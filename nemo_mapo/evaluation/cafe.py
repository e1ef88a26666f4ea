"""Perception accuracy and omission rate in the style of CAFE (arXiv 2603.02266), from the counts of a judge."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_mapo.evaluation.benchmarks.records import named_records
from nemo_mapo.http_client import decode_json
from nemo_mapo.rewards.judged import Judge
from nemo_mapo.statistics import score_interval

KINDS = ("matched", "hallucinated", "misused", "missed", "neutral")
FIELDS = ("id", "question", "answer", "caption", "text")
SYSTEM = (
    "You sort the perceptual claims in a listener's reasoning. Reply with one JSON object with the keys "
    f"{', '.join(KINDS)}, each a whole number of claims, and nothing else."
)


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Number of perceptual claims of a completion by kind."""

    matched: int
    hallucinated: int
    misused: int
    missed: int
    neutral: int


@dataclass(frozen=True, kw_only=True)
class ClaimRules:
    """Denominators that the paper does not publish: claims that a completion made, and claims it should have made."""

    predicted: tuple[str, ...]
    """Kinds that count as predicted, the denominator of perception accuracy."""
    target: tuple[str, ...]
    """Kinds that count as targets, the denominator of the omission rate."""

    def __post_init__(self) -> None:
        for name, kinds, needed in (("predicted", self.predicted, "matched"), ("target", self.target, "missed")):
            unknown = sorted(set(kinds) - set(KINDS))
            if unknown or needed not in kinds:
                raise ValueError(f"{name}={list(kinds)}: give kinds of {', '.join(KINDS)}, {needed} among them")


def parse_claims(reply: str) -> Claims | None:
    """The judge's counts; None if the reply is anything but one object with exactly these whole numbers."""
    try:
        counts = decode_json(reply)
    except ValueError:
        return None
    if not isinstance(counts, dict) or counts.keys() != set(KINDS):
        return None
    if not all(type(count) is int and count >= 0 for count in counts.values()):
        return None
    return Claims(**counts)


def read_reasoning(path: Path) -> Iterator[dict[str, str]]:
    """Completions of a JSON-lines file with the fields id, question, answer, caption, text.

    Raises:
        ValueError: naming file, item and field: not JSON, a field that is missing or not a text, an id used twice.
    """
    for where, record in named_records(path, "id"):
        for name in FIELDS:
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise ValueError(f"{where}: field {name!r} is missing or no text")
        yield record


def score_claims(
    records: Sequence[dict[str, str]], judge: Judge, instructions: str, rules: ClaimRules
) -> dict[str, Any]:
    """Judge every completion; returns both rates together, with intervals, and the counts of each.

    Perception accuracy = N_matched / N_predicted, omission = N_missed / N_target, of the claims of all completions. The
    first alone would reward saying little. Completions without a readable verdict are only counted separately.
    Intervals are over completions that have a denominator.

    Args:
        records: of `read_reasoning`.
        judge: of `judged.judge_of`.
        instructions: explains the kinds to your judge (the paper's prompt is not published).
        rules: the denominators.
    """
    prompts = [
        f"{instructions}\n\nQuestion: {record['question']}\nAnswer: {record['answer']}\nTo be heard: "
        f"{record['caption']}\n\n"
        f"Reasoning:\n{record['text']}"
        for record in records
    ]
    claims = judge.ask(SYSTEM, prompts, parse_claims)
    found = {record["id"]: one for record, one in zip(records, claims, strict=True) if one is not None}
    return {
        "completions": len(records),
        "unjudged": len(records) - len(found),
        "rules": asdict(rules),
        "counts": {kind: sum(vars(one)[kind] for one in found.values()) for kind in KINDS},
        "perception_accuracy": _rate(found.values(), "matched", rules.predicted),
        "omission_rate": _rate(found.values(), "missed", rules.target),
        "by_completion": {name: asdict(one) for name, one in found.items()},
    }


def _rate(found: Collection[Claims], kind: str, denominator: Sequence[str]) -> dict[str, float] | None:
    """Rate over all claims, with the interval of the mean of single completions' rates; None without a claim."""
    sizes = [sum(vars(one)[name] for name in denominator) for one in found]
    if not sum(sizes):
        return None
    rates = [vars(one)[kind] / size for one, size in zip(found, sizes, strict=True) if size]
    interval = score_interval(rates, samples=2000, seed=0, confidence=0.95)
    return {"rate": sum(vars(one)[kind] for one in found) / sum(sizes), "mean_of_completions": interval.mean,
            "low": interval.low, "high": interval.high}  # fmt: skip
