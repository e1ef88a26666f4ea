"""From a Qwen Omni model's config.json to our config; what Megatron would compute differently is refused."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemo_mapo.config.model import ModelConfig, QwenOmniFamily, QwenOmniPerceptionConfig
from nemo_mapo.models.hf.config import decoder_config, read_json

_FEATURES = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "padding_value", "dither")
KINDS = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker")
_AUDIO_TOKEN = ("audio_token_id", "audio_token_index")
"""Names of the placeholder's id in config.json, by version of transformers."""
_AUDIO_NEUTRAL = {"torch_dtype", "use_cache", "init_std", "_attn_implementation_autoset"}


@dataclass(frozen=True, kw_only=True)
class Thinker:
    """The thinker that a directory's config describes."""

    config: ModelConfig
    """Perception and decoder; everything else has its default."""
    prefix: str
    """Prefix of the names of the thinker's tensors."""
    audio_token_id: int
    sample_rate: int


def read_thinker(directory: Path, values: Mapping[str, Any]) -> Thinker:
    """The thinker that `values`, of the directory's config.json, describe.

    Raises:
        ValueError: for an option that our decoder does not have, naming its value.
    """
    path = directory / "config.json"
    family, encoder, prefix = read_encoder(directory, values)
    thinker = _thinker(path, values)
    moe = family == "qwen3_omni_moe"
    classes = _classes(family)
    features = read_features(directory)
    # Transformers 4 states tying in the text config; 5 at the thinker, whatever the text config says.
    text = dict(thinker.get("text_config") or {})
    if "tie_word_embeddings" in thinker:
        text["tie_word_embeddings"] = thinker["tie_word_embeddings"]
    try:
        decoder = decoder_config(text, classes.text, qk_layernorm=moe, add_qkv_bias=not moe, multimodal=True)
        perception = QwenOmniPerceptionConfig(family=family, encoder=encoder, features=features)
        config = ModelConfig(perception=perception, decoder=decoder)
    except ValueError as error:
        raise ValueError(f"{path}: text_config: {error}") from error
    stated = {thinker[name] for name in _AUDIO_TOKEN if name in thinker}
    if len(stated) > 1:
        raise ValueError(f"{path}: {' and '.join(_AUDIO_TOKEN)} state different ids, {sorted(stated)}")
    return Thinker(
        config=config,
        prefix=prefix,
        audio_token_id=stated.pop() if stated else classes.thinker().audio_token_id,
        sample_rate=features["sampling_rate"],
    )


def read_encoder(directory: Path, values: Mapping[str, Any]) -> tuple[QwenOmniFamily, dict[str, Any], str]:
    """Family, the encoder's config, and the prefix of the names of the thinker's tensors."""
    path = directory / "config.json"
    kind = str(values["model_type"])
    family: QwenOmniFamily = "qwen3_omni_moe" if kind.startswith("qwen3") else "qwen2_5_omni"
    audio_class = _classes(family).audio
    audio = audio_class(**_known_audio(_thinker(path, values).get("audio_config") or {}, audio_class, path))
    # Of everything that transformers keeps in a config, only what the encoder's own class takes.
    taken = inspect.signature(audio_class.__init__).parameters
    encoder = {key: value for key, value in audio.to_dict().items() if key in taken}
    return family, encoder, "" if kind.endswith("_thinker") else "thinker."


def _thinker(path: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    if str(values["model_type"]).endswith("_thinker"):
        return values
    thinker = values.get("thinker_config")
    if not isinstance(thinker, dict):
        raise ValueError(f"{path}: no thinker_config")
    return thinker


class _Classes(NamedTuple):
    """transformers' configs of a family."""

    text: Any
    audio: Any
    thinker: Any


def _classes(family: QwenOmniFamily) -> _Classes:
    if family == "qwen3_omni_moe":
        from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as qwen3

        return _Classes(
            qwen3.Qwen3OmniMoeTextConfig, qwen3.Qwen3OmniMoeAudioEncoderConfig, qwen3.Qwen3OmniMoeThinkerConfig
        )
    from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as qwen2_5

    return _Classes(
        qwen2_5.Qwen2_5OmniTextConfig, qwen2_5.Qwen2_5OmniAudioEncoderConfig, qwen2_5.Qwen2_5OmniThinkerConfig
    )


def _known_audio(stated: Mapping[str, Any], audio_class: Any, path: Path) -> dict[str, Any]:
    """The fields that the encoder's class takes; ValueError naming one that it does not know."""
    taken = inspect.signature(audio_class.__init__).parameters.keys()
    wrong = stated.keys() - audio_class().to_dict().keys() - _AUDIO_NEUTRAL
    if wrong:
        named = ", ".join(f"{name}={stated[name]!r}" for name in sorted(wrong))
        raise ValueError(f"{path}: audio_config: {named} is not known, and may change the function")
    return {name: value for name, value in stated.items() if name in taken}


def read_features(directory: Path) -> dict[str, Any]:
    """Settings of transformers' WhisperFeatureExtractor, from preprocessor_config.json or processor_config.json.

    Raises:
        ValueError: neither exists, or they name features of another kind.
    """
    from transformers import WhisperFeatureExtractor

    own, processor = directory / "preprocessor_config.json", directory / "processor_config.json"
    if own.is_file():
        values, path = read_json(own), own
    elif processor.is_file() and "feature_extractor" in (inside := read_json(processor)):
        values, path = inside["feature_extractor"], processor
    else:
        raise ValueError(
            f"{directory}: no preprocessor_config.json, and no feature_extractor in processor_config.json; one of "
            "them says how audio becomes features"
        )
    kind = values.get("feature_extractor_type", "WhisperFeatureExtractor")
    if kind != "WhisperFeatureExtractor":
        raise ValueError(f"{path}: feature_extractor_type={kind!r}, only 'WhisperFeatureExtractor' is supported")
    full = WhisperFeatureExtractor(**values).to_dict()  # type: ignore[no-untyped-call]
    return {key: full[key] for key in _FEATURES}
