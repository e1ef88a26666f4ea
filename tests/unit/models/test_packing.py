"""Rows fill packs up to a budget, in a way that follows from their lengths alone."""

import pytest
import torch

from nemo_mapo.models.packing import pack_rows


def test_each_row_goes_into_the_first_pack_with_room():
    assert pack_rows([6, 5, 4, 3, 2, 7], budget=10) == [[0, 2], [1, 3, 4], [5]]


def test_every_row_is_in_one_pack_in_order_and_no_pack_exceeds_the_budget():
    lengths = torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = pack_rows(lengths, budget=128)
    assert sorted(row for pack in packs for row in pack) == list(range(200))
    assert all(pack == sorted(pack) for pack in packs)
    assert all(sum(lengths[row] for row in pack) <= 128 for pack in packs)
    assert packs == pack_rows(lengths, budget=128)
    assert len(packs) < 1.15 * sum(lengths) / 128, "little is left empty"


def test_a_row_that_fits_no_pack_is_refused():
    with pytest.raises(ValueError, match=r"row 1 has 11 tokens, more than model\.packed_tokens=10"):
        pack_rows([4, 11], budget=10)
