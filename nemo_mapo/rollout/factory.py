"""The rollout backend that a config names."""

import os

from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.run import RolloutConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.protocol import RolloutBackend


def build_backend(
    config: RolloutConfig, model: AudioLLM, tokenizer: PreTrainedTokenizerBase, *, sample_rate: int
) -> RolloutBackend:
    """Build the engine of `rollout.backend` for a policy.

    Raises:
        ValueError: the config does not fit the model, the servers are not what it says, or this machine has no
            TensorRT-LLM.
        RolloutUnavailable: no server answers.
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
    from nemo_mapo.rollout.client import ServerRollout

    assert config.server is not None, "the config demands it"
    backend = ServerRollout(
        config.server,
        tokenizer,
        sample_rate=sample_rate,
        token=os.environ.get(config.server.token_variable) or None,
    )
    backend.adapter.refuse(config.sampling)
    return backend
