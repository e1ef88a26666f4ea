"""Builds the vLLM backend of a run's config, with existing servers or one that it starts."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.rollout import LOOPBACK, VllmConfig
from nemo_mapo.config.run import RolloutConfig, RunConfig
from nemo_mapo.data.tokenizer import SpecialTokens, load_tokenizer
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.hf.models import read_model
from nemo_mapo.processes import is_main_rank
from nemo_mapo.ranks import from_main_rank
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.rollout.vllm.fleet import Fleet
from nemo_mapo.rollout.vllm.model_directory import hears, write_model_directory
from nemo_mapo.rollout.vllm.process import MODEL_NAME, VllmProcess, free_port, serve_command, serve_environment
from nemo_mapo.rollout.vllm.requests import NativeAudio, PromptEmbeddings, WayIn
from nemo_mapo.rollout.vllm.server import VllmServer
from nemo_mapo.rollout.vllm.transfer import Nccl, WeightTransfer


def build_vllm(
    config: RolloutConfig,
    model_config: ModelConfig,
    policy: AudioLLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sample_rate: int,
    directory: Path,
) -> VllmRollout:
    """The backend; a server started for it loads while the rest of the run is set up.

    Raises:
        ValueError: vLLM cannot serve this policy, or a server is unsuitable.
        RolloutUnavailable: no server answers.
    """
    settings = config.vllm
    assert settings is not None, "the config demands it"
    directory = sync_dir(settings, directory)
    way_in: WayIn = PromptEmbeddings(policy, MODEL_NAME)
    if hears(model_config):
        audio_id = SpecialTokens.from_tokenizer(tokenizer).audio_id
        way_in = NativeAudio(MODEL_NAME, audio_id=audio_id, sample_rate=sample_rate)
    process = None
    if not settings.urls and is_main_rank():
        process = _launch(config, model_config, policy, tokenizer, directory)
    launched = from_main_rank(None if process is None else (process.url, process.key))
    key = os.environ.get(settings.api_key_variable) or None
    urls, key = ((launched[0],), launched[1]) if launched else (settings.urls, key)
    fleet = Fleet(
        [VllmServer(url, token=key, timeout_seconds=settings.timeout_seconds) for url in urls],
        way_in,
        settings,
        vocab_size=len(tokenizer),
        alarm=config.log_prob_alarm,
        process=process,
        transfer=_transfer(settings, policy) if settings.weight_sync == "nccl" and is_main_rank() else None,
    )
    if settings.urls and is_main_rank():
        fleet.wait_for_a_server()
    return VllmRollout(
        fleet,
        way_in,
        policy,
        tokenizer,
        config,
        model_config,
        prefix=read_model(Path(str(settings.original))).weights.prefix if hears(model_config) else "",
        sample_rate=sample_rate,
        directory=directory / "weights",
    )


def served(config: RunConfig) -> tuple[list[str], dict[str, str]]:
    """Command and environment of examples/serve_vllm.py; writes the model directory.

    Raises:
        ValueError: the run does not use vLLM, vLLM has no such decoder, or other machines would need no key.
    """
    vllm = config.rollout.vllm
    if vllm is None:
        raise ValueError("rollout.vllm is not set: add rollout=vllm, as for the trainer")
    key = os.environ.get(vllm.api_key_variable) or None
    if vllm.host not in LOOPBACK and key is None:
        raise ValueError(
            f"rollout.vllm.host={vllm.host} listens to other machines: set the key {vllm.api_key_variable} in the "
            "environment, the same for server and trainer"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    on_cpu = config.trainer.accelerator == "cpu"
    command = _command(
        sync_dir(vllm, Path(config.exp_manager.explicit_log_dir)),
        config.rollout,
        config.model,
        tokenizer,
        vocab_size=config.model.decoder.vocab_size or len(tokenizer),
        dtype=torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32,
        on_cpu=on_cpu,
        port=vllm.port,
    )
    return command, serve_environment(key=key, on_cpu=on_cpu)


def sync_dir(config: VllmConfig, run_directory: Path) -> Path:
    """The directory for model files, updates and logs."""
    return (run_directory / "vllm" if config.sync_dir is None else Path(config.sync_dir)).resolve()


def _transfer(settings: VllmConfig, policy: AudioLLM) -> WeightTransfer:
    if policy.device.type != "cuda":
        raise ValueError(
            f"rollout.vllm.weight_sync=nccl sends weights from a GPU to vLLM's, and the policy is on the "
            f"{policy.device.type}; set rollout.vllm.weight_sync=directory"
        )
    return WeightTransfer(
        Nccl(policy.device), bucket_bytes=settings.bucket_bytes, timeout_seconds=settings.timeout_seconds
    )


def _launch(
    config: RolloutConfig,
    model_config: ModelConfig,
    policy: AudioLLM,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> VllmProcess:
    port, on_cpu, dtype = free_port(), policy.device.type == "cpu", next(policy.parameters()).dtype
    command = _command(
        directory,
        config,
        model_config,
        tokenizer,
        vocab_size=policy.vocab_size,
        dtype=dtype,
        on_cpu=on_cpu,
        port=port,
    )
    return VllmProcess(command, port=port, log=directory / "vllm.log", on_cpu=on_cpu)


def _command(
    directory: Path,
    config: RolloutConfig,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    on_cpu: bool,
    port: int,
) -> list[str]:
    """Write the model directory into `directory`; the command that serves it."""
    settings, model = config.vllm, directory / "model"
    assert settings is not None
    write_model_directory(
        model, model_config, tokenizer, vocab_size=vocab_size, dtype=dtype, original=settings.original
    )
    return serve_command(
        settings,
        model,
        hears=hears(model_config),
        max_length=model_config.decoder.max_position_embeddings,
        batch_size=config.batch_size,
        dtype=dtype,
        on_cpu=on_cpu,
        port=port,
    )
