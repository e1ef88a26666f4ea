"""What becomes a sample of an engine outside of this process, and what does not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_mapo.rollout.completions import BadAnswer, Completion, as_rollouts, check_completions
from nemo_mapo.testing.tiny import PAD, tiny_audio_llm, tiny_prompt_batch

WHOLE = Completion(token_ids=(9, 1), sampling_log_probs=(-0.5, -1.0), stopped=True)


def check(*completions: Completion) -> None:
    check_completions(completions, count=1, max_tokens=3, vocab_size=40)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": (), "sampling_log_probs": ()}, "a completion is empty"),
        ({"sampling_log_probs": (-0.5,)}, "a completion of 2 tokens has 1 log-probs"),
        ({"token_ids": (9, 40)}, "a token id is not one of the 40"),
        ({"token_ids": (9, -1)}, "a token id is not one of the 40"),
        ({"sampling_log_probs": (-0.5, float("nan"))}, "a log-prob is not finite"),
        ({"sampling_log_probs": (-0.5, -float("inf"))}, "a log-prob is not finite"),
        ({"stopped": False}, "ended at the length limit, which is 3"),
    ],
)
def test_what_is_no_whole_completion_is_no_sample(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadAnswer, match=reason):
        check(replace(WHOLE, **change))


def test_there_is_a_completion_for_every_seed() -> None:
    check(WHOLE)
    for wrong in ([], [WHOLE, WHOLE]):
        with pytest.raises(BadAnswer, match=f"{len(wrong)} completions for 1 seeds"):
            check(*wrong)


def test_completions_of_unequal_length_become_a_padded_batch() -> None:
    tiny = tiny_audio_llm()
    prompts = tiny_prompt_batch(tiny, num_prompts=2)
    longer = Completion(token_ids=(9, 10, 11), sampling_log_probs=(-0.1, -0.2, -0.3), stopped=False)
    end = tiny.tokenizer.eos_token_id
    ended = Completion(token_ids=(12, end), sampling_log_probs=(-0.4, -0.5), stopped=True)
    rollouts = as_rollouts(prompts, [longer, ended], tiny.tokenizer, group_size=1, weight_version=3)
    assert rollouts.completions.tolist() == [[9, 10, 11], [12, end, tiny.token_id(PAD)]]
    assert rollouts.completion_lengths.tolist() == [3, 2]
    assert rollouts.finish_reasons == ("length", "stop") and rollouts.weight_version == 3
    torch.testing.assert_close(rollouts.sampling_log_probs, torch.tensor([[-0.1, -0.2, -0.3], [-0.4, -0.5, 0.0]]))
    assert rollouts.log_probs is None
    assert rollouts.texts[1] == tiny.tokenizer.decode([12])
