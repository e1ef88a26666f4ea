"""Signals along completions of unequal length."""

import torch

from nemo_mapo.evaluation.profile import NUM_BINS, PositionProfile


def profile_of(*masses):
    profile = PositionProfile()
    for mass in map(torch.tensor, masses):
        profile.add({"audio_mass_max": mass, "delta_h_nats": torch.zeros_like(mass)})
    return profile


def test_thirds_are_those_of_each_completion_whatever_its_length():
    thirds = profile_of([1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]).thirds()
    assert thirds["audio_mass_early"] == 1.0
    assert thirds["audio_mass_late"] == 3.0
    assert thirds["audio_mass"] == 2.0


def test_a_long_completion_fills_every_bin_with_its_own_tokens():
    curve = profile_of([float(token) for token in range(2 * NUM_BINS)]).mean("audio_mass_max")
    torch.testing.assert_close(curve, torch.arange(NUM_BINS, dtype=torch.float64) * 2 + 0.5)


def test_a_record_leaves_out_bins_without_tokens():
    record = profile_of([1.0, 1.0]).record(step=4, label="after")
    assert record["position"] == [0.275, 0.775]
    assert record["audio_mass_max"] == [1.0, 1.0] and record["count"] == [1, 1]
    assert (record["step"], record["label"]) == (4, "after")


def test_profiles_of_ranks_add_up():
    together = profile_of([1.0, 3.0], [5.0, 7.0])
    apart = PositionProfile.merged([profile_of([1.0, 3.0]), profile_of([5.0, 7.0])])
    assert together.thirds() == apart.thirds()


def test_a_third_that_no_completion_reaches_is_left_out():
    thirds = profile_of([1.0], [1.0]).thirds()
    assert thirds == {"audio_mass": 1.0, "delta_h_nats": 0.0}
