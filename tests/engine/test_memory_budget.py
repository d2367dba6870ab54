"""Two engines with one budget of memory: an encoder that classifies and a decoder that writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from shelf import TEXTS, Shelf, agree, reference

from turret.engine import Engine, MemoryBudget, Named, SamplingParams
from turret.errors import DataError, NoRoom

SHORT = SamplingParams(max_tokens=4)


class Measured(Shelf):
    """A shelf that knows how many bytes its adapters take in memory, so that an engine reserves that much."""

    def __init__(self, family: str, task: str, methods: dict[str, str]) -> None:
        super().__init__(family, task)
        self.sizes: dict[str, int] = {}
        for seed, (name, method) in enumerate(methods.items(), 1):
            self.put(name, method, seed)
        with self.engine() as engine:
            for name in methods:
                engine.warm(name)
            self.sizes = {each.version: each.bytes for each in engine.loaded()}

    def resolve(self, reference: str) -> Named:
        named = super().resolve(reference)
        return replace(named, bytes=self.sizes.get(str(named), 1))


@pytest.fixture(scope="module")
def shelf() -> Measured:
    return Measured("bert", "classify", {"a": "lora", "b": "wide", "c": "prefix", "d": "head", "e": "lora"})


@pytest.fixture(scope="module")
def writer() -> Measured:
    return Measured("qwen3", "generate", dict.fromkeys("wxyz", "lora"))


class Watched:
    """Reads what both engines take together, again and again, until the end of the block."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.most, self._budget, self._over = 0, budget, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.0005):
            with self._budget.lock:
                self.most = max(self.most, self._budget.bytes)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def two(shelf: Measured, writer: Measured) -> Iterator[tuple[Engine, Engine, MemoryBudget]]:
    """Engines whose budget has room for their largest two adapters."""
    budget = MemoryBudget(sum(sorted([*shelf.sizes.values(), *writer.sizes.values()])[-2:]))
    with shelf.engine(memory=budget) as first, writer.engine(memory=budget) as second:
        yield first, second, budget


def largest(shelf: Measured, writer: Measured) -> int:
    return max(*shelf.sizes.values(), *writer.sizes.values())


def test_both_answer_as_alone_and_never_take_more_than_the_budget_together(
    two, shelf: Measured, writer: Measured
) -> None:
    first, second, budget = two
    with writer.engine() as alone:
        expected = {name: alone.generate(TEXTS[:2], name, SHORT) for name in "wxyz"}
    with Watched(budget) as watched:
        for _ in range(3):
            for mine, theirs in zip("abcd", "wxyz", strict=True):
                asked = [second.submit("generate", text, theirs, SHORT) for text in TEXTS[:2]]
                agree(first.classify(TEXTS, mine), reference(shelf, mine, TEXTS))
                got = [ticket.result(30) for ticket in asked]
                assert [each["text"] for each in got] == [each["text"] for each in expected[theirs]]
    assert first.stats().evictions > 0
    assert second.stats().evictions > 0
    assert budget.limit is not None
    assert 0 < watched.most <= budget.limit
    assert budget.bytes == first.stats().adapter_bytes + second.stats().adapter_bytes


def test_the_adapter_that_was_not_used_for_longest_leaves_whichever_engine_has_it(
    two, shelf: Measured, writer: Measured
) -> None:
    first, second, budget = two
    budget.limit = sum(shelf.sizes[f"{name}@1"] for name in "ae") + sum(writer.sizes[f"{name}@1"] for name in "wx") - 1
    for engine, name in ((second, "w"), (first, "a"), (second, "x"), (first, "e")):
        engine.warm(name)
    assert {each.version for each in second.loaded()} == {"x@1"}
    assert {each.version for each in first.loaded()} == {"a@1", "e@1"}
    assert (first.stats().evictions, second.stats().evictions) == (0, 1)


def test_an_adapter_that_nobody_asks_is_loaded_only_where_it_evicts_none(
    two, shelf: Measured, writer: Measured
) -> None:
    first, second, budget = two
    budget.limit = shelf.sizes["a@1"] + writer.sizes["w@1"] + min(shelf.sizes.values()) - 1
    assert second.warm_ahead("w")
    assert first.warm_ahead("a")
    assert not any(first.warm_ahead(name) for name in "bcde")
    assert not second.warm_ahead("x")
    assert first.warm_ahead("a"), "it is in memory"
    assert [{each.version for each in engine.loaded()} for engine in two[:2]] == [{"a@1"}, {"w@1"}]
    first.warm("e")
    assert first.stats().evictions + second.stats().evictions > 0, "the control"


def test_an_adapter_waits_for_one_of_the_other_engine_that_is_in_use(two, shelf: Measured, writer: Measured) -> None:
    first, second, budget = two
    budget.limit = largest(shelf, writer)
    with second._wake:  # no pass can run
        long = second.submit("generate", TEXTS[0], "w", SHORT)
        waits = first.submit("classify", TEXTS[0], "b")
        assert not waits.done
    assert long.result(30)["tokens"] == 4
    assert waits.result(30)["label"]


def test_one_base_that_is_always_asked_does_not_keep_all_memory(two, shelf: Measured, writer: Measured) -> None:
    first, second, budget = two
    budget.limit = largest(shelf, writer)
    stop = threading.Event()

    def flood() -> None:
        tickets = [second.submit("generate", "x", "w", SHORT) for _ in range(8)]
        while not stop.is_set():
            tickets.append(second.submit("generate", "x", "w", SHORT))
            tickets.pop(0).result(60)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        while not second.loaded():
            time.sleep(0.01)
        agree([first.submit("classify", TEXTS[0], "b").result(20)], reference(shelf, "b", TEXTS[:1]))
    finally:
        stop.set()
        thread.join()


def test_pins_of_one_engine_are_no_room_for_the_other_and_a_closed_engine_gives_its_memory_back(
    shelf: Measured, writer: Measured
) -> None:
    budget = MemoryBudget(largest(shelf, writer))
    with shelf.engine(memory=budget) as first:
        with writer.engine(memory=budget) as second:
            second.warm("w", pin=True)
            with pytest.raises(NoRoom, match="of which pinned adapters take"):
                first.submit("classify", "x", "b").result(30)
        assert budget.bytes == 0
        assert first.submit("classify", "x", "b").result(30)["label"]


def test_a_budget_of_no_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="limit memory = 0: expected a whole number of 1 or more"):
        MemoryBudget(0)
