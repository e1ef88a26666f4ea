"""Signs and pairing of what evidence masking does, against values worked out by hand."""

import pytest

from nemo_mapo.config.analysis import AnalysisConfig
from nemo_mapo.evaluation.grounding.effects import Effects, masking

SCORES = {
    "full": [1.0, 1.0, 1.0, 0.0],
    "text_only": [0.0, 1.0, 0.0, 0.0],
    masking("top", 0.3): [0.0, 0.0, 1.0, 0.0],
    masking("random", 0.3): [1.0, 0.0, 1.0, 0.0],
    masking("low", 0.3): [1.0, 1.0, 1.0, 1.0],
}
EFFECTS = Effects(scores=SCORES, config=AnalysisConfig(ratios=(0.3,), bootstrap_samples=200))


def test_the_drop_is_what_the_whole_clip_has_more():
    drops = {row["selection"]: (row["mean"], row["drop"]["mean"]) for row in EFFECTS.evidence()}
    assert drops == {"top": (0.25, 0.5), "random": (0.5, 0.25), "low": (1.0, -0.25)}


def test_acs_is_random_minus_most_attended():
    (row,) = EFFECTS.acs()
    assert (row["ratio"], row["mean"]) == (0.3, 0.25)


def test_differences_are_paired_over_questions():
    # Both lose the same questions: a paired interval is narrower than one that does not know it.
    same = Effects(scores={"full": [1.0, 0.0] * 8, "silence": [1.0, 0.0] * 8}, config=AnalysisConfig())
    other = Effects(scores={"full": [1.0, 0.0] * 8, "silence": [0.0, 1.0] * 8}, config=AnalysisConfig())
    paired, unpaired = same.lost("full", "silence"), other.lost("full", "silence")
    assert paired["mean"] == unpaired["mean"] == 0.0
    assert paired["high"] - paired["low"] < 0.5 * (unpaired["high"] - unpaired["low"])


def test_conditions_of_other_numbers_of_questions_are_never_compared():
    with pytest.raises(ValueError, match="zip"):
        Effects(scores={"full": [1.0, 0.0], "silence": [1.0]}, config=AnalysisConfig()).lost("full", "silence")
