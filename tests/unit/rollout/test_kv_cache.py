"""Slots of the cache: who stands where, that nothing is lost on a move, and that the memory stays the same."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from nemo_mapo.rollout.kv_cache import SlotCache

HEADS, DIM = 2, 3
LAYERS = (1, 2)


def read(values: list[float], width: int) -> StaticInferenceContext:
    """Prompts whose keys are a number each, plus the position; values are their negatives."""
    context = StaticInferenceContext(len(values), width)
    context.sequence_len_offset = width
    for layer in LAYERS:
        key = torch.tensor(values)[None, :, None, None].expand(width, -1, HEADS, DIM) + 100 * layer
        key = key + torch.arange(width)[:, None, None, None] / 10
        context.key_value_memory_dict[layer] = (key, -key)
    return context


def rotate(keys: Tensor, by: int) -> Tensor:
    """Adds the distance, so that a test can see it."""
    return keys + by / 10


def keys(cache: SlotCache, layer: int = 1) -> list[list[float]]:
    """Per position, the number in each slot."""
    return [
        [round(value, 1) for value in row] for row in cache.context.key_value_memory_dict[layer][0][:, :, 0, 0].tolist()
    ]


def test_a_prompt_stands_in_the_slots_of_its_group_from_the_first_position():
    cache = SlotCache(slots=4, room=3)
    cache.begin(2)
    cache.admit(read([1.0, 5.0], 2), torch.tensor([0, 0, 1]), first=0, rotate=rotate)
    assert keys(cache) == [[101.0, 101.0, 105.0, 0.0], [101.1, 101.1, 105.1, 0.0], [0.0] * 4]
    assert keys(cache, layer=2)[1] == [201.1, 201.1, 205.1, 0.0]
    assert torch.equal(cache.context.key_value_memory_dict[1][1][:2], -cache.context.key_value_memory_dict[1][0][:2])


def test_a_prompt_that_comes_later_ends_where_the_others_do_with_its_keys_turned():
    cache = SlotCache(slots=3, room=4)
    cache.begin(3)
    cache.admit(read([1.0], 3), torch.tensor([0]), first=0, rotate=rotate)
    later = read([7.0], 2)
    cache.admit(later, torch.tensor([0, 0]), first=1, rotate=rotate)
    assert [row[1:] for row in keys(cache)] == [[0.0, 0.0], [107.1, 107.1], [107.2, 107.2], [0.0, 0.0]]
    assert [row[0] for row in keys(cache)] == [101.0, 101.1, 101.2, 0.0]
    # Values are not turned.
    values = cache.context.key_value_memory_dict[1][1]
    torch.testing.assert_close(values[1:3, 1, 0, 0], torch.tensor([-107.0, -107.1]))
    assert not later.key_value_memory_dict


def test_the_last_ones_move_up_into_free_slots_and_no_memory_is_taken():
    cache = SlotCache(slots=5, room=2)
    cache.begin(2)
    cache.admit(read([0.0, 1.0, 2.0, 3.0, 4.0], 2), torch.arange(5), first=0, rotate=rotate)
    before = {layer: [one.data_ptr() for one in both] for layer, both in cache.context.key_value_memory_dict.items()}
    order = cache.close_ranks(torch.tensor([1, 3, 4]))
    assert sorted(order.tolist()) == [1, 3, 4] and order[1] == 1
    for layer in LAYERS:
        assert keys(cache, layer)[0][:3] == [100.0 * layer + slot for slot in order.tolist()]
    after = {layer: [one.data_ptr() for one in both] for layer, both in cache.context.key_value_memory_dict.items()}
    assert before == after


def test_nobody_moves_where_the_first_ones_stay():
    cache = SlotCache(slots=3, room=1)
    cache.begin(1)
    cache.admit(read([0.0, 1.0, 2.0], 1), torch.arange(3), first=0, rotate=rotate)
    assert cache.close_ranks(torch.tensor([0, 1])).tolist() == [0, 1]
    assert keys(cache)[0][:2] == [100.0, 101.0]


def test_a_new_round_begins_in_the_same_memory():
    cache = SlotCache(slots=2, room=3)
    cache.begin(3)
    cache.admit(read([1.0, 2.0], 3), torch.arange(2), first=0, rotate=rotate)
    place = cache.context.key_value_memory_dict[1][0].data_ptr()
    cache.begin(1)
    cache.admit(read([9.0], 1), torch.tensor([0]), first=0, rotate=rotate)
    assert cache.end == 1 and keys(cache)[0][0] == 109.0
    assert cache.context.key_value_memory_dict[1][0].data_ptr() == place
