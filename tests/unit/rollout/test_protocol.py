"""What is asked of an engine before a run starts."""

import pytest

from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.rollout.protocol import Capabilities, check_capabilities

ROLLOUT = RolloutConfig(sampling=SamplingConfig(max_new_tokens=20))


def engine(*, audio: bool = True, log_probs: bool = True, max_length: int = 100) -> Capabilities:
    return Capabilities(audio=audio, log_probs=log_probs, max_length=max_length)


def test_an_engine_whose_room_is_just_enough_is_taken() -> None:
    check_capabilities(engine(), ROLLOUT, longest_prompt=80, training=True)


@pytest.mark.parametrize(
    ("capabilities", "complaint"),
    [
        (engine(audio=False), "rollout.backend=megatron takes no audio"),
        (engine(log_probs=False), "rollout.backend=megatron gives no log-probabilities"),
        (engine(max_length=99), "the longest prompt has 80, and rollout.sampling.max_new_tokens=20"),
    ],
)
def test_an_engine_that_cannot_do_what_training_needs_is_refused(capabilities: Capabilities, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_capabilities(capabilities, ROLLOUT, longest_prompt=80, training=True)


def test_an_evaluation_needs_no_log_probs() -> None:
    check_capabilities(engine(log_probs=False), ROLLOUT, longest_prompt=80, training=False)
