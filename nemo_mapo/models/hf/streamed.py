"""Writes a Megatron distributed checkpoint tensor by tensor, with only the current one in memory."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_mapo.checksums import checksums_of, files_to_sum, write_checksums
from nemo_mapo.models.tensors import Entry, shards_of
from nemo_mapo.upstream.megatron import save

Read = Callable[[str], Tensor]
"""Returns the tensor of a name in the model's state."""
Place = tuple[str, tuple[int, ...]]
"""Key and offset in a checkpoint."""
_FILE = "__0_0.distcp"


def save_streamed(state: dict[str, Any], read: Read, directory: Path) -> None:
    """Write the sharded state of a model on the meta device, with `read` giving its tensors one at a time.

    The directory exists and is empty; one process writes all of it, checksums last.
    """
    # Megatron reshapes the entries that it is given.
    given = {name: replace(entry) for name, entry in state.items()}
    save({"model": given}, directory, strategy=_StreamedSave(state, read))
    write_checksums(directory, checksums_of(files_to_sum(directory)))


class _StreamedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's torch format, written as it is read."""

    def __init__(self, state: dict[str, Any], read: Read) -> None:
        super().__init__("torch_dist", 1)
        self.state = state
        self.read = read

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path | str) -> None:
        """Plan as Megatron does, then write in the order of the state."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save_state_dict(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=_StreamedWriter(Path(checkpoint_dir)),
            planner=_StreamedPlanner(self.state, self.read),
        )


class _StreamedPlanner(MCoreSavePlanner):  # type: ignore[misc]
    """Megatron's planner over tensors without storage; reads their data when an item of the plan is resolved."""

    def __init__(self, state: dict[str, Any], read: Read) -> None:
        super().__init__(flatten_state_dict=False)
        self.state = state
        self.read = read
        self.place = {place: name for name, entry in state.items() for place in _places(entry)}
        self.order = {name: number for number, name in enumerate(state)}
        self._pieces: tuple[str, dict[Place, Tensor]] = ("", {})

    def create_local_plan(self) -> SavePlan:
        """Plan with the pieces of a tensor next to each other."""
        plan: SavePlan = super().create_local_plan()
        plan.items.sort(key=lambda item: self.order.get(self._name(item), -1))
        return plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The data of a piece; the tensor it belongs to is kept until a piece of another one is resolved."""
        if write_item.type == WriteItemType.BYTE_IO:
            data: io.BytesIO = super().resolve_data(write_item)
            return data
        name = self._name(write_item)
        if self._pieces[0] != name:
            self._pieces = ("", {})
            self._pieces = (name, dict(pieces_of(self.state[name], self.read(name))))
        return self._pieces[1][_place(write_item)]

    def _name(self, item: WriteItem) -> str:
        return self.place.get(_place(item), "")


class _StreamedWriter(FileSystemWriter):
    """One file, written item after item. torch's own writer keeps a tensor of each key until its file is complete."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all items in the order of the plan."""
        results = []
        with open(Path(self.path) / _FILE, "wb") as file:
            for item in plan.items:
                start = file.tell()
                data = planner.resolve_data(item)
                if isinstance(data, Tensor):
                    # A view would be saved with all of its storage.
                    torch.save(data.detach().contiguous().clone(), file)
                else:
                    file.write(data.getbuffer())
                length = file.tell() - start
                results.append(
                    WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(_FILE, start, length))
                )
            file.flush()
            os.fsync(file.fileno())
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def with_dtype(entry: Entry, dtype: torch.dtype) -> Entry:
    """The entry of a sharded state with another dtype."""
    changes = {"dtype": dtype} if isinstance(entry, ShardedTensor) else {}
    return replace(entry, data=entry.data.to(dtype), **changes)


def _places(entry: Any) -> Iterator[Place]:
    if isinstance(entry, Entry):
        yield from (place for place, _ in pieces_of(entry, entry.data))


def pieces_of(entry: Entry, data: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Pieces of a tensor with their places in the checkpoint: all of it, or views of the parts that Megatron splits."""
    for part in shards_of(replace(entry, data=data)):
        yield (part.key, tuple(part.global_offset)), part.data.view((1,) * part.prepend_axis_num + part.local_shape)


def _place(item: WriteItem) -> Place:
    return item.index.fqn, tuple(item.index.offset or ())
