"""Builds the audio LLM that a config describes."""

import torch

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.ranks import device


def build_audio_llm(
    config: ModelConfig,
    *,
    vocab_size: int,
    special: SpecialTokens,
    sample_rate: int,
    seed: int,
    params_dtype: torch.dtype = torch.float32,
) -> AudioLLM:
    """Build with weights drawn from `seed`, whatever the state of the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AudioLLM(
            config,
            vocab_size=vocab_size,
            audio_token_id=special.audio_id,
            sample_rate=sample_rate,
            params_dtype=params_dtype,
        )
    built: AudioLLM = model.to(device())
    return built
