"""The files from which vLLM builds the served model, without weights, which come with the first update."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import ModelConfig, QwenOmniPerceptionConfig
from nemo_mapo.models.hf.config import LLAMA3_ROPE
from nemo_mapo.models.hf.files import side_files


def hears(config: ModelConfig) -> bool:
    """Whether vLLM serves the model with its audio encoder; otherwise it gets the prompts' embeddings.

    An encoder followed by our own projector belongs to an assembled audio LLM, which vLLM does not know.
    """
    return isinstance(config.perception, QwenOmniPerceptionConfig) and config.perception.projector is None


def write_model_directory(
    directory: Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    original: str | None,
) -> None:
    """Write config.json, tokenizer and, for a model that vLLM serves with its encoder, the original's side files.

    Args:
        directory: created or overwritten.
        config: of the policy.
        tokenizer: the policy's.
        vocab_size: rows of the policy's embedding.
        dtype: of the weights.
        original: the Hugging Face directory of a Qwen Omni model, or what examples/import_hf.py keeps of it.

    Raises:
        ValueError: vLLM has no decoder like the policy's, or the original is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if hears(config):
        if original is None or not Path(original, "config.json").is_file():
            raise ValueError(
                f"rollout.vllm.original={original}: name the Hugging Face directory of the model, or OUTPUT/original "
                "of examples/import_hf.py; vLLM serves the model with its audio encoder and needs its processor"
            )
        for path in side_files(Path(original)):
            shutil.copy2(path, directory / path.name)
        return
    tokenizer.save_pretrained(str(directory))
    (directory / "config.json").write_text(json.dumps(decoder_config(config, vocab_size, dtype), indent=2))


def decoder_config(config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the decoder alone, as the Hugging Face model that computes the same.

    Raises:
        ValueError: naming the settings that no such model has together.
    """
    decoder = config.decoder
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.ffn_hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_query_groups,
        "head_dim": decoder.kv_channels,
        "max_position_embeddings": decoder.max_position_embeddings,
        "rope_theta": float(decoder.rotary_base),
        "rms_norm_eps": decoder.layernorm_epsilon,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if decoder.rope_scaling is not None:
        fixed = LLAMA3_ROPE if decoder.rope_scaling == "llama3" else {}
        values["rope_scaling"] = {"rope_type": decoder.rope_scaling, "factor": decoder.rope_scaling_factor, **fixed}
    if decoder.num_moe_experts is not None:
        values |= {
            "num_experts": decoder.num_moe_experts,
            "num_experts_per_tok": decoder.moe_router_topk,
            "moe_intermediate_size": decoder.moe_ffn_hidden_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    kinds = {
        (True, False, False): ("qwen3", "Qwen3ForCausalLM"),
        (True, False, True): ("qwen3_moe", "Qwen3MoeForCausalLM"),
        (False, True, False): ("qwen2", "Qwen2ForCausalLM"),
        (False, False, False): ("llama", "LlamaForCausalLM"),
    }
    options = (decoder.qk_layernorm, decoder.add_qkv_bias, decoder.num_moe_experts is not None)
    square = decoder.kv_channels * decoder.num_attention_heads == decoder.hidden_size
    if options not in kinds or (options == (False, True, False) and not square):
        raise ValueError(
            f"rollout.backend=vllm: no decoder of vLLM has model.decoder.qk_layernorm={decoder.qk_layernorm}, "
            f"add_qkv_bias={decoder.add_qkv_bias}, num_moe_experts={decoder.num_moe_experts} and "
            f"kv_channels={decoder.kv_channels} together; change them, or use rollout.backend=megatron"
        )
    kind, architecture = kinds[options]
    return {"model_type": kind, "architectures": [architecture], **values}
