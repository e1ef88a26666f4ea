"""Encoders for an audio LLM from parts: from Whisper, a Qwen Omni model or a NeMo ASR model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from nemo_mapo.config.model import (
    PerceptionConfig,
    ProjectorConfig,
    QwenOmniPerceptionConfig,
    WhisperPerceptionConfig,
)
from nemo_mapo.models.hf.config import read_json
from nemo_mapo.models.hf.files import ModelFiles
from nemo_mapo.models.nemo_encoder import conformer_adapter, load_encoder, perception_config
from nemo_mapo.models.perception import NemoPerception
from nemo_mapo.models.qwen_omni.config import KINDS, read_encoder, read_features

_WHISPER_FIELDS: Final = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "activation_function",
    "max_source_positions",
    "scale_embedding",
)
_WHISPER_STACK: Final = 4
"""50 positions per second become 12.5 tokens per second, as in Qwen3-Omni."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder that can be combined with a decoder."""

    source: Path
    perception: PerceptionConfig
    sample_rate: int
    prefixes: tuple[str, ...]
    """Possible prefixes of the encoder's tensors in its files; none for a NeMo model."""


def read_any_encoder(source: Path, *, projector: str, stack: int | None) -> Encoder:
    """Read which kind of encoder a .nemo file or a Hugging Face directory holds.

    Args:
        source: the file or directory.
        projector: "linear" or "mlp"; for a NeMo encoder "linear" or "adapter", NeMo's Conformer as modality adapter.
        stack: frames per audio token; None is 4 for Whisper and 1 for the others.

    Raises:
        ValueError: the kind is not supported, or does not have this projector.
    """
    if source.suffix == ".nemo":
        return _nemo_encoder(source, projector=projector, stack=stack)
    values = read_json(source / "config.json")
    kind = values.get("model_type")
    if kind != "whisper" and kind not in KINDS:
        raise ValueError(
            f"{source / 'config.json'}: model_type={kind!r}; encoders are supported from whisper, {', '.join(KINDS)} "
            "and .nemo files"
        )
    if projector == "adapter":
        raise ValueError(f"projector={projector!r} is for .nemo encoders only; use linear or mlp")
    features = read_features(source)
    chosen: Any = projector
    perception: PerceptionConfig
    if kind == "whisper":
        perception = WhisperPerceptionConfig(
            encoder=_whisper_encoder(values),
            features=features,
            projector=ProjectorConfig(type=chosen, stack=stack or _WHISPER_STACK),
        )
        prefixes: tuple[str, ...] = ("model.encoder.", "encoder.")
    else:
        family, encoder, prefix = read_encoder(source, values)
        perception = QwenOmniPerceptionConfig(
            family=family,
            encoder=encoder,
            features=features,
            projector=ProjectorConfig(type=chosen, stack=stack or 1),
        )
        prefixes = (f"{prefix}audio_tower.",)
    return Encoder(source=source, perception=perception, sample_rate=features["sampling_rate"], prefixes=prefixes)


def load_weights(perception: nn.Module, encoder: Encoder) -> None:
    """Load the encoder's weights into a perception module; the projector keeps its own.

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape.
    """
    if isinstance(perception, NemoPerception):
        load_encoder(perception, encoder.source)
        return
    files = ModelFiles(encoder.source)
    module = perception.get_submodule("module")
    own = module.state_dict()
    prefix = next((one for one in encoder.prefixes if any(name.startswith(one) for name in files.tensors)), None)
    if prefix is None:
        raise ValueError(f"{encoder.source}: no tensor in the files begins with {' or '.join(encoder.prefixes)}")
    given = {name.removeprefix(prefix): stored for name, stored in files.tensors.items() if name.startswith(prefix)}
    wrong = sorted(given.keys() ^ own.keys())
    wrong += sorted(name for name in given.keys() & own.keys() if given[name].shape != tuple(own[name].shape))
    if wrong:
        raise ValueError(
            f"{encoder.source}: {prefix}{wrong[0]} ({len(wrong)} such) is not in both the files and the encoder that "
            "config.json describes, or differs in shape"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(files.read(prefix + name))


def _whisper_encoder(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Whisper's config that its encoder reads; dropout stays off."""
    from transformers import WhisperConfig

    full = WhisperConfig(**values).to_dict()  # type: ignore[no-untyped-call]
    return {name: full[name] for name in _WHISPER_FIELDS}


def _nemo_encoder(source: Path, *, projector: str, stack: int | None) -> Encoder:
    if projector == "mlp" or (projector == "linear" and stack is not None):
        raise ValueError(
            f"{source.name}: a NeMo encoder uses NeMo's own modules; give projector=linear, or adapter, which can have "
            "a stack"
        )
    perception = perception_config(source)
    module = perception.module
    if projector == "adapter":
        adapter = conformer_adapter(module["encoder"], subsampling=stack or 1)
        perception = replace(perception, module={**module, "modality_adapter": adapter})
    return Encoder(
        source=source,
        perception=perception,
        sample_rate=module["preprocessor"]["sample_rate"],
        prefixes=(),
    )
