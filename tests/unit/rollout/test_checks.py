"""The one check of a prompt's length, before a run and in every request."""

import pytest

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.checks import refuse_long

SAMPLING = SamplingConfig(max_new_tokens=20)


def test_a_prompt_whose_completion_is_just_short_enough_is_taken() -> None:
    refuse_long("the prompt", 80, SAMPLING, max_positions=100)


def test_prompt_and_completion_that_exceed_the_positions_are_refused() -> None:
    said = r"^the prompt of dog has 80 tokens .*rollout\.sampling\.max_new_tokens=20 .*max_position_embeddings=99: "
    with pytest.raises(ValueError, match=said):
        refuse_long("the prompt of dog", 80, SAMPLING, max_positions=99)
