"""Signals along completions of unequal length."""

import torch

from nemo_mapo.evaluation.profile import NUM_BINS, PositionProfile


def profile_of(masses, lengths, **others):
    mask = torch.arange(masses.shape[1]) < torch.tensor(lengths)[:, None]
    profile = PositionProfile()
    profile.add(mask, {"audio_mass_max": masses, "delta_h_nats": torch.zeros_like(masses), **others})
    return profile


def test_thirds_are_those_of_each_completion_whatever_its_length():
    masses = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]])
    thirds = profile_of(masses, [3, 6]).thirds()
    assert thirds["audio_mass_early"] == 1.0
    assert thirds["audio_mass_late"] == 3.0
    assert thirds["audio_mass"] == 2.0


def test_padding_is_not_counted():
    masses = torch.tensor([[1.0, 1.0, 1.0, 99.0]])
    profile = profile_of(masses, [3])
    assert profile.thirds()["audio_mass"] == 1.0
    assert int(profile.count.sum()) == 3


def test_a_long_completion_fills_every_bin_with_its_own_tokens():
    masses = torch.arange(2.0 * NUM_BINS)[None]
    curve = profile_of(masses, [2 * NUM_BINS]).mean("audio_mass_max")
    torch.testing.assert_close(curve, torch.arange(NUM_BINS, dtype=torch.float64) * 2 + 0.5)


def test_a_record_leaves_out_bins_without_tokens():
    record = profile_of(torch.ones(1, 2), [2]).record(step=4, label="after")
    assert record["position"] == [0.275, 0.775]
    assert record["audio_mass_max"] == [1.0, 1.0] and record["count"] == [1, 1]
    assert (record["step"], record["label"]) == (4, "after")


def test_batches_add_up():
    together = profile_of(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), [2, 2])
    apart = profile_of(torch.tensor([[1.0, 3.0]]), [2])
    apart.add(
        torch.ones(1, 2, dtype=torch.bool),
        {"audio_mass_max": torch.tensor([[5.0, 7.0]]), "delta_h_nats": torch.zeros(1, 2)},
    )
    assert together.thirds() == apart.thirds()


def test_a_third_that_no_completion_reaches_is_left_out():
    thirds = profile_of(torch.ones(2, 1), [1, 1]).thirds()
    assert thirds == {"audio_mass": 1.0, "delta_h_nats": 0.0}
