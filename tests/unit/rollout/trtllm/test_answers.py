"""Completions out of TensorRT-LLM's rows, and rows that are none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemo_mapo.rollout.completions import BadAnswer, Drawn
from nemo_mapo.rollout.trtllm.answers import unpack

VOCAB = 50
STOP = 3
NONE = -42
PROMPTS = [torch.tensor([11, 60, 61], dtype=torch.int32), torch.tensor([12], dtype=torch.int32)]


def answer() -> dict[str, Tensor]:
    """The first completion stops after two tokens, the second runs to the limit of three."""
    return {
        "output_ids": torch.tensor([[[11, 60, 61, 20, STOP, NONE]], [[12, 21, 22, 23, NONE, NONE]]], dtype=torch.int32),
        "sequence_lengths": torch.tensor([[5], [4]], dtype=torch.int32),
        "log_probs": torch.tensor([[[0.0, 0.0, 0.0, -1.0, -2.0, 9.0]], [[0.0, -3.0, -4.0, -5.0, 9.0, 9.0]]]),
    }


def unpacked(output: dict[str, Tensor]) -> list[Drawn]:
    return unpack(output, PROMPTS, vocab_size=VOCAB, stop_ids=[STOP], max_new_tokens=3)


def test_completions_stand_behind_prompts_of_unequal_length():
    assert unpacked(answer()) == [
        Drawn(token_ids=(20, STOP), sampling_log_probs=(-1.0, -2.0), stopped=True),
        Drawn(token_ids=(21, 22, 23), sampling_log_probs=(-3.0, -4.0, -5.0), stopped=False),
    ]


def other_prompt(output: dict[str, Tensor]) -> None:
    output["output_ids"][0, 0, 1] = 62


def empty(output: dict[str, Tensor]) -> None:
    output["sequence_lengths"][0, 0] = 3


def shorter_than_its_prompt(output: dict[str, Tensor]) -> None:
    output["sequence_lengths"][0, 0] = 1


def longer_than_the_row(output: dict[str, Tensor]) -> None:
    output["sequence_lengths"][1, 0] = 9


def beyond_the_limit(output: dict[str, Tensor]) -> None:
    output["output_ids"][1, 0, 4], output["sequence_lengths"][1, 0] = 24, 5


def beyond_the_vocabulary(output: dict[str, Tensor]) -> None:
    output["output_ids"][1, 0, 2] = VOCAB


def padding_inside(output: dict[str, Tensor]) -> None:
    output["output_ids"][1, 0, 2] = NONE


def on_after_a_stop(output: dict[str, Tensor]) -> None:
    output["output_ids"][1, 0, 2] = STOP


def cut_off(output: dict[str, Tensor]) -> None:
    output["sequence_lengths"][1, 0] = 3


def not_finite(output: dict[str, Tensor]) -> None:
    output["log_probs"][1, 0, 2] = torch.nan


def without_log_probs(output: dict[str, Tensor]) -> None:
    del output["log_probs"]


def rows_missing(output: dict[str, Tensor]) -> None:
    output["sequence_lengths"] = output["sequence_lengths"][:1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (other_prompt, "row 0 begins with a prompt other than"),
        (empty, "a completion is empty"),
        (shorter_than_its_prompt, "row 0 has 0 tokens, its length says -2"),
        (longer_than_the_row, "row 1 has 5 tokens, its length says 8"),
        (beyond_the_limit, "4 tokens ended at the length limit, which is 3"),
        (beyond_the_vocabulary, "a token id is not one of the 50"),
        (padding_inside, "a token id is not one of the 50"),
        (on_after_a_stop, "row 1 goes on after a stop token"),
        (cut_off, "2 tokens ended at the length limit, which is 3"),
        (not_finite, "a log-prob is not finite"),
        (without_log_probs, "log_probs is missing"),
        (rows_missing, r"sequence_lengths is \[1, 1\]"),
    ],
)
def test_an_incomplete_completion_is_refused(fault: Callable[[dict[str, Tensor]], None], message: str):
    output = answer()
    fault(output)
    with pytest.raises(BadAnswer, match=message):
        unpacked(output)
