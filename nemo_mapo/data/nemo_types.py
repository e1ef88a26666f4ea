"""The types of `input_cfg` items: how each is checked before a run, and how NeMo's dataloading reads it.

NeMo finds the reader of a type by name, and has a decorator to add names. Ours wrap NeMo's own readers in the checks
that untrusted files and complete epochs need.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lhotse import CutSet
from nemo.collections.common.data.lhotse.cutset import data_type_parser, read_cutset_from_config
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator
from omegaconf import DictConfig, OmegaConf

from nemo_mapo.config.input_cfg import Source, located
from nemo_mapo.data.archives import CheckedTarredIterator, tarred_entries
from nemo_mapo.data.conversations import conversation_cuts, conversation_entries
from nemo_mapo.data.entries import Entry, lhotse_entry, lines_of, manifest_files, nemo_entry, refuse_missing
from nemo_mapo.data.sources import refuse_unsafe_path

_OURS: Final = {
    "nemo": "checked_nemo",
    "nemo_tarred": "checked_nemo_tarred",
    "multimodal_conversation": "checked_multimodal_conversation",
}
"""Names under which NeMo finds our readers."""


def entries_of(source: Source) -> Iterator[Entry]:
    """The lines of a source, checked one by one as far as this needs no decoding."""
    return _ENTRIES[source.type](source)


def nemo_items(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items of `input_cfg` in the form that NeMo reads; run the checks of `entries_of` first.

    A list of manifests becomes a weighted mixture as in NeMo: by its weights, or by numbers of lines.
    """
    return [_nemo_item(item) for item in items]


def read_cuts(items: Iterable[Mapping[str, Any]]) -> CutSet:
    """The cuts of all items in one pass, read by NeMo without shuffling; run the checks of `entries_of` first."""
    options = {"shuffle": False, "shard_seed": 0, "force_finite": True, "force_map_dataset": True}
    cuts, _ = read_cutset_from_config({"input_cfg": nemo_items(items), **options})
    assert isinstance(cuts, CutSet), "items hold cuts"
    return cuts


def _nemo_item(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item["type"]
    if kind == "group":
        return {**item, "input_cfg": nemo_items(item["input_cfg"])}
    if kind not in _OURS:
        return dict(item)
    whole = {**item, "type": _OURS[kind]}
    if isinstance(item["manifest_filepath"], str):
        return whole
    around: dict[str, Any] = {key: whole.pop(key) for key in ("weight", "tags") if key in whole}
    parts = []
    for manifest, archives, weight in located(item):
        share = sum(1 for path in manifest_files(manifest, "input_cfg", "manifest_filepath") for _ in lines_of(path))
        part = {**whole, "manifest_filepath": manifest, "weight": share if weight is None else weight}
        parts.append(part if archives is None else {**part, "tarred_audio_filepaths": archives})
    return {"type": "group", "input_cfg": parts, **around}


class _CheckedIterator(LazyNeMoIterator):  # type: ignore[misc]
    """NeMo's reader, but it checks a path before anything opens it."""

    def _create_recording(self, audio_path: str, duration: float, sampling_rate: int | None = None) -> Any:
        refuse_unsafe_path(audio_path, f"manifest {self.path}")
        return super()._create_recording(audio_path, duration, sampling_rate)


@data_type_parser(_OURS["nemo"])  # type: ignore[untyped-decorator]
def _read_nemo(config: DictConfig) -> tuple[CutSet, bool]:
    return CutSet(_CheckedIterator(config.manifest_filepath, **_common(config))), False


@data_type_parser(_OURS["nemo_tarred"])  # type: ignore[untyped-decorator]
def _read_nemo_tarred(config: DictConfig) -> tuple[CutSet, bool]:
    cuts = CutSet(
        CheckedTarredIterator(
            config.manifest_filepath,
            tar_paths=config.tarred_audio_filepaths,
            skip_missing_manifest_entries=config.skip_missing_manifest_entries,
            **_common(config),
        )
    )
    return cuts if config.force_finite else cuts.repeat(), True


@data_type_parser(_OURS["multimodal_conversation"])  # type: ignore[untyped-decorator]
def _read_conversations(config: DictConfig) -> tuple[CutSet, bool]:
    item = OmegaConf.to_container(config)
    assert isinstance(item, dict), "an item has keys"
    cuts = CutSet(_Conversations({str(key): value for key, value in item.items()}))
    return cuts if config.force_finite else cuts.repeat(), True


class _Conversations:
    """Conversations as cuts, read again from the start by each pass."""

    def __init__(self, item: dict[str, Any]) -> None:
        self._item = item

    def __iter__(self) -> Iterator[Any]:
        return conversation_cuts(self._item, shuffle=bool(self._item["shuffle"]), seed=int(self._item["shard_seed"]))


def _common(config: DictConfig) -> dict[str, Any]:
    return {
        "text_field": config.text_field,
        "lang_field": config.lang_field,
        "shuffle_shards": config.shuffle,
        "shard_seed": config.shard_seed,
    }


def _nemo(source: Source) -> Iterator[Entry]:
    for location, _, _ in located(source.item):
        for path in manifest_files(location, source.where, "manifest_filepath"):
            for place, record in lines_of(path):
                # NeMo itself skips lines that carry this key.
                if not record.get("_skipme", False):
                    yield nemo_entry(record, place, path)


def _lhotse(source: Source) -> Iterator[Entry]:
    path = Path(source.location)
    refuse_missing([path], source.location, source.where, "cuts_path")
    for place, record in lines_of(path):
        yield lhotse_entry(record, place, path, in_archive=False)


def _lhotse_shar(source: Source) -> Iterator[Entry]:
    location = Path(source.location)
    paths = sorted(location.glob("cuts.*.jsonl*"))
    for path in paths:
        shard = path.name.split(".jsonl")[0].removeprefix("cuts")
        if not (location / f"recording{shard}.tar").is_file():
            raise ValueError(f"{source.where}: no recording{shard}.tar beside {path}: the Shar directory is incomplete")
    refuse_missing(paths, source.location, source.where, "shar_path")
    for path in paths:
        for place, record in lines_of(path):
            yield lhotse_entry(record, place, path, in_archive=True)


_ENTRIES: Final[dict[str, Callable[[Source], Iterator[Entry]]]] = {
    "lhotse": _lhotse,
    "nemo": _nemo,
    "nemo_tarred": tarred_entries,
    "lhotse_shar": _lhotse_shar,
    "multimodal_conversation": conversation_entries,
}
