"""The real TensorRT-LLM engine behind the backend, on a GPU of the NeMo container. Has not been run by us.

CUDA_VISIBLE_DEVICES=0 DISABLE_TORCH_DEVICE_SET=1 pytest tests/gpu/test_trtllm_engine.py
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_mapo.config.model import DecoderConfig
from nemo_mapo.config.rollout import TrtllmConfig
from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.rollout.trtllm.backend import TrtllmRollout
from nemo_mapo.rollout.trtllm.engine import TensorRTEngine
from nemo_mapo.rows import Completion, Prompt, Row
from nemo_mapo.training.signals import token_signals_in_parts
from support.tiny import (
    AUDIO,
    SAMPLE_RATE,
    TinyAudioLLM,
    tiny_model_config,
    tiny_prompts,
    tiny_tokenizer,
)

pytest.importorskip("tensorrt_llm.runtime", reason="needs TensorRT-LLM", exc_type=ImportError)
pytestmark = pytest.mark.gpu

GROUP = 4
SAMPLINGS = [
    SamplingConfig(temperature=0, max_new_tokens=24),
    SamplingConfig(temperature=1.2, top_k=20, top_p=0.95, max_new_tokens=24),
]
SAME_NATS = 0.05
"""Mean of |difference| in bfloat16, over kernels that add up otherwise."""
OTHER_NATS = 0.3


@pytest.fixture
def tiny() -> TinyAudioLLM:
    """A llama whose widths TensorRT-LLM's kernels take."""
    config = replace(
        tiny_model_config(tied=False, qk_layernorm=False),
        decoder=DecoderConfig(
            num_layers=2,
            hidden_size=256,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=64,
            ffn_hidden_size=512,
            max_position_embeddings=256,
            init_method_std=0.05,
            qk_layernorm=False,
            share_embeddings_and_output_weights=False,
            vocab_size=64,
        ),
    )
    tokenizer = tiny_tokenizer()
    model = AudioLLM(
        config,
        vocab_size=len(tokenizer),
        audio_token_id=tokenizer.get_vocab()[AUDIO],
        sample_rate=SAMPLE_RATE,
        params_dtype=torch.bfloat16,
    )
    return TinyAudioLLM(config=config, model=model.to("cuda"), tokenizer=tokenizer)


@pytest.fixture
def rollout(tiny: TinyAudioLLM, tmp_path: Path) -> Iterator[TrtllmRollout]:
    config = TrtllmConfig(trt_model_dir=str(tmp_path), max_prompt_embedding_table_size=256)
    engine = TensorRTEngine(tiny.model, config, batch_size=8, max_new_tokens=SAMPLINGS[0].max_new_tokens)
    yield TrtllmRollout(engine, tiny.model, tiny.tokenizer, config, batch_size=8)
    engine.unload()


def mismatch(tiny: TinyAudioLLM, prompts: list[Prompt], drawn: list[list[Completion]]) -> float:
    """Mean difference of a token's log-prob in the engine and in the policy, nats."""
    rows = [
        Row(prompt=prompt, token_ids=one.token_ids)
        for prompt, completions in zip(prompts, drawn, strict=True)
        for one in completions
    ]
    policy = token_signals_in_parts(tiny.model, rows, head_reduction=None, batching=MicroBatching(rows=4))
    stated = [one.log_probs for completions in drawn for one in completions if one.log_probs is not None]
    return float((torch.cat(stated) - torch.cat([one.log_probs for one in policy])).abs().mean())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "the paper's"])
def test_the_engine_hears_and_computes_what_the_policy_computes(
    tiny: TinyAudioLLM, rollout: TrtllmRollout, sampling: SamplingConfig
) -> None:
    prompts = tiny_prompts(tiny, num_prompts=5, without_audio=(2,))
    rollout.update_weights(0, ())
    drawn = rollout.generate(prompts, sampling, group_size=GROUP, seeds=torch.arange(5 * GROUP))
    assert mismatch(tiny, prompts, drawn) < SAME_NATS


@torch.no_grad()
def test_an_update_reaches_the_engine_loaded_or_not(tiny: TinyAudioLLM, rollout: TrtllmRollout) -> None:
    prompts = tiny_prompts(tiny, num_prompts=2)

    def generated() -> list[list[Completion]]:
        return rollout.generate(prompts, SAMPLINGS[0], group_size=1, seeds=torch.arange(2))

    rollout.update_weights(0, ())
    tiny.model.language_model.decoder.final_layernorm.weight.mul_(3.0)
    assert mismatch(tiny, prompts, generated()) > OTHER_NATS, "weights must differ enough to be told apart"
    rollout.update_weights(1, ())
    assert mismatch(tiny, prompts, generated()) < SAME_NATS
    rollout.release()
    rollout.update_weights(2, ())
    assert mismatch(tiny, prompts, generated()) < SAME_NATS
