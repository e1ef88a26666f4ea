"""Tiny text LLMs with random weights, as Hugging Face directories; prompts and parity as for Qwen Omni's thinkers."""

from pathlib import Path
from typing import Any

import torch
from integration.qwen_omni_tiny import SPREAD, VOCAB_SIZE, TinyHf
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from support.tiny import tiny_tokenizer

MAX_POSITIONS = 1024
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama 3": LlamaConfig(**SHAPE, head_dim=16, rope_scaling=LLAMA3, rms_norm_eps=1e-5),
    "llama, linear rope, one key head, tied": LlamaConfig(
        **SHAPE | {"num_key_value_heads": 1},
        rope_scaling={"rope_type": "linear", "factor": 4.0},
        tie_word_embeddings=True,
    ),
    "qwen 2": Qwen2Config(**SHAPE | {"rope_theta": 1000000.0}, tie_word_embeddings=True),
    "qwen 3": Qwen3Config(**SHAPE | {"num_key_value_heads": 4}, head_dim=16),
    "qwen 3 with experts": Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
    ),
}
"""Between them every layout of heads, norms, biases, head and rotary embedding."""
SCALED = ("llama 3", "llama, linear rope, one key head, tied")
"""Those whose rotary embedding is scaled."""


def save_tiny_decoder(directory: Path, config: str | PretrainedConfig, *, dtype: torch.dtype = torch.float32) -> TinyHf:
    """Make the model of a config (or of the one of that name) and save it in several shards, with its tokenizer."""
    config = CONFIGS[config] if isinstance(config, str) else config
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * SPREAD
        parameter.data = (1 + drawn if "norm" in parameter_name else drawn).to(dtype)
    model.tie_weights()
    model.save_pretrained(directory, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(str(directory))
    return TinyHf(family=config.model_type, directory=directory, thinker=model.eval())
