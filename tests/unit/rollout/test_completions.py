"""What becomes a sample of an engine outside of this process, and what does not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_mapo.rollout.completions import BadAnswer, Drawn, check_completions, completed
from nemo_mapo.rows import Prompt
from support.tiny import tiny_audio_llm

PROMPT = Prompt(id="a", token_ids=torch.tensor([12]))
WHOLE = Drawn(token_ids=(9, 1), sampling_log_probs=(-0.5, -1.0), stopped=True)


def check(*completions: Drawn) -> None:
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
def test_an_incomplete_completion_does_not_become_a_sample(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadAnswer, match=reason):
        check(replace(WHOLE, **change))


def test_there_is_a_completion_for_every_seed() -> None:
    check(WHOLE)
    for wrong in ([], [WHOLE, WHOLE]):
        with pytest.raises(BadAnswer, match=f"{len(wrong)} completions for 1 seeds"):
            check(*wrong)


def test_what_was_drawn_becomes_a_completion_without_its_stop_token_in_the_text() -> None:
    tiny = tiny_audio_llm()
    end = tiny.tokenizer.eos_token_id
    drawn = Drawn(token_ids=(12, end), sampling_log_probs=(-0.4, -0.5), stopped=True)
    completion = completed(drawn, PROMPT, tiny.tokenizer, weight_version=3)
    assert completion.token_ids.tolist() == [12, end] and len(completion) == 2
    assert completion.stopped and completion.weight_version == 3 and completion.log_probs is None
    torch.testing.assert_close(completion.sampling_log_probs, torch.tensor([-0.4, -0.5]))
    assert completion.text == tiny.tokenizer.decode([12])
    truncated = completed(replace(drawn, token_ids=(12, 9), stopped=False), PROMPT, tiny.tokenizer, weight_version=3)
    assert truncated.text == tiny.tokenizer.decode([12, 9])
