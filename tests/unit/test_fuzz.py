"""A share of `make fuzz`: hostile configs and manifests are refused with an error for users, never with another."""

from tests.fuzz import fuzz_configs, fuzz_manifests


def test_mutated_configs_are_accepted_or_refused_and_absurd_ones_refused():
    outcomes = fuzz_configs(60, seed=1)
    assert outcomes.bad == [] and outcomes["refused"] > 0


def test_mutated_manifests_are_accepted_or_refused_and_absurd_ones_refused():
    outcomes = fuzz_manifests(25, seed=1)
    assert outcomes.bad == [] and outcomes["refused"] > 0
