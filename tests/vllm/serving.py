"""Real vLLM servers for tests, in vLLM's own environment, and policies that they serve."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_mapo.config.model import ConvPerceptionConfig, DecoderConfig, ModelConfig
from nemo_mapo.config.rollout import VllmConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.embedded.tokenizer import build_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.platform import initialize_parallel, install_cpu_host
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.rollout.vllm.build import build_vllm
from nemo_mapo.rows import Prompt
from nemo_mapo.training.build import build_audio_llm

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("NEMO_MAPO_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
"""Interpreter with vLLM: that of `make vllm`, unless the environment names another."""
SAMPLE_RATE = 16000
SERVER_SECONDS = 1800.0
"""A loaded machine takes long to start a server."""
SHARP_STD = 0.1
"""Of the random weights: logits far enough apart that rounding does not decide an argmax."""
EMBEDDED = ModelConfig(
    perception=ConvPerceptionConfig(channels=32),
    decoder=DecoderConfig(num_layers=6, init_method_std=SHARP_STD),
    target_layers=(5,),
)
"""About the decoder of the embedded run, with layers for two stages; vLLM's attention on a CPU wants heads so wide."""
DECODERS = {
    "experts": replace(EMBEDDED, decoder=replace(EMBEDDED.decoder, num_moe_experts=4, moe_ffn_hidden_size=64)),
    "biases": replace(EMBEDDED, decoder=replace(EMBEDDED.decoder, qk_layernorm=False, add_qkv_bias=True)),
}
"""The same as vLLM serves it as Qwen3-MoE and as Qwen2.5."""
TOKENIZER = build_tokenizer()


def embedded_policy(seed: int, config: ModelConfig = EMBEDDED) -> AudioLLM:
    """Random weights and biases, the same for the same seed."""
    install_cpu_host()
    initialize_parallel()
    policy = build_audio_llm(
        config,
        vocab_size=len(TOKENIZER),
        special=SpecialTokens.from_tokenizer(TOKENIZER),
        sample_rate=SAMPLE_RATE,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if name.endswith("linear_qkv.bias"):
            torch.nn.init.normal_(parameter, std=SHARP_STD, generator=generator)
    return policy


def noise_prompts(policy: AudioLLM, count: int, *, seed: int = 0) -> list[Prompt]:
    """Prompts of random words about clips of noise of unequal lengths; every fourth has no clip."""
    generator = torch.Generator().manual_seed(seed)
    return [_noise_prompt(policy, number, generator) for number in range(count)]


def _noise_prompt(policy: AudioLLM, number: int, generator: torch.Generator) -> Prompt:
    words = torch.randint(20, len(TOKENIZER) - 2, (5 + number % 7,), generator=generator).tolist()
    if number % 4 == 3:
        return Prompt(id=str(number), token_ids=torch.tensor(words))
    return heard_prompt(policy, number, torch.randn(4000 + 900 * (number % 5), generator=generator) * 0.3, words)


def heard_prompt(policy: AudioLLM, number: int, clip: Tensor, words: list[int]) -> Prompt:
    """A prompt of these words about a clip."""
    special = SpecialTokens.from_tokenizer(TOKENIZER)
    placeholders = [special.audio_id] * policy.num_audio_tokens(len(clip))
    ids = [special.audio_start_id, *placeholders, special.audio_end_id, *words]
    return Prompt(id=str(number), token_ids=torch.tensor(ids), clips=(clip,))


def rollout_config(sync_dir: Path, sampling: SamplingConfig | None = None, **changes: Any) -> RolloutConfig:
    """A server that is started here, unless `changes` name one."""
    vllm = VllmConfig(
        **{
            "python": str(PYTHON),
            "sync_dir": str(sync_dir),
            "start_seconds": SERVER_SECONDS,
            "timeout_seconds": 120.0,
            "pause_seconds": 0.05,
            "max_attempts": 3,
            **changes,
        }
    )
    return RolloutConfig(backend="vllm", batch_size=64, sampling=sampling or SamplingConfig(), vllm=vllm)


@contextmanager
def launched(policy: AudioLLM, sync_dir: Path, config: ModelConfig = EMBEDDED) -> Iterator[VllmRollout]:
    """A backend with a server of its own, which is stopped at the end."""
    backend = build_vllm(
        rollout_config(sync_dir), config, policy, TOKENIZER, sample_rate=SAMPLE_RATE, directory=sync_dir
    )
    try:
        backend.fleet.wait_for_a_server()
        yield backend
    finally:
        backend.close()


def named_tensors(policy: AudioLLM) -> list[tuple[str, Tensor]]:
    """All weights."""
    return [(name, value) for name, value in policy.state_dict().items() if isinstance(value, Tensor)]


MODEL = (
    "model.decoder.num_layers=6",
    "model.decoder.hidden_size=192",
    "model.decoder.ffn_hidden_size=512",
    "model.decoder.num_attention_heads=6",
    "model.decoder.kv_channels=32",
    "model.target_layers=[5]",
)
"""A run whose decoder the shared server has; they stand after those of a tiny run."""


def asking(backend: VllmRollout, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a run that asks that backend's server."""
    process = backend.fleet._process
    assert process is not None
    monkeypatch.setenv("VLLM_API_KEY", process.key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return [
        *MODEL,
        "rollout=vllm",
        "rollout.sampling.max_new_tokens=8",
        f"rollout.vllm.urls=[{process.url}]",
        "rollout.vllm.max_attempts=3",
        "rollout.vllm.pause_seconds=0.05",
    ]


def launching(*overrides: str) -> list[str]:
    """Overrides of a run that starts a server of its own."""
    return [
        *MODEL,
        "rollout=vllm",
        "rollout.sampling.max_new_tokens=8",
        f"rollout.vllm.python={PYTHON}",
        "rollout.vllm.max_attempts=3",
        "rollout.vllm.pause_seconds=0.05",
        *overrides,
    ]
