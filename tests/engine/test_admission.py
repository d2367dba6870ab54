"""What is counted, and the wait that is predicted from it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from shelf import TEXTS, Shelf

from turret.engine import Limits
from turret.engine.request import Histogram, Receipt, Request, SamplingParams, Ticket
from turret.engine.scheduler import Counters
from turret.errors import Busy


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(tokens: int, arrived: float, **more: Any) -> Request:
    ticket = Ticket(Receipt("1", None, 0, None, "sha256:x"), lambda: None)
    settings = {"kind": "classify", "named": None, "text": None, "options": SamplingParams(), **more}
    return Request(ticket=ticket, tokens=tokens, arrived=arrived, **settings)


def served(clock: Clock, counters: Counters, passes: int = 20, tokens: int = 100, seconds: float = 0.5) -> None:
    """Passes of so many tokens, while others wait."""
    for _ in range(passes):
        clock.now += seconds
        counters.count_pass([request(tokens, clock.now - 2 * seconds)], 0, seconds, waits=True)


def refused(counters: Counters, waiting: int, asked: Request, **limits: int) -> Busy:
    with pytest.raises(Busy) as caught:
        counters.admit(asked, {"": waiting}, Limits(**limits))
    return caught.value


def test_a_full_queue_says_when_there_is_room_for_the_request() -> None:
    clock = Clock()
    counters = Counters(clock)
    served(clock, counters)  # 200 tokens a second
    error = refused(counters, 1000, request(100, clock.now), queue_tokens=1000)
    assert error.retry_after == pytest.approx(0.5)  # 100 tokens have begun by then
    counters.admit(request(100, clock.now), {"": 1000 - 100}, Limits(queue_tokens=1000))


def test_a_wait_that_is_too_long_is_refused_until_it_is_short_enough() -> None:
    clock = Clock()
    counters = Counters(clock)
    served(clock, counters)
    error = refused(counters, 8000, request(1, clock.now), queue_seconds=30)
    assert "8000 tokens wait, which takes 40 s, and a request may wait 30 s" in str(error)
    assert error.retry_after == pytest.approx(10.0)
    counters.admit(request(1, clock.now), {"": 8000 - 2000}, Limits(queue_seconds=30))
    late = refused(counters, 8000, request(1, clock.now, deadline=clock.now + 5))  # it could not be answered in time
    assert late.retry_after == pytest.approx(35.0)


def test_passes_in_which_nothing_begins_make_the_wait_longer() -> None:
    clock = Clock()
    counters = Counters(clock)
    served(clock, counters, passes=4)
    before = counters.wait_for(100)
    for _ in range(10):
        clock.now += 0.5
        counters.count_pass([], 3, 0.5, waits=True)
    after = counters.wait_for(100)
    assert before is not None
    assert after is not None
    assert after > 2 * before
    for _ in range(10):  # nobody waits: this time is not the queue's
        clock.now += 60
        counters.count_pass([], 3, 0.5, waits=False)
    assert counters.wait_for(100) == pytest.approx(after, rel=0.1)


def test_what_one_tenant_has_waiting_keeps_no_other_out() -> None:
    clock = Clock()
    counters = Counters(clock)
    served(clock, counters)
    limits, full = Limits(queue_tokens=8000, queue_seconds=300), {"flood": 8000}
    with pytest.raises(Busy, match="8000 tokens wait already"):
        counters.admit(replace(request(1, clock.now), tenant="flood"), full, limits)
    for waiting in (full, full | {"quiet": 3000}):
        counters.admit(replace(request(100, clock.now), tenant="quiet"), waiting, limits)
    with pytest.raises(Busy, match="3950 tokens wait already"):  # it has a share, and no more
        counters.admit(replace(request(100, clock.now), tenant="quiet"), full | {"quiet": 3950}, limits)


def test_nothing_is_predicted_before_something_was_measured() -> None:
    clock = Clock()
    counters = Counters(clock)
    assert counters.wait_for(10**6) is None
    counters.admit(request(1, clock.now), {"": 10**6}, Limits(queue_tokens=1 << 30))
    assert refused(counters, 10, request(1, clock.now), queue_tokens=10).retry_after == 1.0


def test_a_histogram_counts_each_value_up_to_its_bound() -> None:
    counted = Histogram()
    counted.observe(0.001)
    counted.observe(0.7, 3)
    counted.observe(1000)
    now = counted.now()
    assert now.sum == pytest.approx(0.001 + 2.1 + 1000)
    assert (now.buckets["0.001"], now.buckets["0.5"], now.buckets["1.0"], now.buckets["+Inf"]) == (1, 1, 4, 5)


def test_the_engine_measures_the_queue_the_first_token_and_the_time_between_tokens() -> None:
    shelf = Shelf("llama", "generate")
    with shelf.engine() as engine:
        answers = engine.generate(TEXTS, None, SamplingParams(max_tokens=5))
        stats = engine.stats()
    first, queued, between = (
        each.buckets["+Inf"] for each in (stats.first_token_seconds, stats.queue_seconds, stats.between_tokens_seconds)
    )
    assert first == queued == len(TEXTS)
    assert between == stats.tokens - len(TEXTS)
    assert sum(answer["tokens"] for answer in answers) <= stats.tokens
    assert stats.first_token_seconds.sum > 0


def test_a_cancelled_request_is_no_error(shelf: Shelf) -> None:
    shelf.gate.clear()
    with shelf.engine() as engine:
        ended = threading.Event()
        ticket = engine.submit("classify", "x", "a")
        ticket.add_done_callback(lambda each: ended.set())
        ticket.cancel()
        assert ended.wait(30)
        shelf.gate.set()
        assert (engine.stats().errors, engine.stats().answers) == (0, 0)
