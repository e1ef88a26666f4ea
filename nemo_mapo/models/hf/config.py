"""A decoder's config.json, from transformers 4 or 5, as our decoder's; what that does not compute is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

from nemo_mapo.config.model import DecoderConfig, RopeScaling

SUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "shared_expert_intermediate_size": (None, 0),
    "use_qk_norm": (True,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
"""Fields that change the function, and the values that Megatron's decoder computes."""
NEUTRAL: Final = frozenset(
    {
        "use_cache",
        "torch_dtype",
        "output_router_logits",
        "router_aux_loss_coef",
        "max_window_layers",
        "is_llama_config",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
    }
)
"""Fields, besides those of every config of transformers, that do not change the function."""
_ROPE_FIELDS: Final = ("rope_theta", "rope_scaling", "rope_parameters")
_FORMER_NAMES: Final = {"num_local_experts": "num_experts"}
_MULTIMODAL_ROPE: Final = {"mrope_section", "mrope_interleaved", "interleaved"}
LLAMA3_ROPE: Final = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Values that Megatron's rotary embedding assumes."""


class Rope(NamedTuple):
    """A rotary embedding that Megatron computes as transformers does."""

    base: int
    scaling: RopeScaling | None
    factor: float


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file; ValueError naming the file if there is none."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name}; give the directory of a Hugging Face model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def decoder_config(
    stated: Mapping[str, Any], config_class: Any, *, qk_layernorm: bool, add_qkv_bias: bool, multimodal: bool = False
) -> DecoderConfig:
    """The decoder that a text config describes.

    Args:
        stated: the fields in the file.
        config_class: transformers' class, which has the defaults of all other fields.
        qk_layernorm: whether the family normalises queries and keys.
        add_qkv_bias: whether the family has biases on queries, keys and values.
        multimodal: whether the rotary embedding has a row of positions for each modality; they are equal for text and
            audio, and then it is the plain one.

    Raises:
        ValueError: naming every field that our decoder does not support or that is not known.
    """
    stated = _in_names_of_transformers_4(stated)
    rope_class = {name: value for name, value in stated.items() if name not in _ROPE_FIELDS}
    values = _in_names_of_transformers_4(config_class(**rope_class).to_dict())
    problems = _unsupported(stated, values)
    rope, wrong = _rope(stated, default_base=_default_base(values), multimodal=multimodal)
    if problems + wrong:
        raise ValueError("; ".join(problems + wrong))
    experts: dict[str, Any] = {}
    if "num_experts" in values:
        experts = {
            "num_moe_experts": values["num_experts"],
            "moe_router_topk": values["num_experts_per_tok"],
            "moe_ffn_hidden_size": values["moe_intermediate_size"],
        }
    return DecoderConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        num_attention_heads=values["num_attention_heads"],
        num_query_groups=values["num_key_value_heads"],
        kv_channels=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        ffn_hidden_size=values["intermediate_size"],
        max_position_embeddings=values["max_position_embeddings"],
        rotary_base=rope.base,
        rope_scaling=rope.scaling,
        rope_scaling_factor=rope.factor,
        qk_layernorm=qk_layernorm,
        layernorm_epsilon=values["rms_norm_eps"],
        init_method_std=values["initializer_range"],
        share_embeddings_and_output_weights=values.get("tie_word_embeddings", False),
        add_qkv_bias=add_qkv_bias,
        vocab_size=values["vocab_size"],
        **experts,
    )


def _in_names_of_transformers_4(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that transformers 5 renamed, under their former names."""
    return {_FORMER_NAMES.get(name, name): value for name, value in values.items()}


def _unsupported(stated: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What is wrong with fields other than the rotary embedding's; `values` has the class's defaults."""
    from transformers import PretrainedConfig

    # Transformers 5 moves fields that it knows by another name out of the class's values.
    either = {**stated, **values}
    wrong = [
        f"{name}={either[name]!r}, only {' or '.join(map(repr, right))} is supported"
        for name, right in SUPPORTED.items()
        if name in either and either[name] not in right
    ]
    layer_types = set(values.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        wrong.append(f"layer_types has {sorted(layer_types)}, only 'full_attention' is supported")
    read = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "head_dim", "layer_types", "vocab_size"}
    read |= {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"}
    read |= {"max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings"}
    known = read | SUPPORTED.keys() | NEUTRAL | set(_ROPE_FIELDS) | PretrainedConfig().to_dict().keys()
    # Names of files, and of tokens, which the tokenizer has.
    left = [name for name in stated.keys() - known if not name.startswith("_") and not name.endswith("_token_id")]
    unknown = [f"{name}={stated[name]!r} is not known, and may change the function" for name in left]
    return wrong + sorted(unknown)


def _default_base(values: Mapping[str, Any]) -> float:
    """The rotary base of a class: a field of its own in transformers 4, one of the rope's parameters in 5."""
    base: float = values["rope_theta"] if "rope_theta" in values else values["rope_parameters"]["rope_theta"]
    return base


def _rope(stated: Mapping[str, Any], *, default_base: float, multimodal: bool) -> tuple[Rope, list[str]]:
    """The rotary embedding, in transformers 4's fields, transformers 5's, or both; and what is wrong with it."""
    parameters: dict[str, Any] = {}
    wrong: list[str] = []
    theta = stated.get("rope_theta")
    for fields in (
        {} if theta is None else {"rope_theta": theta},
        stated.get("rope_scaling") or {},
        stated.get("rope_parameters") or {},
    ):
        both = [name for name in fields.keys() & parameters.keys() if fields[name] != parameters[name]]
        wrong += [f"{name}: {parameters[name]!r} and {fields[name]!r} are both stated" for name in sorted(both)]
        parameters |= fields
    base = parameters.pop("rope_theta", default_base)
    kind, old_kind = parameters.pop("rope_type", None), parameters.pop("type", None)
    if multimodal and old_kind == "mrope":
        old_kind = "default"
    if kind is not None and old_kind is not None and kind != old_kind:
        wrong.append(f"rope_type={kind!r} and type={old_kind!r} are both stated")
    kind = kind or old_kind or "default"
    if not isinstance(base, int | float) or base != int(base) or base <= 0:
        wrong.append(f"rope_theta={base!r}, only whole numbers above 0 are supported")
        base = 1
    factor = parameters.pop("factor", 1.0) if kind != "default" else 1.0
    fixed: dict[str, Any] = {"partial_rotary_factor": 1} | (LLAMA3_ROPE if kind == "llama3" else {})
    for name, right in fixed.items():
        required = kind == "llama3" and name in LLAMA3_ROPE
        value = parameters.pop(name, None if required else right)
        if value != right:
            wrong.append(f"rope {name}={value!r}, only {right} is supported")
    if kind not in ("default", "linear", "llama3") or (multimodal and kind != "default"):
        taken = "'default' is" if multimodal else "'default', 'linear' and 'llama3' are"
        wrong.append(f"rope_type={kind!r}, only {taken} supported")
    else:
        left = parameters.keys() - (_MULTIMODAL_ROPE if multimodal else set())
        wrong += [f"rope {name}={parameters[name]!r} is not known" for name in sorted(left)]
    scaling = next((known for known in get_args(RopeScaling) if known == kind), None)
    return Rope(int(base), scaling, float(factor)), wrong
