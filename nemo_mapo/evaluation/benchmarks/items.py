"""Benchmark items, read from a published file: a layout is data, the reader is the same for all."""

import hashlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nemo_mapo.evaluation.benchmarks.instructions import check_arguments
from nemo_mapo.evaluation.benchmarks.records import named_records
from nemo_mapo.rewards.answers import normalise_answer

Part = Literal["closed", "instruction", "open"]
"""How an item is scored: by the choice that is named, by a rule, by a judge."""

NO_GROUP = "(none)"
"""Group of the items that carry no value in a field that tables group by."""

_LABELLED = re.compile(r"\s*\(?(?P<letter>[A-Za-z])[.):]\s*(?P<text>\S.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The meaning of the fields of a published record.

    Our names for the fields are `id`, `audio`, `question`, `answer`, `prediction`, those in `choices`, `groups`,
    `part`, `rule` and `arguments`; `fields` maps a name to the key in the file if the two differ.
    """

    name: str
    title: str
    fields: Mapping[str, str | None]
    """Key in the file by our name; a group that is mapped to None is left out of the tables."""
    choices: tuple[str, ...] = ("choices",)
    """One field with a list of texts, or one field per choice; null or an empty text is an empty slot."""
    groups: tuple[str, ...]
    """Fields that tables group by."""
    tables: tuple[tuple[str, ...], ...]
    """The tables to print, each the fields it groups by."""
    sizes: Mapping[str, int]
    """Items of the published sets, by name."""
    other_predictions: tuple[str, ...] = ()
    """Further keys for the prediction, used by other versions of the benchmark's script or pages."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Name of a published file, by the SHA-256 of its contents."""
    string_match: bool = False
    """Whether the benchmark's own script scores by `official_string_match`."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Value of the field `part` to the part of the benchmark; every other value is the closed part."""

    def key(self, name: str) -> str:
        """The key in the file of one of our names."""
        return self.fields.get(name) or name

    def with_fields(self, fields: Mapping[str, str | None]) -> "Layout":
        """Map fields differently; ValueError for a name that this layout does not have."""
        known = {*self.fields, "id", "question", "answer", *self.choices, *self.groups}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"fields: {', '.join(unknown)} unknown; the layout {self.name} has {', '.join(sorted(known))}"
            )
        needed = sorted(name for name, key in fields.items() if not key and name not in self.groups)
        if needed:
            raise ValueError(f"fields: {', '.join(needed)} cannot be left out; only {', '.join(self.groups)} can")
        dropped = {name for name, key in fields.items() if not key}
        return replace(
            self,
            fields={**self.fields, **fields},
            groups=tuple(name for name in self.groups if name not in dropped),
            tables=tuple(table for table in self.tables if not dropped & set(table)),
        )


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark."""

    id: str
    part: Part
    question: str
    audio: tuple[str, ...]
    """Paths of its clips, as published."""
    slots: tuple[str | None, ...]
    """Choices in published order. None is an empty slot, kept so that published letters keep their meaning."""
    answer: str | None
    """Text of the right choice, or the reference of an open question; None if it is withheld or there is none."""
    groups: Mapping[str, tuple[str, ...]]
    """Values by field; an item with several values of a field counts in each of their groups."""
    rule: str | None = None
    """Name of the instruction that the response must follow (part `instruction`)."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the rule."""
    start_seconds: float = 0.0
    """Start of the segment of the first clip; other clips are used whole."""
    duration_seconds: float | None = None
    """None means to the end of that clip."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The non-empty choices."""
        return tuple(slot for slot in self.slots if slot is not None)

    @property
    def is_defective(self) -> bool:
        """Whether no choice is right as published: the answer is not among them, or there are fewer than two."""
        return self.part == "closed" and (self.answer not in self.slots or len(self.choices) < 2)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published file, read and checked."""

    layout: Layout
    path: Path
    digest: str
    """SHA-256 of the file."""
    items: tuple[Item, ...]

    @property
    def is_withheld(self) -> bool:
        """Whether the benchmark's authors withhold the answers."""
        return any(item.part == "closed" and item.answer is None for item in self.items)

    @property
    def version(self) -> str:
        """The published version of the file, by its contents."""
        if not self.layout.sizes:
            return f"{self.path.name} (SHA-256 {self.digest[:16]}...)"
        return self.layout.versions.get(self.digest, f"not a known publication (SHA-256 {self.digest[:16]}...)")

    @property
    def with_empty_choices(self) -> tuple[str, ...]:
        """Ids of items that were published with an empty choice in their list; it is shown to no model."""
        if len(self.layout.choices) > 1:
            return ()
        return tuple(item.id for item in self.items if None in item.slots)

    @property
    def defective(self) -> tuple[str, ...]:
        """Ids of items that stay in the denominator although no choice is right."""
        return () if self.is_withheld else tuple(item.id for item in self.items if item.is_defective)


def load_benchmark(path: Path, layout: Layout, *, keep_defective: bool = False) -> Benchmark:
    """Read a published file (.json, .jsonl or .parquet).

    Args:
        path: the file.
        layout: which field holds what.
        keep_defective: keep items whose answer is not among their choices (or that have fewer than two); they are
            right only if the predicted answer equals the published one. Otherwise they are refused.

    Raises:
        ValueError: naming file, item and field: missing field, wrong type, id used twice, defective item, answers
            withheld for only some of the items.
    """
    records = list(named_records(path, layout.key("id")))
    if not records:
        raise ValueError(f"{path}: holds no item")
    for group in layout.groups:
        if not any(layout.key(group) in record for _, record in records):
            raise ValueError(
                f"{path}: no item has the field {layout.key(group)!r}; name the right one, or leave its tables out, "
                f"with the field mapping {group}=NAME or {group}=null"
            )
    items = tuple(_Reader(where, record, layout).item() for where, record in records)
    benchmark = Benchmark(layout=layout, path=path, digest=hashlib.sha256(path.read_bytes()).hexdigest(), items=items)
    _check_answers(benchmark, [where for where, _ in records], keep_defective=keep_defective)
    return benchmark


