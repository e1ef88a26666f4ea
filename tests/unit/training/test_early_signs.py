"""What the console says when the first steps of a run look like those of a model that was never asked."""

import pytest
from scipy.stats import binom

from nemo_mapo.config.load import load
from nemo_mapo.config.run import RunConfig
from nemo_mapo.training.early_signs import EarlySigns, warn_below_chance

DEAD = {"rollout/format": 0.0, "rollout/finished_share": 1.0}
ALIVE = {"rollout/format": 0.1, "rollout/finished_share": 1.0}
TRUNCATED = {"rollout/format": 0.0, "rollout/finished_share": 0.0}


def signs(**prompt):
    split = {"input_cfg": [{"type": "lhotse", "cuts_path": "cuts.jsonl"}]}
    data = {"tokenizer": "tokenizer", "train_ds": split, "validation_ds": split, "prompt": prompt}
    return EarlySigns(load({"data": data}, RunConfig))


@pytest.fixture
def said(caplog):
    return lambda: [record.getMessage() for record in caplog.records if record.name == "nemo_mapo.training.early_signs"]


@pytest.mark.parametrize(
    ("prompt", "steps", "expected"),
    [
        ({"instruction": None}, [DEAD] * 3, "set data.prompt.instruction=template"),
        ({}, [DEAD] * 3, "set rewards.template to what it writes"),
        ({}, [TRUNCATED] * 3, "rollout.sampling.max_new_tokens=120"),
    ],
)
def test_the_likely_cause_is_named_with_its_key(said, prompt, steps, expected):
    watched = signs(**prompt)
    for metrics in steps[:2]:
        watched.watch(metrics)
    assert said() == []
    watched.watch(steps[2])
    assert len(said()) == 1 and expected in said()[0]
    watched.watch(steps[2])
    assert len(said()) == 1


@pytest.mark.parametrize("steps", [[DEAD, ALIVE, DEAD], [ALIVE] * 3, [{"rollout/finished_share": 0.5}] * 3])
def test_nothing_is_said_of_a_run_that_is_rewarded_or_has_no_format_reward(said, steps):
    watched = signs()
    for metrics in [*steps, DEAD, DEAD, DEAD]:
        watched.watch(metrics)
    assert said() == []


@pytest.mark.parametrize(
    ("right", "questions", "warned"), [(0, 16, False), (0, 17, True), (25, 100, False), (14, 100, True)]
)
def test_accuracy_below_chance_is_distinguished_from_bad_luck(said, right, questions, warned):
    """0.75**16 = 0.01002 and 0.75**17 = 0.0075 lie on either side of 1 %."""
    assert (binom.cdf(right, questions, 0.25) < 0.01) == warned
    warn_below_chance(right, questions, chance=0.25, step=20)
    assert bool(said()) == warned
    if warned:
        assert f"step 20: {right} of {questions}" in said()[0] and "data.prompt.instruction" in said()[0]
