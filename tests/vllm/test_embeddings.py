"""vLLM draws from prompt embeddings what the policy would draw itself."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.rollout.megatron import MegatronRollout
from nemo_mapo.rollout.scoring import Drawing
from nemo_mapo.rollout.vllm.backend import VllmRollout
from nemo_mapo.rows import Completion, Prompt, Row
from nemo_mapo.training.signals import token_signals_in_parts
from tests.vllm.serving import DECODERS, TOKENIZER, embedded_policy, launched, named_tensors, noise_prompts

pytestmark = pytest.mark.vllm

PAPER = SamplingConfig(temperature=1.2, top_k=50, top_p=0.99, repetition_penalty=1.1, max_new_tokens=60)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=60)
TOLERANCE_NATS = 1e-4
PROMPTS, GROUP = 16, 4


def seeds(prompts: int, group: int = GROUP) -> torch.Tensor:
    return torch.arange(prompts * group) + 2**40


def drawn_by_the_policy(
    policy: AudioLLM, prompts: list[Prompt], drawn: list[list[Completion]], sampling: SamplingConfig
) -> list[torch.Tensor]:
    rows = [
        Row(prompt=prompt, token_ids=one.token_ids)
        for prompt, completions in zip(prompts, drawn, strict=True)
        for one in completions
    ]
    signals = token_signals_in_parts(
        policy,
        rows,
        head_reduction=None,
        batching=MicroBatching(rows=16),
        drawing=Drawing.of(sampling, TOKENIZER, policy.vocab_size),
    )
    return [one.drawn_log_probs for one in signals if one.drawn_log_probs is not None]


def assert_draws_as_the_policy(served: VllmRollout, policy: AudioLLM, update: int) -> None:
    """After an update: greedy tokens are the Megatron backend's, log-probs under the paper's sampling the policy's."""
    served.update_weights(update, named_tensors(policy))
    many = noise_prompts(policy, 64)
    greedy = served.generate(many, GREEDY, group_size=1, seeds=seeds(64, 1))
    expected = MegatronRollout(policy, TOKENIZER, batch_size=64).generate(
        many, GREEDY, group_size=1, seeds=seeds(64, 1)
    )
    for one, other in zip(chain(*greedy), chain(*expected), strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert (one.stopped, one.text) == (other.stopped, other.text)
    prompts = noise_prompts(policy, PROMPTS, seed=1)
    sampled = served.generate(prompts, PAPER, group_size=GROUP, seeds=seeds(PROMPTS))
    assert {one.weight_version for one in chain(*greedy, *sampled)} == {update}
    assert sum(map(len, chain(*sampled))) > PROMPTS * GROUP * 20
    ours = drawn_by_the_policy(policy, prompts, sampled, PAPER)
    stated = [one.sampling_log_probs for one in chain(*sampled)]
    torch.testing.assert_close(stated, ours, rtol=0, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("update", range(4))
def test_after_every_update_it_draws_as_the_policy_does(policy: AudioLLM, shared: VllmRollout, update: int) -> None:
    policy.load_state_dict(embedded_policy(update).state_dict())
    assert_draws_as_the_policy(shared, policy, update)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_experts_and_biases_draw_as_the_policys_do_after_every_update(decoder: str, tmp_path: Path) -> None:
    config = DECODERS[decoder]
    policy = embedded_policy(0, config)
    with launched(policy, tmp_path, config) as served:
        for update in range(3):
            policy.load_state_dict(embedded_policy(update, config).state_dict())
            assert_draws_as_the_policy(served, policy, update)
