"""Slots: limits hold, pinned and held adapters stay, the least recently used is evicted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turret.engine.slots import Entry, MemoryBudget, Slots
from turret.errors import NoRoom

STEP = st.tuples(
    st.sampled_from(["open", "fill", "fail", "hold", "release", "pin", "unpin"]),
    st.sampled_from("abcdefgh"),
    st.integers(1, 60),
)
STEPS = st.lists(STEP, max_size=60)


def stepped(slots: Slots, verb: str, digest: str, size: int) -> tuple[list[Entry], Entry | None]:
    """Take one step, if it is possible. Returns the adapters that left, and the one whose load ended."""
    entry = slots.find(digest)
    if verb == "open" and entry is None:
        with suppress(NoRoom):
            return slots.open(digest, size)[1], None
    elif entry is None:
        return [], None
    elif verb == "fill" and not entry.ready:
        filled = slots.set_size(entry, size)
        return [entry] if filled is None else filled, entry
    elif verb == "fail" and not entry.ready:
        slots.close(entry)
        return [], entry
    elif verb == "hold":
        slots.hold(entry)
    elif verb == "release" and entry.holds:
        slots.release(entry)
    elif verb in ("pin", "unpin"):
        entry.pinned = verb == "pin"
    return [], None


@settings(deadline=None)
@given(STEPS, st.integers(1, 4), st.one_of(st.none(), st.integers(20, 100)))
def test_limits_hold_and_held_or_pinned_adapters_stay(steps: Any, count: int, memory: int | None) -> None:
    slots = Slots(count, memory)
    for verb, digest, size in steps:
        safe = {each.digest for each in slots.entries() if each.holds or each.pinned or not each.ready}
        out, loaded = stepped(slots, verb, digest, size)
        if loaded is not None:
            safe.discard(digest)
        entries = slots.entries()
        assert len(entries) <= count
        assert slots.bytes == sum(each.bytes for each in entries)
        assert memory is None or slots.bytes <= memory
        assert len({each.slot for each in entries}) == len(entries)
        assert all(1 <= each.slot <= count for each in entries)
        assert safe.isdisjoint(each.digest for each in out)
        assert safe <= {each.digest for each in entries}


def test_the_least_recently_used_is_evicted_first() -> None:
    slots = Slots(2, None)
    for digest in "ab":
        entry, _ = slots.open(digest, 1)
        assert entry is not None
        slots.set_size(entry, 1)
    first = slots.find("a")
    assert first is not None
    slots.hold(first)
    slots.release(first)
    assert [each.digest for each in slots.open("c", 1)[1]] == ["b"]


def test_a_slot_is_waited_for_while_all_are_held_and_refused_while_all_are_pinned() -> None:
    slots = Slots(1, None)
    entry, _ = slots.open("a", 1)
    assert entry is not None
    slots.set_size(entry, 1)
    slots.hold(entry)
    assert slots.open("b", 1) == (None, [])
    entry.pinned = True
    with pytest.raises(NoRoom, match="all 1 slots hold pinned"):
        slots.open("b", 1)


def test_an_adapter_larger_than_the_limit_is_refused_with_both_numbers() -> None:
    with pytest.raises(NoRoom, match="takes 11 bytes and the limit of memory is 10"):
        Slots(1, 10).open("a", 11)


def test_an_adapter_that_is_larger_than_reserved_and_does_not_fit_is_removed() -> None:
    slots = Slots(2, 10)
    entry, _ = slots.open("a", 5)
    assert entry is not None
    assert slots.set_size(entry, 11) is None
    assert len(slots) == slots.bytes == 0


# --- several engines on one budget ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), STEP), max_size=80), st.integers(20, 100))
def test_the_adapters_of_all_engines_never_take_more_than_the_budget(steps: Any, limit: int) -> None:
    budget = MemoryBudget(limit)
    engines = [Slots(3, budget) for _ in range(3)]
    for which, (verb, digest, size) in steps:
        slots = engines[which]
        safe = [each for each in budget.entries() if each.holds or each.pinned or not each.ready]
        _, loaded = stepped(slots, verb, digest, size)
        safe = [each for each in safe if each is not loaded]
        left = budget.entries()
        assert budget.bytes == sum(each.bytes for each in left) <= limit
        assert all(each.bytes <= limit for each in left)
        assert all(any(each is other for other in left) for each in safe)


def test_the_least_recently_used_of_all_engines_leaves_and_its_engine_is_told() -> None:
    budget = MemoryBudget(10)
    first, second = Slots(9, budget), Slots(9, budget)
    taken: list[str] = []
    second.on_taken = lambda entry: taken.append(entry.digest)
    for slots, digest in ((second, "old"), (first, "middle"), (second, "new")):
        entry, _ = slots.open(digest, 3)
        assert entry is not None
        slots.set_size(entry, 3)
    assert first.open("next", 4) == (first.find("next"), [])
    assert taken == ["old"]
    assert (first.evictions, second.evictions) == (0, 1)
    assert (budget.bytes, first.bytes, second.bytes) == (10, 7, 3)
    second.leave()
    assert budget.bytes == 7
