"""What is asked of a model before a run starts."""

import pytest

from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.rollout.protocol import check_length

ROLLOUT = RolloutConfig(sampling=SamplingConfig(max_new_tokens=20))


def test_a_model_whose_positions_are_just_enough_is_taken() -> None:
    check_length(100, ROLLOUT, longest_prompt=80)


def test_prompt_and_completion_that_exceed_the_positions_are_refused() -> None:
    said = r"max_position_embeddings=99: the longest prompt has 80 tokens, and rollout\.sampling\.max_new_tokens=20"
    with pytest.raises(ValueError, match=said):
        check_length(99, ROLLOUT, longest_prompt=80)
