"""Many threads at once: every answer comes from its adapter, none is lost, and memory stays within its limits."""

from __future__ import annotations

import random
import threading
from contextlib import suppress

from shelf import Shelf, agree, reference

from turret.errors import BundleError, Cancelled, EngineError, InUse, NotFound

TEXTS = ["a great film", "dull and boring", "the market fell"]


def test_eight_threads_and_twenty_adapters_while_others_load_unload_fail_and_cancel() -> None:
    shelf = Shelf("bert")
    names = [f"a{number}" for number in range(20)]
    for number, name in enumerate(names):
        shelf.put(name, ["lora", "wide", "prefix", "head"][number % 4], number, labels=2 + number % 4)
    shelf.broken["bad@1"] = BundleError("torn")
    expected = {name: reference(shelf, name, TEXTS) for name in names}
    wrong: list[BaseException] = []
    answered = []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(25):
                name, place = chance.choice(names), chance.randrange(3)
                ticket = engine.submit("classify", TEXTS[place], name, priority=chance.randrange(3))
                if chance.random() < 0.1:
                    ticket.cancel()
                    with suppress(Cancelled):
                        agree([ticket.result(60)], expected[name][place : place + 1])
                    continue
                agree([ticket.result(60)], expected[name][place : place + 1])
                answered.append(name)
        except BaseException as error:
            wrong.append(error)

    def disturb() -> None:
        chance = random.Random(99)
        while not over.is_set():
            with suppress(InUse, NotFound):
                engine.unload(chance.choice(names))
            with suppress(BundleError):
                engine.submit("classify", "x", "bad").result(60)
            engine.warm(chance.choice(names))

    with shelf.engine(slots=7, batch_tokens=64) as engine:
        over = threading.Event()
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        disturber = threading.Thread(target=disturb)
        for thread in [*threads, disturber]:
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        disturber.join()
        assert not wrong, wrong[0]
        stats = engine.stats()
        assert stats.adapters <= 7
        assert (stats.waiting, stats.waiting_tokens, stats.running) == (0, 0, 0)
        assert all(each.requests == 0 for each in engine.loaded())
        assert engine.drain(10)
    assert len(answered) > 150


def test_threads_that_submit_while_the_engine_closes_get_an_answer_or_an_error() -> None:
    shelf = Shelf("bert")
    shelf.put("a")
    engine = shelf.engine()
    engine.warm("a")
    ends: list[str] = []

    def ask() -> None:
        while True:
            try:
                engine.submit("classify", "x", "a").result(30)
            except EngineError as error:
                ends.append(type(error).__name__)
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join(30)
    assert ends == ["Draining"] * 4
