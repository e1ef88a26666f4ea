from collections import Counter

import numpy as np
import pytest

from nemo_mapo.embedded.synthetic_text import (
    ATTRIBUTES,
    PRIOR_ANSWERS,
    Event,
    caption_text,
    events_from_custom,
    loudest_event,
    prior_answer,
    question_text,
    reasoning_text,
    warm_start_belief,
)
from nemo_mapo.types import Example

EVENTS = (
    Event(kind="noise", attribute="dull", start_seconds=1.4, duration_seconds=0.5, loudness=-24.0),
    Event(kind="tone", attribute="deep", start_seconds=0.1, duration_seconds=0.5, loudness=-25.0),
    Event(kind="sweep", attribute="peaking", start_seconds=0.8, duration_seconds=0.5, loudness=-17.0),
)
SWEEP = Example(
    id="a",
    question=question_text("attribute", "sweep"),
    choices=("rising", "peaking", "falling", "dipping"),
    answer="peaking",
    task="attribute",
)
NOISE = Example(
    id="b", question=question_text("attribute", "noise"), choices=ATTRIBUTES["noise"], answer="dull", task="attribute"
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_caption_names_every_sound_in_order_of_time_and_the_loud_one():
    assert caption_text(EVENTS) == "i hear a deep tone first, then a loud peaking sweep, and last a dull noise."


def test_a_caption_of_one_sound_is_one_sentence():
    assert caption_text(EVENTS[:1]) == "i hear only a dull noise."


def test_reasoning_states_the_truth_then_follows_its_belief_to_the_answer():
    text = reasoning_text(EVENTS, SWEEP, "rising", rng(3))
    assert text.startswith("<think> ") and text.endswith("so the sweep seems rising.</think> rising")
    assert "a deep tone first, then a loud peaking sweep, and last a dull noise." in text
    assert "is it rising? yes. is it falling? no. is it peaking? no. is it dipping? no." in text
    assert 45 <= len(text.split()) <= 60


def test_reasoning_is_lower_case_and_its_wording_varies_with_the_generator():
    texts = {reasoning_text(EVENTS, SWEEP, "peaking", rng(seed)) for seed in range(20)}
    assert len(texts) == 6
    assert all(text == text.lower() for text in texts)


def test_reasoning_refuses_a_belief_that_is_no_choice():
    with pytest.raises(ValueError, match=r"belief 'warm' is not among the choices"):
        reasoning_text(EVENTS, SWEEP, "warm", rng())


def test_no_sound_is_called_loud_without_a_clear_margin():
    assert loudest_event(EVENTS) is EVENTS[2]
    assert loudest_event(EVENTS[:2]) is None
    assert loudest_event(EVENTS[2:]) is None


def test_beliefs_hold_the_asked_share_of_truth_and_the_rest_follows_the_prior():
    draws = Counter(warm_start_belief(NOISE, 0.5, generator) for generator in [rng()] for _ in range(8000))
    # Truth 0.5 + a quarter of the uniform 0.1; prior 0.4 + the same; the other two a quarter of 0.1 each.
    expected = {"dull": 0.525, PRIOR_ANSWERS["noise"]: 0.425, "warm": 0.025, "sharp": 0.025}
    for word, share in expected.items():
        assert draws[word] / 8000 == pytest.approx(share, abs=0.02)


def test_belief_is_always_the_truth_at_share_one():
    assert {warm_start_belief(SWEEP, 1.0, rng(seed)) for seed in range(50)} == {"peaking"}


def test_an_impossible_share_is_refused():
    with pytest.raises(ValueError, match="outside"):
        warm_start_belief(SWEEP, 1.5, rng())


def test_the_prior_is_one_word_per_kind_and_per_other_task():
    assert prior_answer(SWEEP) == "rising"
    order = Example(id="o", question="which sound comes last?", choices=tuple(ATTRIBUTES), answer="noise", task="order")
    assert prior_answer(order) == PRIOR_ANSWERS["order"] in order.choices


def test_events_are_read_back_from_custom_fields_and_their_absence_is_named():
    assert events_from_custom(
        {
            "events": [
                {"kind": "tone", "attribute": "low", "start_seconds": 0.1, "duration_seconds": 0.5, "loudness": -9.0}
            ]
        }
    ) == (Event(kind="tone", attribute="low", start_seconds=0.1, duration_seconds=0.5, loudness=-9.0),)
    with pytest.raises(ValueError, match="no 'events' field"):
        events_from_custom({})
    with pytest.raises(ValueError, match="no such sound"):
        Event(kind="tone", attribute="rising", start_seconds=0.0, duration_seconds=1.0, loudness=0.0)
