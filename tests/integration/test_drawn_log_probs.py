"""The trainer's own pass gives the log-probs of the distribution that an engine draws from, in every layout of rows."""

import pytest
import torch

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.scoring import Drawing
from nemo_mapo.rows import Row
from nemo_mapo.training.signals import token_signals_in_parts
from support.tiny import tiny_audio_llm, tiny_prompts

pytestmark = pytest.mark.integration

SAMPLINGS = {
    "plain": SamplingConfig(max_new_tokens=12),
    "the paper's": SamplingConfig(temperature=1.2, top_k=10, top_p=0.9, max_new_tokens=12),
    "penalty and minimum": SamplingConfig(repetition_penalty=1.3, min_new_tokens=4, max_new_tokens=12),
}
LAYOUTS = {
    "padded": MicroBatching(rows=5),
    "packed": MicroBatching(rows=5, packed_tokens=128),
    "shared prompts": MicroBatching(rows=5, packed_tokens=128, shared_prompts=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_they_are_those_of_the_sampler(name: str, layout: str) -> None:
    tiny, sampling = tiny_audio_llm(), SAMPLINGS[name]
    prompts = tiny_prompts(tiny, num_prompts=4, without_audio=(2,))
    engine = MegatronRollout(tiny.model, tiny.tokenizer, batch_size=16)
    drawn = engine.generate(prompts, sampling, group_size=3, seeds=torch.arange(12))
    rows = [
        Row(prompt=prompt, token_ids=one.token_ids)
        for prompt, completions in zip(prompts, drawn, strict=True)
        for one in completions
    ]
    signals = token_signals_in_parts(
        tiny.model,
        rows,
        head_reduction=None,
        batching=LAYOUTS[layout],
        drawing=Drawing.of(sampling, tiny.tokenizer, tiny.model.vocab_size),
    )
    expected = [one.sampling_log_probs for completions in drawn for one in completions]
    torch.testing.assert_close([one.drawn_log_probs for one in signals], expected, rtol=1e-4, atol=1e-5)
