"""Memory of a GPU that serves: limits that fit, a pass for which memory runs out, and the threads' own GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pretend_gpu import pretend_gpu, to_gpu
from shelf import TEXTS, Shelf, agree, reference

from turret.engine import Limits
from turret.engine.request import GPU_SHARE, ROOM, limits_within
from turret.engine.runner import GPU_PASS, Runner, pass_tokens
from turret.engine.slots import MemoryBudget
from turret.errors import Busy
from turret.ops import core

GB = 1_000_000_000
TOKEN = 131_072  # bytes of the keys and values of a token of Llama 3.1 8B in 16 bits


@contextmanager
def small_memory(engine: Any, most: int) -> Iterator[list[int]]:
    """An engine whose passes have memory for so many new tokens. Gives the sizes of all passes that were tried."""
    run, tried = engine._runner.run, list[int]()

    def limited(prefill: Any, steps: Any = ()) -> Any:
        tried.append(sum(len(row.ids) for row in prefill) + len(steps))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(prefill, steps)

    engine._runner.run = limited
    yield tried
    engine._runner.run = run


def test_a_pass_that_does_not_fit_is_made_in_parts_and_every_text_is_answered() -> None:
    shelf = Shelf("bert")
    shelf.put("a")
    with shelf.engine() as engine, small_memory(engine, 12) as tried:
        with engine.together():
            tickets = [engine.submit("classify", text, "a") for text in TEXTS]
        found = [each.result(30) for each in tickets]
    agree(found, reference(shelf, "a", TEXTS))
    assert tried[0] > 12
    assert engine.stats().errors == 0


def test_a_text_that_fits_no_pass_ends_alone_and_the_rows_that_decode_go_on() -> None:
    shelf = Shelf("llama", "generate")
    shelf.put("a")
    long, short = "the quick brown fox jumps over the lazy dog and sleeps " * 8, ["a great film", "dull and boring"]
    with shelf.engine() as engine:
        expected = engine.generate(short, "a")
        with small_memory(engine, 28):
            with engine.together():
                tickets = [engine.submit("generate", text, "a") for text in (short[0], long, short[1])]
            with pytest.raises(Busy, match=r"memory ran out for a text of .* tokens beside") as caught:
                tickets[1].result(30)
            assert len(str(caught.value)) < 300
            assert [tickets[0].result(30), tickets[2].result(30)] == expected
        stats = engine.stats()
        assert (stats.running, stats.cache_tokens, len(engine._runner.cache)) == (0, 0, 0)
        assert engine.generate(short, "a") == expected, "the engine goes on"


def test_when_a_step_does_not_fit_the_row_that_came_last_ends() -> None:
    shelf = Shelf("llama", "generate")
    shelf.put("a")
    with shelf.engine() as engine:
        expected = engine.generate(TEXTS[:3], "a")
        run = engine._runner.run

        def limited(prefill: Any, steps: Any = ()) -> Any:
            if not prefill and len(steps) > 2:
                raise MemoryError
            return run(prefill, steps)

        engine._runner.run = limited  # type: ignore[method-assign]
        with engine.together():
            tickets = [engine.submit("generate", text, "a") for text in TEXTS[:3]]
        assert [each.result(30) for each in tickets[:2]] == expected[:2]
        with pytest.raises(Busy, match="memory ran out"):
            tickets[2].result(30)
        assert len(engine._runner.cache) == 0


def test_the_limits_of_an_engine_fit_into_what_a_gpu_has_free() -> None:
    """An 8B base on a card of 24 GB: 7 GB are free after its weights."""
    asked = Limits()
    own = limits_within(asked, 7 * GB, TOKEN, GB)
    assert own.cache_tokens < asked.cache_tokens, "65,536 tokens take 8.6 GB, and the cache up to three times that"
    taken = own.cache_tokens * ROOM * TOKEN + 2 * int(own.memory or 0) + GB  # type: ignore[call-overload]
    assert 0.8 * GPU_SHARE * 7 * GB < taken <= GPU_SHARE * 7 * GB
    assert limits_within(asked, 80 * GB, TOKEN, GB).cache_tokens == asked.cache_tokens
    given = Limits(memory=MemoryBudget(5), cache_tokens=100)
    assert limits_within(given, 7 * GB, TOKEN, GB) == given, "what is set and fits stays"
    served = [
        limits_within(Limits(memory=MemoryBudget(each)), 7 * GB, TOKEN, GB).cache_tokens for each in (GB // 2, 2 * GB)
    ]
    assert served[0] > 3 * served[1] > 0, "what adapters may take, keys may not"
    assert limits_within(asked, GB, TOKEN, 2 * GB).cache_tokens == 1, "every request is refused in one line"


def test_an_engine_asks_its_gpu_and_a_cpu_keeps_its_limits() -> None:
    shelf = Shelf("llama", "generate")
    base = shelf.base()
    assert Runner(base).within(Limits()) == Limits()
    assert pass_tokens(base) < GPU_PASS
    with pretend_gpu():
        base = shelf.base()
        to_gpu(base.model)
        runner, asked = Runner(base), Limits(cache_tokens=10**9)
        own = runner.within(asked)
        assert own.cache_tokens * ROOM * runner.cache.token_bytes < GPU_SHARE * 8 * GB / 2
        assert own.memory is not None
        assert pass_tokens(base) == GPU_PASS


def test_the_threads_of_an_engine_start_programs_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda:1`, or two engines on two GPUs: a thread begins on the first one."""
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(core, "real_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda on: made.append((threading.current_thread().name, str(on))))
    shelf = Shelf("bert")
    shelf.put("a")
    with shelf.engine() as engine:
        engine._loader._executor.submit(lambda: None).result(30)
    assert {name.partition("_")[0] for name, _ in made} == {"turret-engine", "turret-loader"}
    assert {on for _, on in made} == {"cpu"}
