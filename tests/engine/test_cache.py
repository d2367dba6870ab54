"""KV slots: the data of one sequence never reaches another, and memory follows use."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turret.engine.cache import SHORTEST, KeyValueCache, KVSlot, capacity
from turret.families import Site

SITES = [
    Site("self", None, "decoder", 0, 2, 4),
    Site("cross", None, "cross", 0, 2, 4),
    Site("e", None, "encoder", 0, 2, 4),
]


def new() -> KeyValueCache:
    return KeyValueCache(SITES, torch.zeros(()))


def mark(kv_slot: KVSlot, value: float) -> None:
    for layers in kv_slot.block.stored.values():
        layers[0][:, kv_slot.index] = value
    kv_slot.lengths = dict.fromkeys(kv_slot.lengths, 3)


def marks(kv_slot: KVSlot) -> set[float]:
    return {float(v) for layers in kv_slot.block.stored.values() for v in layers[0][:, kv_slot.index].unique()}


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200), st.integers(0, 30)), max_size=40))
def test_a_slot_is_empty_when_opened_and_keeps_its_data_until_closed(steps: list[tuple[bool, int, int]]) -> None:
    cache, kv_slots = new(), {}
    for number, (opens, tokens, which) in enumerate(steps, 1):
        if opens or not kv_slots:
            kv_slot = cache.open({"decoder": tokens + 1, "cross": tokens // 2 + 1})
            assert marks(kv_slot) == {0.0}
            assert kv_slot.lengths == {"decoder": 0, "cross": 0}
            mark(kv_slot, number)
            kv_slots[number] = kv_slot
        else:
            cache.close(kv_slots.pop(sorted(kv_slots)[which % len(kv_slots)]))
        for value, kv_slot in kv_slots.items():
            assert marks(kv_slot) == {float(value)}
            assert kv_slot.block.kv_slots[kv_slot.index] is kv_slot
        assert len(cache) == len(kv_slots)


def test_slots_that_are_reserved_together_grow_the_block_once() -> None:
    """Opening them copies nothing, and empty blocks are still freed for others."""
    cache = new()
    cache.close(cache.open({"decoder": 900, "cross": 9}))
    wanted = [{"decoder": 9, "cross": 9}] * 5 + [{"decoder": 99, "cross": 9}] * 2
    cache.reserve(wanted)
    before = [id(each) for block in cache._blocks.values() for each in block.stored["decoder"]]
    kv_slots = [cache.open(each) for each in wanted]
    assert [id(each) for block in cache._blocks.values() for each in block.stored["decoder"]] == before
    assert [block.room for block in cache._blocks.values()] == [8, 2]
    assert all(marks(kv_slot) == {0.0} for kv_slot in kv_slots)
    mark(kv_slots[0], 3.0)
    cache.reserve([{"decoder": 9, "cross": 9}] * 4)  # grows: old slots keep their data, new ones are empty
    assert marks(kv_slots[0]) == {3.0}
    assert marks(cache.open({"decoder": 9, "cross": 9})) == {0.0}


def test_closing_a_slot_erases_a_nan() -> None:
    cache = new()
    first, second = cache.open({"decoder": 9, "cross": 9}), cache.open({"decoder": 9, "cross": 9})
    mark(first, torch.nan)
    mark(second, 2.0)
    first.lengths = {"decoder": 0, "cross": 0}  # as after a failed pass
    cache.close(first)
    assert marks(second) == {2.0}
    assert marks(cache.open({"decoder": 9, "cross": 9})) == {0.0}


def test_copies_read_the_contents_before_any_copy() -> None:
    cache = new()
    kv_slots = [cache.open({"decoder": 9, "cross": 9}) for _ in range(3)]
    for number, kv_slot in enumerate(kv_slots):
        mark(kv_slot, number + 1.0)
        for layers in kv_slot.block.stored.values():  # the used part
            layers[0][:, kv_slot.index, :, 3:] = 0.0
    kv_slots[0].block.copy(kv_slots, [kv_slots[1], kv_slots[0], kv_slots[0]])
    assert [marks(kv_slot) - {0.0} for kv_slot in kv_slots] == [{2.0}, {1.0}, {1.0}]


def stored_bytes(cache: KeyValueCache) -> int:
    """Bytes of all tensors, in use or not."""
    return sum(each.nbytes for block in cache._blocks.values() for layers in block.stored.values() for each in layers)


def test_a_slot_is_at_most_twice_as_long_as_needed_and_memory_shrinks_with_use() -> None:
    assert capacity(0) == 0
    assert capacity(1) == SHORTEST
    assert [capacity(n) for n in (64, 65, 128, 1000)] == [64, 128, 128, 1024]
    cache = new()
    kv_slots = [cache.open({"decoder": 64, "cross": 32}) for _ in range(64)]
    full = stored_bytes(cache)
    for kv_slot in kv_slots[3:]:
        cache.close(kv_slot)
    assert stored_bytes(cache) <= full / 8
    for kv_slot in kv_slots[:3]:
        cache.close(kv_slot)
    cache.open({"decoder": 500, "cross": 32})
    assert len(cache._blocks) == 1, "a block without slots is freed when another length is reserved"
