"""What a checkpoint may hold: tensors, plain values and Megatron's description of them, and nothing that runs code.

Megatron and torch unpickle parts of a checkpoint as they find them, and a pickle can call any function. So every file
is read here first by an unpickler that knows a fixed list of classes; whatever else it names is refused.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

_METADATA: Final = ".metadata"
_COMMON: Final = "common.pt"
_BACKENDS: Final = "metadata.json"
_READABLE: Final = {"sharded_backend": ("torch_dist",), "common_backend": ("torch", None)}
"""The formats that can be checked here; Megatron reads others if a checkpoint names them (0.19: only one)."""
_CHECKPOINT: Final = "torch.distributed.checkpoint"
_ALLOWED: Final = frozenset(
    {
        *(
            f"{_CHECKPOINT}.metadata.{name}"
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(f"{_CHECKPOINT}.planner.{name}" for name in ("WriteItem", "WriteItemType", "TensorWriteData", "SavePlan")),
        f"{_CHECKPOINT}.filesystem._StorageInfo",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
        "torch.serialization._get_layout",
        "torch.Size",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "collections.OrderedDict",
    }
)
"""Classes in the description of a checkpoint, besides torch's dtypes."""


def refuse_code(checkpoint: Path) -> None:
    """ValueError, naming file and class, if reading `checkpoint` could run code or read files outside of it.

    refuse_code(Path("runs/mine/checkpoints/step_000100"))
    """
    _refuse_other_formats(checkpoint / _BACKENDS)
    metadata = _read_metadata(checkpoint / _METADATA)
    common = checkpoint / _COMMON
    if not common.is_file():
        raise ValueError(f"{checkpoint} is not a complete checkpoint: {_COMMON} is missing")
    refuse_pickled_code(common, str(common))
    for index, place in metadata.storage_data.items():
        name = str(place.relative_path)
        if Path(name).name != name or place.transform_descriptors is not None:
            raise ValueError(f"{checkpoint / _METADATA}: {index.fqn} lies in {name!r}, not in a file of the checkpoint")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (checkpoint / name).open("rb") as file:
                file.seek(place.offset)
                refuse_pickled_code(io.BytesIO(file.read(place.length)), str(checkpoint / name))


def checkpoint_reader(checkpoint: Path) -> FileSystemReader:
    """torch's reader of a checkpoint that has been checked; ValueError as in `refuse_code`."""
    refuse_code(checkpoint)
    return FileSystemReader(checkpoint)


def _refuse_other_formats(path: Path) -> None:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    for key, wanted in _READABLE.items():
        if not isinstance(named, dict) or named.get(key) not in wanted:
            raise ValueError(f"{path}: {key} must be {wanted[0]}, the format that this project writes")


def _read_metadata(path: Path) -> Metadata:
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a complete checkpoint: {path.name} is missing")
    with path.open("rb") as file:
        try:
            metadata = _DescriptionUnpickler(file, path).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, not the description of a checkpoint")
    return metadata


class _DescriptionUnpickler(pickle.Unpickler):
    """Finds only the classes of a checkpoint's description."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Look up a class; ValueError for one that does not belong in a description."""
        of_torch = vars(torch).get(name) if module == "torch" else None
        if isinstance(of_torch, torch.dtype):
            return of_torch
        if f"{module}.{name}" not in _ALLOWED:
            raise ValueError(
                f"{self.path} names {module}.{name}, which no checkpoint of this project holds and which could run "
                "code: do not use this file"
            )
        return super().find_class(module, name)


def refuse_pickled_code(content: Path | io.BytesIO, where: str) -> None:
    """ValueError, naming the class, if what `torch.save` wrote holds more than tensors and plain values, or is damaged.

        refuse_pickled_code(Path("common.pt"), "common.pt")

    Args:
        content: a file, or a stream at its beginning.
        where: begins the message.
    """
    read_tensors(content, where)


def read_tensors(content: Path | io.BytesIO, where: str, *, mapped: bool = False) -> Any:
    """What `torch.save` wrote, if it holds nothing but tensors, plain values and bytes.

    Args:
        content: a file, or a stream at its beginning.
        where: begins the message.
        mapped: tensors stay on disk until they are used.

    Raises:
        ValueError: as `refuse_pickled_code`.
    """
    try:
        # Transformer Engine's extra states are bytes, which are kept as they are.
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(content, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
        raise ValueError(
            f"{where} holds more than tensors and plain values, or is damaged, and is not read: "
            f"{named[0] if named else str(error).splitlines()[0]}"
        ) from error