def _check_answers(benchmark: Benchmark, places: Sequence[str], *, keep_defective: bool) -> None:
    """Refuse answers that exist for only some items, and defective items unless they are kept."""
    key = benchmark.layout.key("answer")
    closed = [(where, item) for where, item in zip(places, benchmark.items, strict=True) if item.part == "closed"]
    withheld = [where for where, item in closed if item.answer is None]
    if withheld and len(withheld) < len(closed):
        raise ValueError(f"{withheld[0]}: field {key!r} is empty, though other items have an answer: restore it")
    if withheld or keep_defective:
        return
    for where, item in closed:
        if item.is_defective:
            raise ValueError(
                f"{where}: field {key!r} is {item.answer!r}, which is not among two or more choices "
                f"{list(item.choices)}; correct the file, or set keep_defective to keep such items in the denominator"
            )


class _Reader:
    """Parses one record."""

    def __init__(self, where: str, record: Mapping[str, Any], layout: Layout) -> None:
        self.where = where
        self.record = record
        self.layout = layout

    def item(self) -> Item:
        """The item; ValueError names the field that is missing or wrong."""
        part = self._part()
        slots = tuple(self._slots()) if part == "closed" else ()
        answer = self._text("answer", optional=True) if part != "open" else self._text("answer")
        if part == "closed":
            slots, answer = _without_labels(slots, answer)
            answer = _published_choice(answer, slots)
        groups = {name: self._group(name) for name in self.layout.groups}
        if self.layout.parts:
            groups["part"] = (part,)
        item = Item(
            id=str(self.record[self.layout.key("id")]),
            part=part,
            question=self._text("question") or "",
            audio=tuple(self._audio()),
            slots=slots,
            answer=answer if part != "instruction" else None,
            groups=groups,
        )
        return replace(item, **self._rule()) if part == "instruction" else item

    def _part(self) -> Part:
        if not self.layout.parts:
            return "closed"
        return self.layout.parts.get(self._text("part") or "", "closed")

    def _slots(self) -> Iterator[str | None]:
        if len(self.layout.choices) > 1:
            for name in self.layout.choices:
                yield self._text(name, optional=True)
            return
        values = self._value(self.layout.choices[0])
        if values is not None and not isinstance(values, list):
            raise self._wrong(self.layout.choices[0], values, "a list of texts")
        for value in values or ():
            if not isinstance(value, str):
                raise self._wrong(self.layout.choices[0], values, "a list of texts")
            yield value if value.strip() else None

    def _audio(self) -> Iterator[str]:
        value = self._value("audio")
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise self._wrong("audio", value, "a path or a list of paths")
        yield from paths

    def _rule(self) -> dict[str, Any]:
        rule, arguments = self._text("rule"), self._value("arguments")
        if not isinstance(arguments, dict | None):
            raise self._wrong("arguments", arguments, "an object or null")
        # Parquet gives every row the arguments of all rules, null for those of other rules.
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        return {"rule": rule, "arguments": check_arguments(rule or "", given, self.where)}

    def _group(self, name: str) -> tuple[str, ...]:
        value = self.record.get(self.layout.key(name))
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int | float | None) for one in values):
            raise self._wrong(name, value, "a text or a list of texts")
        return tuple(dict.fromkeys(str(one) for one in values if one not in (None, ""))) or (NO_GROUP,)

    def _text(self, name: str, *, optional: bool = False) -> str | None:
        value = self._value(name)
        if optional and (value is None or value == ""):
            return None
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(name, value, "a non-empty text")
        return value

    def _value(self, name: str) -> Any:
        key = self.layout.key(name)
        if key not in self.record:
            raise ValueError(
                f"{self.where}: field {key!r} is missing; if it has another name in this file, give the field mapping "
                f"{name}=NAME"
            )
        return self.record[key]

    def _wrong(self, name: str, value: object, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: field {self.layout.key(name)!r} is {value!r}: it must be {wanted}")


def _published_choice(answer: str | None, slots: Sequence[str | None]) -> str | None:
    """The choice that the published answer names, up to case, spaces and final marks; else the answer unchanged."""
    if answer is None or answer in slots:
        return answer
    same = {slot for slot in slots if slot is not None and normalise_answer(slot) == normalise_answer(answer)}
    return same.pop() if len(same) == 1 else answer


def _without_labels(slots: tuple[str | None, ...], answer: str | None) -> tuple[tuple[str | None, ...], str | None]:
    """Remove letters from choices such as (A) cat, (B) dog: a letter means a position, and positions may change."""
    found = [_LABELLED.fullmatch(slot) if slot is not None else None for slot in slots]
    letters = [match["letter"].lower() for match in found if match is not None]
    if not slots or letters != list(string.ascii_lowercase[: len(slots)]):
        return slots, answer
    texts = tuple(match["text"] for match in found if match is not None)
    return texts, dict(zip(slots, texts, strict=True)).get(answer, answer)
