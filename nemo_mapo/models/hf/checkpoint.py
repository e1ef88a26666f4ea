"""The tensors of a Megatron distributed checkpoint by the names of our model's state, whatever layout wrote it."""

from pathlib import Path
from typing import get_args

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_mapo.checksums import damage
from nemo_mapo.config.adapters import LoraConfig, LoraTarget
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.models import HfModel
from nemo_mapo.models.hf.streamed import Place, pieces_of, with_dtype
from nemo_mapo.models.lora import add_lora, is_adapter
from nemo_mapo.models.tensors import Entry, sharded_tensors, shards_of
from nemo_mapo.models.untrusted import checkpoint_reader


def model_without_storage(model: HfModel) -> AudioLLM:
    """The whole model in one process, on the meta device: names and shapes."""
    vocab_size = model.config.decoder.vocab_size
    assert vocab_size is not None, "a model's config.json says it"
    with torch.device("meta"):
        return AudioLLM(
            model.config, vocab_size=vocab_size, audio_token_id=model.audio_token_id, sample_rate=model.sample_rate
        )


class CheckpointTensors:
    """Tensors of a checkpoint that a Hugging Face model has; adapters are merged into the weights they belong to."""

    names: tuple[str, ...]

    def __init__(self, directory: Path, model: HfModel, *, lora_alpha: float | None) -> None:
        """Compare the checkpoint with the model.

        Raises:
            ValueError: the directory holds no checkpoint, a damaged one, one that could run code or that of another
                model, or adapters come without `lora_alpha` (or the reverse).
        """
        if not (directory / "metadata.json").is_file():
            raise ValueError(
                f"{directory} is not a Megatron distributed checkpoint; give one such as RUN/checkpoints/step_000100"
            )
        if found := damage(directory):
            raise ValueError(f"{found}: the checkpoint is damaged; use another one")
        self.directory = directory
        self._reader = checkpoint_reader(directory)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self.lora = _adapters(self._stored, lora_alpha, directory)
        built = model_without_storage(model)
        if self.lora is not None:
            add_lora(built.language_model, self.lora, seed=0)
        self._entries = {
            name: self._as_stored(entry)
            for name, entry in sharded_tensors(built).items()
            if name.startswith(model.parts)
        }
        self.names = tuple(name for name in self._entries if not is_adapter(name))

    def nbytes(self, name: str) -> int:
        """Size of a tensor."""
        size: int = self._entries[name].data.nbytes
        return size

    def read(self, name: str) -> Tensor:
        """A tensor; W + scale * B A is added in float32 at least and rounded once, as training merges adapters."""
        weight = self.read_base(name)
        adapter = self.adapter(name)
        if adapter is None:
            return weight
        assert self.lora is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (part.to(dtype) for part in adapter)
        return torch.addmm(weight.to(dtype), b, a, alpha=self.lora.scale).to(weight.dtype)

    def read_base(self, name: str) -> Tensor:
        """A tensor without its adapter."""
        return self._load(name)

    def adapter(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A and B of a weight that has an adapter."""
        stem = name.removesuffix("weight")
        if f"{stem}lora_a" not in self._entries:
            return None
        return self._load(f"{stem}lora_a"), self._load(f"{stem}lora_b")

    def keys_of(self, part: str) -> tuple[str, ...]:
        """The checkpoint's own names of a part that it stores tensor by tensor, such as `perception.`."""
        return tuple(key for key in self._stored if key.startswith(part))

    def read_key(self, key: str) -> Tensor:
        """A tensor by the checkpoint's own name."""
        found = self._stored[key]
        tensor = torch.empty(found.size, dtype=found.properties.dtype)
        self._read_into({(key, (0,) * tensor.dim()): tensor})
        return tensor

    def _load(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensor = torch.empty_like(entry.data, device="cpu")
        self._read_into(dict(pieces_of(entry, tensor)))
        return tensor

    def _read_into(self, targets: dict[Place, Tensor]) -> None:
        items = [
            item
            for (key, offset), target in targets.items()
            for item in create_read_items_for_chunk_list(
                key, self._stored[key], [ChunkStorageMetadata(torch.Size(offset), target.size())]
            )
        ]
        self._reader.read_data(LoadPlan(items), _IntoTargets(targets)).wait()

    def _as_stored(self, entry: Entry) -> Entry:
        """The entry with the checkpoint's dtype; ValueError if that has another shape or no such tensor."""
        for part in shards_of(entry):
            found = self._stored.get(part.key)
            if found is None or not _fits(tuple(found.size), part):
                raise ValueError(
                    f"{self.directory}: {part.key} is {'missing' if found is None else tuple(found.size)}, the model "
                    f"has {tuple(part.global_shape)}; give the checkpoint of a run that started from this model"
                )
            dtype = found.properties.dtype
        return with_dtype(entry, dtype)


def _fits(stored: tuple[int, ...], part: ShardedTensor) -> bool:
    """Whether the stored shape is the model's; tensor parallelism may have padded the end of the vocabulary."""
    wanted = tuple(part.global_shape)
    return stored == wanted or (part.allow_shape_mismatch and stored[0] >= wanted[0] and stored[1:] == wanted[1:])


class _IntoTargets(DefaultLoadPlanner):
    """Reads into views of the tensors that are being assembled."""

    def __init__(self, targets: dict[Place, Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where a piece goes."""
        target = self.targets[read_item.dest_index.fqn, tuple(read_item.dest_index.offset or ())]
        return narrow_tensor_by_index(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the data was read in place."""


def _adapters(stored: dict[str, TensorStorageMetadata], alpha: float | None, directory: Path) -> LoraConfig | None:
    """Config of the adapters in a checkpoint, which shows everything but alpha."""
    found = {key: value for key, value in stored.items() if key.endswith(".lora_a")}
    if bool(found) != (alpha is not None):
        raise ValueError(
            f"{directory} holds LoRA adapters: give the run's model.lora.alpha to merge them (--lora-alpha)"
            if found
            else f"{directory} holds no LoRA adapters, but an alpha is given; leave it out"
        )
    if alpha is None:
        return None
    names = {key.split(".")[-2] for key in found}
    targets = tuple(target for target in get_args(LoraTarget) if target in names)
    (rank,) = {value.size[-2] for value in found.values()}
    return LoraConfig(rank=rank, alpha=alpha, targets=targets)
