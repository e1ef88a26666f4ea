"""What a split is drawn from: items as in NeMo's `input_cfg`, their types, their keys, and groups of them."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator

from nemo_mapo.config.yaml_files import read_yaml

Item = dict[str, Any]

MAX_ITEMS: Final = 10_000
"""Most items of a split with all its groups; a corpus has a few hundred."""
MAX_DEPTH: Final = 20
"""Deepest nesting of groups."""

_EVERYWHERE: Final = ("type", "weight", "tags")
_GROUP: Final = "group"

LOCATION_KEY: Final = {
    "lhotse": "cuts_path",
    "nemo": "manifest_filepath",
    "nemo_tarred": "manifest_filepath",
    "lhotse_shar": "shar_path",
    "multimodal_conversation": "manifest_filepath",
}
"""Types of items that hold questions about audio, and the key that says where they are."""

_FURTHER_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "lhotse": (),
    "nemo": ("text_field", "lang_field"),
    "nemo_tarred": ("tarred_audio_filepaths", "text_field", "lang_field", "skip_missing_manifest_entries"),
    "lhotse_shar": (),
    "multimodal_conversation": ("tarred_audio_filepaths", "audio_locator_tag", "token_equivalent_duration"),
}
_WITHOUT_AUDIO: Final = ("txt", "txt_pair", "nemo_sft_jsonl")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One item of `input_cfg` that is not a group."""

    where: str
    """Its path in the config, e.g. `input_cfg[0].input_cfg[1]`."""
    item: Mapping[str, Any]
    tags: Mapping[str, Any] = field(default_factory=dict)
    """Its own tags and those of the groups around it, which take precedence, as in NeMo."""

    @property
    def type(self) -> str:
        """One of `LOCATION_KEY`."""
        return str(self.item["type"])

    @property
    def location(self) -> Any:
        """Where its manifests are: a path, or the lists that NeMo takes."""
        return self.item[LOCATION_KEY[self.type]]


def sources_of(items: Iterable[Mapping[str, Any]]) -> Iterator[Source]:
    """The items that are not groups, in order, with all the tags that their cuts will carry.

    sources_of([{"type": "group", "tags": {"task": "a"}, "input_cfg": [{"type": "lhotse", "cuts_path": "x.jsonl"}]}])
    gives one source at `input_cfg[0].input_cfg[0]`.
    """
    return _sources(items, "input_cfg", {})


def _sources(items: Iterable[Mapping[str, Any]], path: str, outer: Mapping[str, Any]) -> Iterator[Source]:
    for index, item in enumerate(items):
        where, tags = f"{path}[{index}]", {**item.get("tags", {}), **outer}
        if item["type"] == _GROUP:
            yield from _sources(item["input_cfg"], f"{where}.input_cfg", tags)
        else:
            yield Source(where=where, item=item, tags=tags)


def check_items(items: Iterable[Mapping[str, Any]], path: str = "input_cfg") -> None:
    """ValueError naming the item for an unknown type or key, a missing location, or invalid weights."""
    listed = list(items)
    for index, item in enumerate(listed):
        _check_item(item, f"{path}[{index}]")
    weights = [item.get("weight") for item in listed]
    if any(weight is not None for weight in weights) and not all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf for weight in weights
    ):
        raise ValueError(f"{path}: weights are {weights}: give every item a number above 0, or no item a weight")


def _check_item(item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type")
    if kind in _WITHOUT_AUDIO:
        raise ValueError(f"{where}: items of type {kind} have text and no audio; every question here is about a clip")
    if kind != _GROUP and kind not in LOCATION_KEY:
        near = difflib.get_close_matches(str(kind), [*LOCATION_KEY, _GROUP], n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{where}: type is {kind!r}{meant}; supported are {', '.join(LOCATION_KEY)}, {_GROUP}")
    _check_keys(item, where)
    if kind == _GROUP:
        inner = item.get("input_cfg")
        if not inner:
            raise ValueError(
                f"{where}: input_cfg is {inner!r}: a group needs items, or the path of a YAML file of them"
            )
        check_items(inner, f"{where}.input_cfg")
        return
    location = LOCATION_KEY[str(kind)]
    _check_location(item.get(location), f"{where}: {location}", lists=kind in ("nemo", "nemo_tarred"))
    if kind == "multimodal_conversation" and item.get("tarred_audio_filepaths") is not None:
        _check_location(item["tarred_audio_filepaths"], f"{where}: tarred_audio_filepaths", lists=False)
    if kind == "nemo_tarred":
        _check_location(item.get("tarred_audio_filepaths"), f"{where}: tarred_audio_filepaths", lists=True)
        _check_pairs(item, where)


def _check_keys(item: Mapping[str, Any], where: str) -> None:
    kind = str(item["type"])
    own = ("input_cfg",) if kind == _GROUP else (LOCATION_KEY[kind], *_FURTHER_KEYS[kind])
    known = [*_EVERYWHERE, *own]
    for key in item:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r} of an item of type {kind}; {meant}")
    if not isinstance(item.get("tags", {}), Mapping):
        raise ValueError(f"{where}: tags are {item['tags']!r}: give names and values")


def _check_location(value: Any, where: str, *, lists: bool) -> None:
    if isinstance(value, str) and value:
        _refuse_elsewhere(value, where)
        return
    if not lists:
        raise ValueError(f"{where} is {value!r}: give one path (list several manifests as several items)")
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where} is {value!r}: give a path, or a list as NeMo takes it: [path, ...], [[path], ...]")
    for entry in value:
        _refuse_elsewhere(_path_and_weight(entry, where)[0], where)


