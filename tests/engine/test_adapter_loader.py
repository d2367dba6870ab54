"""Loading and evicting adapters while requests run: slots, pins, memory, unloading."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import pytest
from shelf import TEXTS, Shelf, agree, reference

from turret.engine import Engine, Named
from turret.engine.slots import Entry, Slots
from turret.errors import (
    InUse,
    NoRoom,
    NotFound,
)


def test_loading_one_adapter_does_not_keep_the_others_waiting(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        engine.warm("a")
        shelf.gate.clear()
        slow = engine.submit("classify", TEXTS[0], "b")
        agree(engine.classify(TEXTS, "a"), reference(shelf, "a", TEXTS))
        assert not slow.done
        shelf.gate.set()
        agree([slow.result(30)], reference(shelf, "b", TEXTS[:1]))


def test_more_adapters_than_slots_take_turns_and_pins_stay(shelf: Shelf) -> None:
    with shelf.engine(slots=2) as engine:
        engine.warm("a", pin=True)
        tickets = [(name, text, engine.submit("classify", text, name)) for text in TEXTS for name in "abcd"]
        for name, text, ticket in tickets:
            agree([ticket.result(30)], reference(shelf, name, [text]))
        stats = engine.stats()
        assert stats.evictions >= 2
        assert stats.adapters <= 2
        assert shelf.loads.count("a@1") == 1
        pinned = [each for each in engine.loaded() if each.pinned]
        assert [each.version for each in pinned] == ["a@1"]
        engine.warm("b", pin=True)
        with pytest.raises(NoRoom, match="all 2 slots hold pinned adapters"):
            engine.submit("classify", "x", "c")
        engine.unpin("a")
        agree(engine.classify(TEXTS, "c"), reference(shelf, "c", TEXTS))
        assert {each.version for each in engine.loaded()} == {"b@1", "c@1"}


def test_memory_is_counted_in_the_bases_precision_and_never_passed(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        engine.warm("b")
        size = engine.loaded()[0].bytes
    tensors = [*shelf.adapters["b@1"].tensors.values(), *shelf.adapters["b@1"].head.values()]
    assert size == sum(each.numel() * 4 for each in tensors)
    shelf.put("e", "wide", 9, labels=4)
    with shelf.engine(memory=size + 100) as engine:
        for name in "bebe":
            agree(engine.classify(TEXTS, name), reference(shelf, name, TEXTS))
            assert engine.stats().adapter_bytes <= size + 100
    with shelf.engine(memory=size - 1) as engine, pytest.raises(NoRoom, match="limit of memory"):
        engine.submit("classify", "x", "b").result(30)


def test_adapters_with_equal_tasks_share_one_task_object(shelf: Shelf) -> None:
    for name, kind, labels in (("e", "lora", 4), ("f", "wide", 4), ("g", "lora", 5)):
        shelf.put(name, kind, ord(name), labels=labels)
    with shelf.engine() as engine:
        for name in "efg":
            agree(engine.classify(TEXTS, name), reference(shelf, name, TEXTS))
        loaded = {each.version[0]: engine._runner.adapter_pool.at(each.slot) for each in engine.loaded()}
        assert all(loaded.values())
        e, f, g = (loaded[name].task for name in "efg")
        assert e is f
        assert e is not g


def test_one_adapter_that_is_always_asked_for_does_not_keep_the_only_slot(shelf: Shelf) -> None:
    with shelf.engine(slots=1) as engine:
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                tickets = [engine.submit("classify", "x", "a") for _ in range(8)]
                tickets[0].result(30)

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            agree([engine.submit("classify", TEXTS[0], "b").result(20)], reference(shelf, "b", TEXTS[:1]))
        finally:
            stop.set()
            thread.join()


def test_unloading_removes_an_adapter_unless_a_request_needs_it(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        with pytest.raises(NotFound, match="a@1 is not loaded here"):
            engine.unload("a")
        engine.warm("a", pin=True)
        engine.unload("a")
        assert engine.loaded() == []
        agree(engine.classify(TEXTS, "a"), reference(shelf, "a", TEXTS))
        with engine._wake:  # no pass can run
            ticket = engine.submit("classify", "x", "a")
            with pytest.raises(InUse, match="needed by 1 requests"):
                engine.unload("a")
        assert ticket.result(30)


class Tenants(Shelf):
    """A shelf of tenants: `quiet/a` is `a` for the tenant `quiet`."""

    def resolve(self, reference: str) -> Named:
        tenant, _, name = reference.rpartition("/")
        return replace(super().resolve(name), tenant=tenant)


@pytest.fixture
def tenants() -> Tenants:
    shelf = Tenants("bert")
    for seed in range(12):
        shelf.put(f"a{seed}", seed=seed)
    return shelf


@pytest.mark.parametrize("other", ["quiet", "flood"])
def test_a_tenant_whose_adapters_wait_to_be_loaded_delays_anothers_by_one_load(tenants: Tenants, other: str) -> None:
    with tenants.engine() as engine:
        tenants.gate.clear()
        tickets = [engine.submit("classify", "x", f"flood/a{seed}", tenant="flood") for seed in range(11)]
        tickets.append(engine.submit("classify", "x", f"{other}/a11", tenant=other))
        tenants.gate.set()
        assert all(ticket.result(60) for ticket in tickets)
        place = tenants.loads.index("a11@1")
        assert place == (1 if other == "quiet" else 11), "the control is the tenant that floods"


def test_a_tenant_cannot_pin_so_much_that_another_ones_adapters_find_no_slot(tenants: Tenants) -> None:
    with tenants.engine(slots=4) as engine:
        for name in ("a0", "a1", "a1"):
            engine.warm(f"flood/{name}", pin=True)
        for tenant in ("flood", "other"):
            with pytest.raises(NoRoom, match="at most half of the 4 slots and of the memory: unpin another one"):
                engine.warm(f"{tenant}/a2", pin=True)
        assert engine.submit("classify", "x", "quiet/a3", tenant="quiet").result(30)["label"]
        engine.unpin("flood/a0")
        engine.warm("quiet/a3", pin=True)
        engine.unpin("flood/a1")
        engine.unpin("quiet/a3")
        for seed in range(4):  # the operator may: the control of what a tenant could do
            engine.warm(f"a{seed}", pin=True)
        with pytest.raises(NoRoom, match="all 4 slots hold pinned adapters"):
            engine.submit("classify", "x", "quiet/a3", tenant="quiet")


def test_a_tenant_that_pins_takes_at_most_half_of_the_memory(tenants: Tenants) -> None:
    with tenants.engine(slots=12) as engine:
        engine.warm("flood/a0", pin=True)
        (size,) = {each.bytes for each in engine.loaded()}
    with tenants.engine(slots=12, memory=3 * size) as engine:
        engine.warm("flood/a0", pin=True)
        with pytest.raises(NoRoom, match="half"):
            engine.warm("flood/a1", pin=True)


def test_a_tenant_that_loads_adapters_all_the_time_neither_keeps_anothers_out_nor_passes_the_memory(
    tenants: Tenants,
) -> None:
    with tenants.engine(slots=12) as engine:
        engine.warm("flood/a0")
        (size,) = {each.bytes for each in engine.loaded()}
    over, most = threading.Event(), [0]

    def flood(engine: Engine) -> None:
        for seed in itertools.cycle(range(11)):
            if over.is_set():
                return
            engine.submit("classify", "x", f"flood/a{seed}", tenant="flood").result(30)
            most[0] = max(most[0], engine.stats().adapter_bytes)

    with tenants.engine(slots=12, memory=3 * size) as engine:
        threads = [threading.Thread(target=flood, args=[engine]) for _ in range(6)]
        for each in threads:
            each.start()
        try:
            before = len(tenants.loads)
            until, asked = time.monotonic() + 60, 0
            while len(tenants.loads) - before <= 30:  # the flood loads meanwhile
                assert engine.submit("classify", "x", "quiet/a11", tenant="quiet").result(20)["label"]
                assert time.monotonic() < until
                asked += 1
            assert asked > 3
        finally:
            over.set()
            for each in threads:
                each.join()
        assert engine.stats().evictions > 10
    assert size < most[0] <= 3 * size


def test_a_request_waits_when_its_adapter_turns_out_to_need_more_memory_than_others_leave(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_size, refused = Slots.set_size, []

    def full_once(slots: Slots, entry: Entry, size: int) -> list[Entry] | None:
        if refused:
            return set_size(slots, entry, size)
        refused.append(size)
        slots.close(entry)
        return None

    monkeypatch.setattr(Slots, "set_size", full_once)
    with tenants.engine(slots=2) as engine:
        assert engine.submit("classify", "x", "quiet/a11", tenant="quiet").result(20)["label"]
        assert [each.bytes for each in engine.loaded()] == refused
        assert engine.stats().failed_loads == 0
