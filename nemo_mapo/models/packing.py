"""Which rows go through the model together."""

from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Fill packs of at most `budget` tokens with whole rows, first fit; returns the row numbers of each pack.

    Rows are taken in order, each into the first pack with enough room, so the result depends only on the lengths, and
    rows keep their order within a pack (and therefore within a group).

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


def pack_shared_rows(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[int], shares: Sequence[bool], budget: int
) -> list[list[int]]:
    """Packs of consecutive rows of at most `budget` tokens, in which a prompt counts once for neighbours that share it.

    A group that does not fit a pack continues in the next, which reads its prompt again.

    Args:
        prompt_lengths: tokens of each row's prompt.
        completion_lengths: tokens of each row's completion.
        shares: whether a row has the prompt of the row before it.
        budget: tokens of a pack.

    Raises:
        ValueError: if a row alone is longer than the budget.
    """
    packs: list[list[int]] = []
    room = 0
    for row, (prompt, completion) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        alone = prompt - 1 + completion
        if alone > budget:
            raise ValueError(f"row {row} has {alone} tokens, more than model.packed_tokens={budget}; raise it")
        cost = completion if shares[row] else alone
        if not packs or cost > room:
            packs.append([])
            cost, room = alone, budget
        packs[-1].append(row)
        room -= cost
    return packs
