"""Predictions: the answer to each item, from our own or other files."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_mapo.evaluation.benchmarks.items import Benchmark, Item
from nemo_mapo.evaluation.benchmarks.records import named_records

COMPLETION = "completion"
"""Field of our own predictions.jsonl that holds the whole completion."""
_FINISHED, _SHOWN = "finished", "shown_choices"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The response to one item."""

    id: str
    completion: str
    finished: bool = True
    """Whether the model stopped by itself; False if the length limit truncated it."""
    shown_choices: tuple[str, ...] | None = None
    """The choices in the order in which the model saw them, to which letters refer; None is the published order."""

    def record(self) -> dict[str, Any]:
        """One line of predictions.jsonl."""
        return asdict(self)


def read_predictions(path: Path, benchmark: Benchmark, *, field: str | None = None) -> dict[str, Prediction]:
    """Read predictions by item id, from a list of objects (.json), one object per line (.jsonl) or a table (.parquet).

    Args:
        path: the file. Besides the id and the prediction, `finished` and `shown_choices` are read if present.
        benchmark: whose items the ids must name.
        field: key of the prediction; None is the one that the benchmark's own script reads.

    Returns:
        Predictions of the items that have one: a record whose prediction is absent or null is a missing prediction.

    Raises:
        ValueError: naming file, item and field: an id used twice or not of this benchmark, a value of another type, no
            prediction in the whole file.
    """
    records = list(named_records(path, benchmark.layout.key("id")))
    key = field or _official_key(path, [record for _, record in records], benchmark)
    items = {item.id: item for item in benchmark.items}
    found: dict[str, Prediction] = {}
    for where, record in records:
        name = str(record[benchmark.layout.key("id")])
        if name not in items:
            raise ValueError(
                f"{where}: field {benchmark.layout.key('id')!r} is {name!r}, which is not an item of {benchmark.path}"
            )
        if record.get(key) is not None:
            found[name] = _prediction(record, key, items[name], where)
    if not found and records:
        raise ValueError(f"{path}: no item has the field {key!r}; name the one that holds the predictions")
    return found


def _official_key(path: Path, records: list[dict[str, Any]], benchmark: Benchmark) -> str:
    """The key of the predictions among those that the benchmark has used; ValueError if two of them disagree."""
    keys = (benchmark.layout.key("prediction"), *benchmark.layout.other_predictions)
    used = [key for key in keys if any(key in record for record in records)]
    for other in used[1:]:
        if any(record.get(used[0]) != record.get(other) for record in records):
            raise ValueError(
                f"{path}: has both {used[0]!r} and {other!r}, which differ; name the one that holds the predictions "
                "(--field)"
            )
    return used[0] if used else keys[0]


def submission(
    records: Iterable[Mapping[str, Any]], benchmark: Benchmark, answers: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The published records with the predictions added under every requested key; empty if missing."""
    layout = benchmark.layout
    keys = (layout.key("prediction"), *layout.other_predictions)
    answered = [(record, answers.get(str(record[layout.key("id")]), "")) for record in records]
    return [{**record, **dict.fromkeys(keys, answer)} for record, answer in answered]


def _prediction(record: Mapping[str, Any], key: str, item: Item, where: str) -> Prediction:
    completion, finished, shown = record[key], record.get(_FINISHED, True), record.get(_SHOWN)
    if not isinstance(completion, str):
        raise ValueError(f"{where}: field {key!r} is {completion!r}: a prediction must be a text or null")
    if not isinstance(finished, bool):
        raise ValueError(f"{where}: field {_FINISHED!r} is {finished!r}: it must be true or false")
    if shown is not None:
        texts = shown if isinstance(shown, list) and all(isinstance(text, str) for text in shown) else []
        if sorted(texts) != sorted(item.choices):
            raise ValueError(f"{where}: field {_SHOWN!r} is {shown!r}: it must be an order of {list(item.choices)}")
    return Prediction(
        id=item.id, completion=completion, finished=finished, shown_choices=tuple(shown) if shown is not None else None
    )
