"""The policy's weights under the names that vLLM loads, and updates written as directories."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.files import UNFINISHED, flush, whole_directory
from nemo_mapo.models.hf.weights import WeightMap
from nemo_mapo.models.lora import is_adapter
from nemo_mapo.models.qwen_omni.weights import ENCODER_RULES
from nemo_mapo.rollout.vllm.model_directory import hears

NamedTensors = Iterable[tuple[str, Tensor]]

KEPT_UPDATES: Final = 2
"""Directories left in place: a server may still be reading the one before the newest."""
_NAMES = "names.json"


class WeightsError(RuntimeError):
    """An update cannot be written, or is incomplete; the message names the file."""


def served_weights(tensors: NamedTensors, config: ModelConfig, *, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors under Hugging Face's names, one after the other; adapters are merged into their weights.

    A tied head is a separate tensor: vLLM, which packs it for its kernels, would keep the old one.

    Args:
        tensors: of the whole policy in Megatron's names (`policy_tensors`).
        config: of the policy.
        prefix: of the thinker's names in a model that vLLM serves with its audio encoder.
    """
    whole = hears(config)
    names = WeightMap(config.decoder, rules=ENCODER_RULES if whole else (), prefix=prefix)
    copies = {first: copy for copy, first in names.copies().items()}
    scale = None if config.lora is None else config.lora.scale
    for module, found in groupby(tensors, key=lambda item: item[0].rpartition(".")[0]):
        if module.startswith("perception.") and not whole:
            continue
        for name, tensor in _merged(dict(found), module, scale):
            source = names.source(name)
            for theirs, part in zip(source.theirs, source.layout.split(tensor), strict=True):
                yield theirs, part
                if theirs in copies:
                    yield copies[theirs], part


def _merged(found: dict[str, Tensor], module: str, scale: float | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module without its adapters; W + scale * B A is rounded once, as training merges."""
    adapters = {name.rpartition(".")[2]: tensor for name, tensor in found.items() if is_adapter(name)}
    for name, tensor in found.items():
        if is_adapter(name):
            continue
        if name == f"{module}.weight" and adapters:
            assert scale is not None, f"{module} has adapters and the config none"
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            a, b = (adapters.pop(part).to(dtype) for part in ("lora_a", "lora_b"))
            tensor = torch.addmm(tensor.to(dtype), b, a, alpha=scale).to(tensor.dtype)
        yield name, tensor
    assert not adapters, f"{module}: adapters came apart from their weight"


def write_update(directory: Path, version: int, tensors: NamedTensors, *, bucket_bytes: int) -> Path:
    """Write an update as safetensors; its directory gets its final name once everything is on disk.

    Returns:
        The directory. The last two are kept.

    Raises:
        WeightsError: it cannot be written.
    """
    final = directory / f"version_{version:08d}_{uuid.uuid4().hex[:12]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names: dict[str, list[str]] = {}
        with whole_directory(final) as unfinished:
            for number, bucket in enumerate(buckets(tensors, max_bytes=bucket_bytes, keep=_on_cpu)):
                file = f"model-{number:05d}.safetensors"
                save_file(bucket, unfinished / file, metadata={"format": "pt"})
                names[file] = list(bucket)
                flush(unfinished / file)
            (unfinished / _NAMES).write_text(json.dumps(names, indent=2))
        flush(directory)
        _remove_old(directory, newest=final)
    except OSError as error:
        raise WeightsError(f"version {version} cannot be written: {error}") from error
    return final


def check_update(update: Path) -> None:
    """WeightsError unless every written tensor still exists: vLLM would keep an old one and only log it."""
    try:
        wanted: dict[str, list[str]] = json.loads((update / _NAMES).read_text())
        for file, names in wanted.items():
            with safe_open(update / file, framework="pt") as opened:
                if missing := sorted(set(names) - set(opened.keys())):
                    raise WeightsError(f"{update / file} lacks {', '.join(missing)}")
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{update}: {error}") from error


def buckets(tensors: NamedTensors, *, max_bytes: int, keep: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors of one dtype, in order, up to `max_bytes` together; a larger tensor gets its own bucket.

    Args:
        tensors: any.
        max_bytes: of a bucket.
        keep: what to store of a tensor in its bucket.
    """
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if bucket and (size + tensor.nbytes > max_bytes or tensor.dtype != next(iter(bucket.values())).dtype):
            yield bucket
            bucket, size = {}, 0
        bucket[name] = keep(tensor)
        size += tensor.nbytes
        # Free a tensor gathered from several ranks before the next one is gathered.
        del tensor
    if bucket:
        yield bucket


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _remove_old(directory: Path, *, newest: Path) -> None:
    """Remove updates before the last ones, and partial updates of a trainer that died."""
    found = [path for path in directory.glob("version_*") if path.is_dir() and path != newest]
    whole = sorted(
        (path for path in found if not path.name.endswith(UNFINISHED)), key=lambda path: path.stat().st_mtime
    )
    half = [path for path in found if path.name.endswith(UNFINISHED)]
    for path in [*half, *whole[: len(whole) - (KEPT_UPDATES - 1)]]:
        shutil.rmtree(path)