def _refuse_elsewhere(path: str, where: str) -> None:
    """ValueError for what Lhotse and NeMo would run as a command, fetch, or read from the terminal."""
    if path.startswith("pipe:"):
        raise ValueError(f"{where}: {path!r} is a command, not a file: write its output to files")
    if "://" in path:
        raise ValueError(f"{where}: {path!r} is a URL, not a file: copy or mount the data")
    if path == "-":
        raise ValueError(f"{where} is '-': give the path of a file")


def _check_pairs(item: Mapping[str, Any], where: str) -> None:
    """ValueError unless a list of manifests goes with a list of archives of the same length."""
    manifests, archives = item["manifest_filepath"], item["tarred_audio_filepaths"]
    sizes = [None if isinstance(value, str) else len(value) for value in (manifests, archives)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{where}: manifest_filepath and tarred_audio_filepaths must have the same form, a path each or lists of "
            f"the same length, not {manifests!r} and {archives!r}"
        )


def located(item: Mapping[str, Any]) -> list[tuple[str, str | None, float | None]]:
    """Manifest, archives and weight of each part of a `nemo` or `nemo_tarred` item, whose lists NeMo mixes."""
    manifests, archives = item["manifest_filepath"], item.get("tarred_audio_filepaths")
    if isinstance(manifests, str):
        return [(manifests, archives, None)]
    tars = [None] * len(manifests) if archives is None else [_path_and_weight(entry, "")[0] for entry in archives]
    parts = [_path_and_weight(entry, "") for entry in manifests]
    return [(path, tar, weight) for (path, weight), tar in zip(parts, tars, strict=True)]


def _path_and_weight(entry: Any, where: str) -> tuple[str, float | None]:
    """NeMo's three forms of an entry: path, [path], [path, weight]."""
    parts = [entry] if isinstance(entry, str) else list(entry) if isinstance(entry, list | tuple) else []
    if len(parts) in (1, 2) and isinstance(parts[0], str):
        weight = parts[1] if len(parts) == 2 else None
        if weight is None or (isinstance(weight, int | float) and 0 < weight < math.inf):
            return parts[0], None if weight is None else float(weight)
    raise ValueError(f"{where}: {entry!r} must be a path, [path] or [path, weight]")


def read_items(value: Any) -> Any:
    """Replace paths of YAML files by the items in them, inside groups too; everything else is left to the schema.

    A file is plain data: no reference (`${...}`) is resolved, no tag builds an object, and neither aliases nor files
    that name other files expand it beyond `MAX_ITEMS`.
    """
    return _Reader().read(value, (), 0)


class _Reader:
    """Reads every file once and counts all items."""

    def __init__(self) -> None:
        self._files: dict[Path, list[Any]] = {}
        self._count = 0

    def read(self, value: Any, within: tuple[Path, ...], depth: int) -> Any:
        """Items, with paths of files replaced by their items; `within` are the files that contain the value."""
        if depth > MAX_DEPTH:
            raise ValueError(f"groups are nested more than {MAX_DEPTH} deep")
        if isinstance(value, str | Path):
            value, within = self._items(Path(value), within), (*within, Path(value).resolve())
        if not isinstance(value, list | tuple):
            return value
        self._count += len(value)
        if self._count > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS:,} items, once the files that groups name are read")
        return tuple(
            {**item, "input_cfg": self.read(item["input_cfg"], within, depth + 1)}
            if isinstance(item, Mapping) and "input_cfg" in item
            else item
            for item in value
        )

    def _items(self, path: Path, within: tuple[Path, ...]) -> list[Any]:
        place = path.resolve()
        if place in within:
            raise ValueError(f"{path}: contains itself: {' -> '.join(str(outer) for outer in within)}")
        if place not in self._files:
            self._files[place] = _items_of_file(path)
        return self._files[place]


def _items_of_file(path: Path) -> list[Any]:
    try:
        text = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if text is None:
        raise ValueError(f"no file at {path}: give a list of items, or the path of a YAML file that holds one")
    items = read_yaml(text, path)
    if isinstance(items, dict) and "input_cfg" in items:
        items = items["input_cfg"]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path}: holds {type(items).__name__}: give a list of items, each with a type")
    if b"${" in text:
        raise ValueError(f"{path}: contains '${{': write the values out; references in files are not resolved")
    return items


InputCfg = Annotated[tuple[Item, ...], BeforeValidator(read_items)]
"""A list of items, or the path of a YAML file that holds one."""
