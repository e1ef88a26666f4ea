"""TARS on two ranks: what one of them lacks does not leave the other waiting."""

import pytest
from distributed.tars_ranks import cosines_or_reason

from support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed
NOBODY = -1


def test_an_embedding_server_that_one_rank_cannot_reach_stops_all_of_them() -> None:
    here, there = run_on_ranks(cosines_or_reason, 2, 1, NOBODY)
    assert "another rank got none" in here
    assert "the embedding server is gone" in there


def test_a_rank_without_references_takes_part_all_the_same() -> None:
    assert run_on_ranks(cosines_or_reason, 2, NOBODY, 0) == [[], [pytest.approx(1.0)]]
