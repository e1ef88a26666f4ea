"""LoRA adapters of a run in PEFT's format, for the Hugging Face model that they belong to."""

import json
import re
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nemo_mapo.files import whole_directory
from nemo_mapo.models.hf.checkpoint import CheckpointTensors
from nemo_mapo.models.hf.files import ModelFiles
from nemo_mapo.models.hf.models import read_model

_WEIGHTS: Final = "adapter_model.safetensors"
_CONFIG: Final = "adapter_config.json"
_LAYERS, _LAYERS_OF_EITHER = r"model\.layers\.", r"model\.(?:language_model\.)?layers\."
"""Where a thinker has its decoder's layers in transformers 4 (and in files), and where in 4 or 5."""


def export_adapters(checkpoint: Path, original: Path, output: Path, *, lora_alpha: float) -> int:
    """Write a directory that `peft.PeftModel.from_pretrained` loads on `original`; returns the number of modules.

    Each part of a fused projection gets a copy of its A, and its own rows of B.

    Args:
        checkpoint: checkpoint of a run with `model.lora` that started from `original`.
        original: the Hugging Face directory with its weights.
        output: directory to make.
        lora_alpha: the run's `model.lora.alpha`.

    Raises:
        ValueError: naming a tensor, if the run trained more than the adapters or started from other weights.
    """
    from safetensors.torch import save_file

    model = read_model(original)
    tensors = CheckpointTensors(checkpoint, model, lora_alpha=lora_alpha)
    files = ModelFiles(original)
    weights: dict[str, Tensor] = {}
    modules: list[str] = []
    for name, source in model.weights.sources(tensors.names, files.tensors).items():
        base = source.layout.split(tensors.read_base(name))
        for theirs, tensor in zip(source.theirs, base, strict=True):
            wanted = files.read(theirs)
            if not torch.equal(wanted, tensor.to(wanted.dtype)):
                raise ValueError(
                    f"{checkpoint}: {theirs} is not that of {original}; adapters alone would give another model. "
                    "Merge them (leave --adapters out), or give the model that the run started from"
                )
        if (adapter := tensors.adapter(name)) is None:
            continue
        a, b = adapter
        for theirs, part in zip(source.theirs, source.layout.split(b), strict=True):
            module = theirs.removesuffix(".weight")
            modules.append(module)
            weights[f"base_model.model.{module}.lora_A.weight"] = a.clone()
            weights[f"base_model.model.{module}.lora_B.weight"] = part.contiguous()
    assert tensors.lora is not None, "an alpha is given"
    with whole_directory(output) as folder:
        save_file(weights, str(folder / _WEIGHTS), metadata={"format": "pt"})
        config = _peft_config(modules, original, rank=tensors.lora.rank, alpha=lora_alpha)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return len(modules)


def _peft_config(modules: list[str], original: Path, *, rank: int, alpha: float) -> dict[str, Any]:
    """PEFT matches whole names in memory: modules of a talker or of vision have the same last parts."""
    patterns = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(module)) for module in modules)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": str(original),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": "|".join(patterns).replace(_LAYERS, _LAYERS_OF_EITHER),
        "inference_mode": True,
    }
