"""What the ranks of the TensorRT-LLM tests run; apart, because a rank can import this file by its name."""

import torch

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.trtllm.backend import TrtllmRollout
from nemo_mapo.rows import Completion
from support.layouts import Layout, build_actor
from support.tiny import TinyAudioLLM, tiny_prompts, tiny_tokenizer
from support.trtllm_runtime import MegatronRuntime

GROUP = 3
PROMPTS = 4


def generate(layout: Layout, base: ModelConfig, start: str, sampling: SamplingConfig) -> list[Completion]:
    """On every rank: completions of an engine that is cut as the policy is."""
    policy = build_actor(layout, base, start).policy
    config = TrtllmConfig(max_prompt_embedding_table_size=40)
    engine = MegatronRuntime(
        layout.config(base),
        vocab_size=policy.vocab_size,
        max_batch_size=2 * GROUP,
        max_prompt_embedding_table_size=config.max_prompt_embedding_table_size,
    )
    tiny = TinyAudioLLM(config=base, model=policy, tokenizer=tiny_tokenizer())
    rollout = TrtllmRollout(engine, policy, tiny.tokenizer, config, batch_size=2 * GROUP)
    rollout.update_weights(1, ())
    prompts = tiny_prompts(tiny, num_prompts=PROMPTS, without_audio=(2,))
    groups = rollout.generate(prompts, sampling, group_size=GROUP, seeds=torch.arange(PROMPTS * GROUP))
    return [one for group in groups for one in group]
