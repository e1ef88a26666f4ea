"""Converts Hugging Face directories to Megatron checkpoints and back, never with a whole model in memory."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from nemo_mapo.files import whole_directory
from nemo_mapo.models.hf.checkpoint import CheckpointTensors, model_without_storage
from nemo_mapo.models.hf.files import SINGLE, ModelFiles, shard_layout, side_files, write_shards
from nemo_mapo.models.hf.models import HfModel, read_model
from nemo_mapo.models.hf.streamed import save_streamed, with_dtype
from nemo_mapo.models.hf.weights import Source, WeightMap
from nemo_mapo.models.tensors import Entry

CHECKPOINT, ORIGINAL, TOKENIZER = "checkpoint", "original", "tokenizer"
MODEL_CONFIG = Path("conf", "model", "imported.yaml")
PERCEPTION_CONFIG = "perception.json"
"""File beside the decoder of an audio LLM from parts that holds its `model.perception`."""
_PERCEPTION = "perception"
"""Subfolder for perception's weights, with our names: a loader of the decoder may read every file beside it."""
TRAINER_STATE = "trainer_state.json"
"""A directory without this file is not one of the trainer's checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """Result of a conversion."""

    tensors: int
    left_aside: int
    """Tensors of parts that import skips and export carries over."""
    has_perception: bool
    """False for a decoder alone."""


def import_hf(source: Path, output: Path) -> Converted:
    """Write OUTPUT/checkpoint from a thinker or a text LLM's decoder, and what training from it needs beside it.

    That is config, tokenizer and the original's side files. One shard of the original is in memory at a time. Tensors
    keep their dtype.

    Raises:
        ValueError: naming the file, tensor or option that is wrong; nothing is left behind.
    """
    model = read_model(source)
    files = ModelFiles(source)
    state = model_without_storage(model).sharded_state_dict()
    state = {name: entry for name, entry in state.items() if name.startswith(model.parts)}
    ours = [name for name, entry in state.items() if isinstance(entry, Entry)]
    sources = model.weights.sources(ours, files.tensors)
    check_copies(model.weights, files)
    for name, found in sources.items():
        state[name] = checked(state[name], name, found, files)
    with whole_directory(output) as folder:
        _write_side_files(source, folder, model)
        (folder / CHECKPOINT).mkdir()

        with tqdm(total=len(ours), desc="import", unit="tensor", dynamic_ncols=True) as progress:

            def read(name: str) -> Tensor:
                progress.update()
                return sources[name].layout.fuse([files.read(theirs) for theirs in sources[name].theirs])

            save_streamed(state, read, folder / CHECKPOINT)
        (folder / CHECKPOINT / TRAINER_STATE).write_text("{}\n")
    aside = sum(map(model.weights.is_left_aside, files.tensors))
    return Converted(tensors=len(ours), left_aside=aside, has_perception=model.has_perception)


def export_hf(
    checkpoint: Path,
    original: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
    thinker_only: bool = False,
) -> Converted:
    """Write a directory that transformers loads, one shard at a time.

    For an audio LLM from parts it holds the decoder; encoder and projector go into its folder `perception`.

    Args:
        checkpoint: checkpoint of a run that started from `original`, or of an import.
        original: the Hugging Face directory; weights left aside, and how tensors are spread over files, come from it.
        output: directory to make.
        dtype: dtype of the thinker's tensors; None is the checkpoint's.
        lora_alpha: `model.lora.alpha` of a run with adapters, which are merged.
        thinker_only: leave out the weights left aside; then `original` may be the side files that import kept.

    Raises:
        ValueError: naming the file, tensor or option that is wrong; nothing is left behind.
    """
    model = read_model(original)
    tensors = CheckpointTensors(checkpoint, model, lora_alpha=lora_alpha)
    heard = _heard_apart(original, model, tensors)
    weights = model.weights
    sources = {name: weights.source(name) for name in tensors.names}
    files = None if thinker_only else ModelFiles(original)
    if files is not None:
        weights.sources(tensors.names, files.tensors)
    layout = _layout(tensors, sources, files)
    reader = _ShardReader(tensors, sources, files, dtype, copies=weights.copies())
    with whole_directory(output) as folder:
        for path in side_files(original):
            shutil.copy2(path, folder / path.name)
        written = write_shards(folder, layout, reader.read)
        if heard:
            (folder / _PERCEPTION).mkdir()
            write_shards(
                folder / _PERCEPTION, {SINGLE: heard}, lambda keys: {key: tensors.read_key(key) for key in keys}
            )
    aside = 0 if files is None else sum(map(weights.is_left_aside, files.tensors))
    return Converted(tensors=written - aside, left_aside=aside, has_perception=model.has_perception)


def _heard_apart(original: Path, model: HfModel, tensors: CheckpointTensors) -> tuple[str, ...]:
    """Tensors of perception in a checkpoint whose Hugging Face model is a decoder alone.

    Raises:
        ValueError: `original` is not the folder that was written when the audio LLM was assembled.
    """
    if model.has_perception or not (heard := tensors.keys_of("perception.")):
        return ()
    if not (original / PERCEPTION_CONFIG).is_file():
        raise ValueError(
            f"{original}: the checkpoint is that of an audio LLM from parts, whose vocabulary has grown; give the "
            f"folder `{ORIGINAL}` that examples/assemble.py made (it has {PERCEPTION_CONFIG}), and --thinker-only"
        )
    return heard


def check_copies(weights: WeightMap, files: ModelFiles) -> None:
    """ValueError if a tensor that config.json says is tied to another one differs from it."""
    for copy, first in weights.copies().items():
        if copy in files.tensors and not torch.equal(files.read(copy), files.read(first)):
            raise ValueError(
                f"{files.directory}: tie_word_embeddings=true, but {copy} differs from {first}; set it to false in "
                "config.json if the model has a separate head"
            )


class _ShardReader:
    """Gives the tensors of a Hugging Face shard: ours from the checkpoint, those left aside from the original."""

    def __init__(
        self,
        tensors: CheckpointTensors,
        sources: Mapping[str, Source],
        files: ModelFiles | None,
        dtype: torch.dtype | None,
        *,
        copies: Mapping[str, str],
    ) -> None:
        self.tensors, self.sources, self.files, self.dtype = tensors, sources, files, dtype
        self.copies = copies
        self.ours = {theirs: name for name, source in sources.items() for theirs in source.theirs}

    def read(self, theirs: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of these names, in their order, under the names that the original's file has."""
        found = self._converted([name for name in theirs if name not in self.copies])
        for name in theirs:
            if name in self.copies:
                first = self.copies[name]
                found[name] = (found[first] if first in found else self._converted([first])[first]).clone()
        ordered = {name: found[name] for name in theirs}
        return ordered if self.files is None else self.files.as_stored(ordered)

    def _converted(self, theirs: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        ours = dict.fromkeys(self.ours[name] for name in theirs if name in self.ours)
        wanted = set(theirs)
        for name in ours:
            fused = self.tensors.read(name)
            parts = self.sources[name].layout.split(fused if self.dtype is None else fused.to(self.dtype))
            named = zip(self.sources[name].theirs, parts, strict=True)
            found |= {key: part.contiguous() for key, part in named if key in wanted}
        for name in wanted - found.keys():
            assert self.files is not None, "without the original's weights only ours are asked for"
            found[name] = self.files.read(name)
        return found


def _layout(
    tensors: CheckpointTensors, sources: Mapping[str, Source], files: ModelFiles | None
) -> Mapping[str, Sequence[str]]:
    """Which file holds which tensors: as in the original, if its weights are given."""
    if files is None:
        # A fused tensor's parts are counted as equally large, which is close enough to decide where a file ends.
        sizes = {
            theirs: tensors.nbytes(name) // len(source.theirs)
            for name, source in sources.items()
            for theirs in source.theirs
        }
        return shard_layout(sizes)
    by_file: dict[str, list[str]] = {}
    for name, stored in files.tensors.items():
        by_file.setdefault(stored.file, []).append(name)
    return by_file


def checked(entry: Entry, name: str, source: Source, files: ModelFiles, *, rows: int | None = None) -> Entry:
    """The entry with the files' dtype; ValueError if its shape is not the model's, or it does not have `rows` rows."""
    parts = [files.tensors[theirs] for theirs in source.theirs]
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise ValueError(f"{', '.join(source.theirs)} have different dtypes but become one tensor; convert them")
    fused = source.layout.fuse([torch.empty(part.shape, device="meta") for part in parts])
    wanted = tuple(entry.data.shape) if rows is None else (rows, *entry.data.shape[1:])
    if tuple(fused.shape) != wanted:
        shapes = ", ".join(f"{theirs} {part.shape}" for theirs, part in zip(source.theirs, parts, strict=True))
        raise ValueError(f"{shapes}: config.json describes a model whose {name} is {wanted}")
    return with_dtype(entry, dtypes.pop())


def _write_side_files(source: Path, folder: Path, model: HfModel) -> None:
    (folder / ORIGINAL).mkdir()
    for path in side_files(source):
        shutil.copy2(path, folder / ORIGINAL / path.name)
    _write_tokenizer(source, folder / TOKENIZER)
    write_model_config(folder, model, f"{source.name}, as config.json describes it; made by examples/import_hf.py.")


def write_model_config(folder: Path, model: HfModel, title: str) -> None:
    """Write the config that `model=imported` selects."""
    target = folder / MODEL_CONFIG
    target.parent.mkdir(parents=True)
    parts = ("perception", "decoder") if model.has_perception else ("decoder",)
    plain = json.loads(json.dumps({part: dataclasses.asdict(getattr(model.config, part)) for part in parts}))
    text = yaml.safe_dump({"defaults": ["defaults", "_self_"], **plain}, sort_keys=False)
    target.write_text(f"# {title}\n{text}")


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer with the processor's chat template, which older directories store separately."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
        str(source), local_files_only=True, trust_remote_code=False
    )
    legacy = source / "chat_template.json"
    if tokenizer.chat_template is None and legacy.is_file():
        tokenizer.chat_template = json.loads(legacy.read_text())["chat_template"]
    tokenizer.save_pretrained(str(folder))
