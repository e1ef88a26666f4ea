"""A Hugging Face model directory: safetensors read one tensor at a time, and written one shard at a time."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

_INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
"""File of a model that fits into one."""
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
SHARD_BYTES = 5 * 10**9
"""Largest size of the shards that are laid out here, as in transformers."""
_FUSED = re.compile(r"(?P<stem>.+\.mlp\.experts\.)(?P<kind>gate_up_proj|down_proj)")
"""The experts of a layer as one tensor, as transformers 5 has them: [expert, out, in], gate above up."""
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Slice(NamedTuple):
    """Rows of an expert in a tensor that holds all of a layer's."""

    name: str
    expert: int
    rows: slice


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part_of: Slice | None = None
    """If it is a part of a fused tensor."""


class ModelFiles:
    """The tensors of a directory, by name; fused experts appear one by one under their separate names."""

    tensors: dict[str, Stored]

    def __init__(self, directory: Path) -> None:
        """Read the headers of all shards.

        Raises:
            ValueError: naming what is missing or damaged; weights in formats other than safetensors are not read.
        """
        self.directory = directory
        self.tensors = {}
        self._open: tuple[str, Any] | None = None
        for file in _shards(directory):
            for name, stored in _one_by_one(_header(directory / file)):
                if name in self.tensors:
                    raise ValueError(f"{directory}: {name} is in {self.tensors[name].file} and in {file}")
                self.tensors[name] = stored

    def read(self, name: str) -> Tensor:
        """The tensor; its shard stays open until a tensor of another shard is read."""
        from safetensors import safe_open

        file, part_of = self.tensors[name].file, self.tensors[name].part_of
        if self._open is None or self._open[0] != file:
            # The previous one is released first: there is never more than one shard in memory.
            self._open = None
            self._open = (file, safe_open(str(self.directory / file), framework="pt"))
        opened = self._open[1]
        tensor: Tensor
        if part_of is None:
            tensor = opened.get_tensor(name)
        else:
            tensor = opened.get_slice(part_of.name)[part_of.expert, part_of.rows]
        return tensor

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of one file under the file's own names; all experts of a fused tensor must be among them."""
        stored: dict[str, Tensor] = {}
        experts: dict[str, dict[int, list[Tensor]]] = {}
        for name, tensor in tensors.items():
            part_of = self.tensors[name].part_of
            if part_of is None:
                stored[name] = tensor
            else:
                experts.setdefault(part_of.name, {}).setdefault(part_of.expert, []).append(tensor)
        return stored | {
            name: torch.stack([torch.cat(parts) for _, parts in sorted(by_expert.items())])
            for name, by_expert in experts.items()
        }


def write_shards(
    directory: Path, layout: Mapping[str, Iterable[str]], read: Callable[[list[str]], Mapping[str, Tensor]]
) -> int:
    """Write each file of `layout` with the tensors of these names, and the index; returns the number of tensors."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for file, names in tqdm(layout.items(), desc="export", unit="file", dynamic_ncols=True):
        tensors = dict(read(list(names)))
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, str(directory / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        del tensors
    if list(layout) != [SINGLE]:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return len(weight_map)


def shard_layout(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Names in shards of up to `limit` bytes, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    total = len(shards)
    return {f"model-{number:05d}-of-{total:05d}.safetensors": names for number, names in enumerate(shards, 1)}


def side_files(directory: Path) -> list[Path]:
    """Everything beside the weights: config, tokenizer, processor, chat template, speakers' voices, licence."""
    weights = {
        _INDEX,
        *(path.name for pattern in ("*.safetensors", *_OTHER_WEIGHTS) for path in directory.glob(pattern)),
    }
    kept = {"spk_dict.pt"}
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name not in weights - kept)


def _shards(directory: Path) -> list[str]:
    index = directory / _INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [file for file in files if not (directory / file).is_file()]
        if missing:
            raise ValueError(f"{directory}: {_INDEX} names {', '.join(missing)}, but they are missing")
        return files
    if (directory / SINGLE).is_file():
        return [SINGLE]
    others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in directory.glob(pattern))
    found = f"only {', '.join(others)}, whose format can run code; convert them" if others else "none"
    raise ValueError(f"{directory}: no safetensors weights ({found}); give a directory with {SINGLE} or {_INDEX}")


def _header(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: _stored(path.name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: download it again ({error})") from error


def _one_by_one(header: Mapping[str, Stored]) -> Iterable[tuple[str, Stored]]:
    """The tensors of a file, with those that hold all experts of a layer split by expert and projection."""
    for name, stored in header.items():
        match = _FUSED.fullmatch(name)
        if match is None or len(stored.shape) != 3:
            yield name, stored
            continue
        parts = _PARTS[match["kind"]]
        experts, out, width = stored.shape
        rows = out // len(parts)
        for expert in range(experts):
            for number, part in enumerate(parts):
                piece = Slice(name, expert, slice(number * rows, (number + 1) * rows))
                yield f"{match['stem']}{expert}.{part}.weight", stored._replace(shape=(rows, width), part_of=piece)


def _stored(file: str, piece: Any) -> Stored:
    dtype = _DTYPES.get(piece.get_dtype())
    if dtype is None:
        raise ValueError(f"{file} holds {piece.get_dtype()} numbers; only {', '.join(_DTYPES)} are supported")
    return Stored(file, tuple(piece.get_shape()), dtype)


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
