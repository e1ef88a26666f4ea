"""From a Qwen Omni model's config.json to our config; what Megatron would compute differently is refused."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_mapo.config.model import DecoderConfig, ModelConfig, QwenOmniFamily, QwenOmniPerceptionConfig

_FEATURES = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "padding_value", "dither")
_KINDS = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker")


@dataclass(frozen=True, kw_only=True)
class QwenModel:
    """What a directory's config says of its thinker."""

    config: ModelConfig
    """Perception and decoder; everything else has its default."""
    prefix: str
    """Before the names of the thinker's tensors."""
    audio_token_id: int
    sample_rate: int


def read_model(directory: Path) -> QwenModel:
    """Read config.json and the audio features' config.

    Raises:
        ValueError: for a model of another kind, or an option that our decoder does not have, naming its value.
    """
    kind, thinker = _thinker_config(directory)
    family: QwenOmniFamily = "qwen3_omni_moe" if kind.startswith("qwen3") else "qwen2_5_omni"
    features = _features(directory)
    audio = thinker.audio_config
    text = thinker.text_config
    perception = QwenOmniPerceptionConfig(
        family=family,
        # Of all that transformers keeps in a config, only what the encoder's own takes.
        encoder={
            key: value
            for key, value in audio.to_dict().items()
            if key in inspect.signature(type(audio).__init__).parameters
        },
        features=features,
    )
    try:
        decoder = _decoder(text.to_dict(), moe=family == "qwen3_omni_moe")
        config = ModelConfig(perception=perception, decoder=decoder)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    return QwenModel(
        config=config,
        prefix="" if kind.endswith("_thinker") else "thinker.",
        audio_token_id=thinker.audio_token_id,
        sample_rate=features["sampling_rate"],
    )


def _decoder(text: dict[str, Any], *, moe: bool) -> DecoderConfig:
    """The decoder in Megatron's names.

    Megatron's plain rotary embedding is Qwen's multimodal one wherever the three rows of positions are equal, and for
    text and audio they are, whatever the sections: both models count every token once.
    """
    rope_type = (text.get("rope_scaling") or {}).get("rope_type", "default")
    wanted: dict[str, tuple[Any, Any]] = {
        "hidden_act": (text["hidden_act"], "silu"),
        "rope_scaling.rope_type": (rope_type, "default"),
        "attention_dropout": (text["attention_dropout"], 0),
    }
    if moe:
        wanted |= {
            "norm_topk_prob": (text["norm_topk_prob"], True),
            "decoder_sparse_step": (text["decoder_sparse_step"], 1),
            "mlp_only_layers": (list(text["mlp_only_layers"]), []),
            "attention_bias": (text["attention_bias"], False),
        }
    else:
        wanted |= {"use_sliding_window": (text["use_sliding_window"], False)}
    wrong = [
        f"{name}={value!r}, only {right!r} is supported" for name, (value, right) in wanted.items() if value != right
    ]
    if text["rope_theta"] != int(text["rope_theta"]):
        wrong.append(f"rope_theta={text['rope_theta']!r}, only whole numbers are supported")
    if wrong:
        raise ValueError("text_config: " + "; ".join(wrong))
    experts: dict[str, Any] = {}
    if moe:
        experts = {
            "num_moe_experts": text["num_experts"],
            "moe_router_topk": text["num_experts_per_tok"],
            "moe_ffn_hidden_size": text["moe_intermediate_size"],
        }
    return DecoderConfig(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        num_attention_heads=text["num_attention_heads"],
        num_query_groups=text["num_key_value_heads"],
        kv_channels=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        ffn_hidden_size=text["intermediate_size"],
        max_position_embeddings=text["max_position_embeddings"],
        rotary_base=int(text["rope_theta"]),
        qk_layernorm=moe,
        layernorm_epsilon=text["rms_norm_eps"],
        init_method_std=text["initializer_range"],
        share_embeddings_and_output_weights=text["tie_word_embeddings"],
        add_qkv_bias=not moe,
        vocab_size=text["vocab_size"],
        **experts,
    )


def _thinker_config(directory: Path) -> tuple[str, Any]:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory}: no config.json; give the directory of a Hugging Face model")
    values = json.loads(path.read_text())
    kind = values.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"{path}: model_type={kind!r}; this command knows {', '.join(_KINDS)}")
    thinker = Qwen3OmniMoeThinkerConfig if kind.startswith("qwen3") else Qwen2_5OmniThinkerConfig
    return kind, thinker(**(values if kind.endswith("_thinker") else values["thinker_config"]))


def _features(directory: Path) -> dict[str, Any]:
    from transformers import WhisperFeatureExtractor

    if not (directory / "preprocessor_config.json").is_file():
        raise ValueError(f"{directory}: no preprocessor_config.json, which says how audio becomes features")
    values = WhisperFeatureExtractor.from_pretrained(str(directory), local_files_only=True).to_dict()
    return {key: values[key] for key in _FEATURES}
