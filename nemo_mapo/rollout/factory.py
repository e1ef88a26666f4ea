"""Builds the rollout backend that a config names."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.run import RolloutConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import RolloutBackend


def build_backend(
    config: RolloutConfig,
    model_config: ModelConfig,
    model: AudioLLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sample_rate: int,
    directory: Path,
) -> RolloutBackend:
    """Build the engine of `rollout.backend` for a policy; it writes into `directory` unless the config says otherwise.

    Raises:
        ValueError: config and model do not match, the servers differ from the config, or this machine has no
            TensorRT-LLM.
        RolloutUnavailable: no vLLM server answers.
    """
    if config.backend == "megatron":
        return MegatronRollout(model, tokenizer, batch_size=config.batch_size)
    if config.backend == "trtllm":
        from nemo_mapo.rollout.trtllm.backend import TrtllmRollout
        from nemo_mapo.rollout.trtllm.engine import TensorRTEngine

        assert config.trtllm is not None, "the config demands it"
        engine = TensorRTEngine(
            model, config.trtllm, batch_size=config.batch_size, max_new_tokens=config.sampling.max_new_tokens
        )
        return TrtllmRollout(engine, model, tokenizer, config.trtllm, batch_size=config.batch_size)
    from nemo_mapo.rollout.vllm.build import build_vllm

    return build_vllm(config, model_config, model, tokenizer, sample_rate=sample_rate, directory=directory)
