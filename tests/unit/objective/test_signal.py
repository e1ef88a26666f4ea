"""Another signal than the differential entropy takes its place in both masks, and nowhere else."""

import pytest
import torch

from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.objective.masks import inverse_relevance, relevance_mask
from nemo_mapo.objective.weights import build_weights

SIGNAL = torch.tensor([[0.1, 3.0, 0.4], [2.0, 0.2, 0.0]], dtype=torch.float64)


def test_both_masks_read_the_signal_and_the_curves_keep_delta_h(make_inputs) -> None:
    inputs = make_inputs(audio_signal=SIGNAL)
    cfg = ObjectiveConfig(signal="kl")
    weights, paper = build_weights(inputs, cfg), build_weights(inputs, ObjectiveConfig())
    settings = {"tau_base": cfg.tau_base, "clip": cfg.mask_clip}
    assert torch.equal(weights.omega, relevance_mask(SIGNAL, inputs.response_mask, **settings))
    assert torch.equal(weights.nu, inverse_relevance(SIGNAL, inputs.pos_gate, inputs.response_mask, **settings))
    assert torch.equal(weights.delta_h_nats, paper.delta_h_nats)
    assert not torch.allclose(weights.omega, paper.omega)


def test_the_papers_signal_ignores_another_one(make_inputs) -> None:
    with_signal, without = (
        build_weights(make_inputs(audio_signal=given), ObjectiveConfig()) for given in (SIGNAL, None)
    )
    assert torch.equal(with_signal.omega, without.omega) and torch.equal(with_signal.nu, without.nu)


def test_a_signal_that_was_not_computed_is_refused(make_inputs) -> None:
    with pytest.raises(ValueError, match=r"objective\.signal=jsd is computed with the rollouts"):
        build_weights(make_inputs(), ObjectiveConfig(signal="jsd"))
