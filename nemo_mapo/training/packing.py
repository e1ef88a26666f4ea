"""Which rows go through the model together."""

from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Fill packs of at most `budget` tokens with whole rows, first fit; returns the row numbers of each pack.

    Rows are taken in their order, each into the first pack that has room for it, so that the result follows from the
    lengths alone, and rows keep their order within a pack (those of one group therefore among themselves).

    Raises:
        ValueError: if a row alone is longer than the budget.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row, length in enumerate(lengths):
        if length > budget:
            raise ValueError(f"row {row} has {length} tokens, more than model.packed_tokens={budget}; raise it")
        pack = next((pack for pack, left in enumerate(room) if length <= left), None)
        if pack is None:
            pack = len(packs)
            packs.append([])
            room.append(budget)
        packs[pack].append(row)
        room[pack] -= length
    return packs
