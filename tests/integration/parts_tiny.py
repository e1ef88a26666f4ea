"""A tiny Whisper and a tiny chat model, as Hugging Face directories that examples/assemble.py takes."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.data.tokenizer import (
    ASSISTANT,
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    END,
    PAD,
    USER,
    SpecialTokens,
    load_tokenizer,
)
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.training.build import build_audio_llm
from nemo_mapo.training.checkpoint import load_checkpoint

RATE = 16000
SPARE_ROWS = 1
"""Of the decoder's vocabulary beyond its tokenizer: one of the new tokens finds a row, the others need more."""
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """The words of the synthetic corpus, the tokens of a chat model, and none of audio."""
    text = build_tokenizer().backend_tokenizer.to_str()
    names = {PAD: "<|endoftext|>", END: "<|im_end|>", USER: "<|im_start|>", ASSISTANT: "<|file|>"}
    names |= {AUDIO_START: "<|extra_0|>", AUDIO: "<|extra_1|>", AUDIO_END: "<|extra_2|>"}
    for ours, theirs in names.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    # As in public chat models: the end of a document, and no padding of its own.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(directory: Path, **changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers with tied embeddings; `changes` are of its config."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": len(tokenizer) + SPARE_ROWS,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.2,
                "tie_word_embeddings": True,
                **changes,
            }
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.eval()


def save_whisper(directory: Path) -> WhisperForConditionalGeneration:
    """A Whisper of one layer, with dropout that training must not see."""
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=64,
            num_mel_bins=16,
            d_model=24,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            dropout=0.1,
            init_std=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    )
    model.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=16).save_pretrained(directory)
    return model.eval()


def load_policy(policy: Path, checkpoint: Path) -> AudioLLM:
    """A checkpoint as the model that stands in `conf` beside it."""
    values = yaml.safe_load((policy / "conf" / "model" / "imported.yaml").read_text())
    config = TypeAdapter(ModelConfig).validate_python({name: values[name] for name in ("perception", "decoder")})
    tokenizer = load_tokenizer(policy / "tokenizer")
    model = build_audio_llm(
        config,
        vocab_size=len(tokenizer),
        special=SpecialTokens.from_tokenizer(tokenizer),
        sample_rate=RATE,
        seed=99,
    )
    load_checkpoint(checkpoint, model)
    return model.eval()
