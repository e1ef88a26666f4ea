"""Which model a Hugging Face directory holds, according to its config.json."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.hf.config import decoder_config, read_json
from nemo_mapo.models.hf.weights import WeightMap
from nemo_mapo.models.qwen_omni.config import KINDS, read_thinker
from nemo_mapo.models.qwen_omni.weights import ENCODER_RULES, LEFT_ASIDE

_ANY_RATE = 16000
"""A decoder alone reads no audio, so the rate does not matter."""


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """The parts of a policy that a directory holds."""

    config: ModelConfig
    """Perception (a model's own) and decoder; everything else has its default."""
    weights: WeightMap
    has_perception: bool
    """False for a text LLM, which is a decoder alone."""
    audio_token_id: int
    sample_rate: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Prefixes of our tensors that the directory provides."""
        return ("perception.", "language_model.") if self.has_perception else ("language_model.",)

    def with_vocabulary(self, rows: int) -> "HfModel":
        """The same model with so many rows in its vocabulary."""
        decoder = replace(self.config.decoder, vocab_size=rows)
        return replace(self, config=replace(self.config, decoder=decoder))


class DecoderFamily(NamedTuple):
    """A family of text LLMs: `DecoderFamily("Qwen2Config", add_qkv_bias=True)`."""

    config_class: str
    """Class of transformers with the defaults of what a config.json leaves out."""
    qk_layernorm: bool = False
    """Whether queries and keys are normalised per head."""
    add_qkv_bias: bool = False
    """Whether queries, keys and values have biases."""


DECODERS: Final[dict[str, DecoderFamily]] = {
    "llama": DecoderFamily("LlamaConfig"),
    "qwen2": DecoderFamily("Qwen2Config", add_qkv_bias=True),
    "qwen3": DecoderFamily("Qwen3Config", qk_layernorm=True),
    "qwen3_moe": DecoderFamily("Qwen3MoeConfig", qk_layernorm=True),
}
"""Text LLMs by the model_type of their config.json; a package may add its own."""


def read_model(directory: Path) -> HfModel:
    """Read config.json, and the audio features' config if the model takes audio.

    Raises:
        ValueError: the kind of model is not supported, or an option that our decoder does not have, with its value.
    """
    path = directory / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    if kind in DECODERS:
        return _text_model(path, values)
    if kind not in KINDS:
        raise ValueError(f"{path}: model_type={kind!r}; this command knows {', '.join((*DECODERS, *KINDS))}")
    thinker = read_thinker(directory, values)
    return HfModel(
        config=thinker.config,
        weights=WeightMap(thinker.config.decoder, rules=ENCODER_RULES, prefix=thinker.prefix, left_aside=LEFT_ASIDE),
        has_perception=True,
        audio_token_id=thinker.audio_token_id,
        sample_rate=thinker.sample_rate,
    )


def _text_model(path: Path, values: dict[str, object]) -> HfModel:
    import transformers

    family = DECODERS[str(values["model_type"])]
    try:
        decoder = decoder_config(
            values,
            getattr(transformers, family.config_class),
            qk_layernorm=family.qk_layernorm,
            add_qkv_bias=family.add_qkv_bias,
        )
        config = ModelConfig(decoder=decoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return HfModel(
        config=config, weights=WeightMap(decoder), has_perception=False, audio_token_id=0, sample_rate=_ANY_RATE
    )
