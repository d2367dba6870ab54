"""Requests that wait: the limit of the queue, deadlines, cancelling, and listeners."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from shelf import TEXTS, Shelf, agree, reference

from turret.engine import SamplingParams
from turret.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
)


def test_a_queue_that_is_full_says_when_to_come_again(shelf: Shelf) -> None:
    shelf.gate.clear()
    with shelf.engine(queue_tokens=20) as engine:
        tickets = [engine.submit("classify", [5] * 8, "a"), engine.submit("classify", [5] * 8, "a")]
        with pytest.raises(Busy, match=r"16 tokens wait already and the limit of queue_tokens is 20") as caught:
            engine.submit("classify", [5] * 8, "b")
        assert 0 < caught.value.retry_after <= 60
        assert engine.stats().waiting_tokens == 16
        shelf.gate.set()
        assert all(ticket.result(30) for ticket in tickets)
        assert engine.stats().waiting_tokens == 0


def test_many_texts_of_one_call_wait_for_room_in_the_queue(shelf: Shelf) -> None:
    with shelf.engine(queue_tokens=20) as engine:
        agree(engine.classify(TEXTS * 8, "a"), reference(shelf, "a", TEXTS) * 8)


def test_a_deadline_ends_a_request_wherever_it_waits(shelf: Shelf) -> None:
    shelf.gate.clear()
    with shelf.engine() as engine:
        ticket = engine.submit("classify", "x", "a", deadline=0.05)
        with pytest.raises(DeadlineExceeded, match=r"has no answer after 0\.0"):
            ticket.result(30)
        shelf.gate.set()
        agree(engine.classify(TEXTS, "a", deadline=30.0), reference(shelf, "a", TEXTS))


def test_a_deadline_ends_a_generation() -> None:
    shelf = Shelf("llama", "generate")
    shelf.put("a")
    with shelf.engine(max_tokens=1_000_000, cache_tokens=2_000_000) as engine:
        ticket = engine.submit("generate", "x", "a", SamplingParams(max_tokens=500_000), deadline=0.3)
        with pytest.raises(DeadlineExceeded):
            ticket.result(30)
        assert engine.stats().running == 0


def test_cancelling_ends_a_waiting_request_and_keeps_an_answer_that_is_there(shelf: Shelf) -> None:
    shelf.gate.clear()
    with shelf.engine() as engine:
        ticket, other = engine.submit("classify", "x", "a"), engine.submit("classify", "x", "a")
        ended: list[Any] = []
        ticket.add_done_callback(lambda each: ended.append(each.error()))
        ticket.cancel()
        with pytest.raises(Cancelled):
            ticket.result(30)
        assert isinstance(ended[0], Cancelled)
        shelf.gate.set()
        answer = other.result(30)
        other.cancel()
        assert other.result() == answer
        assert other.error() is None


def test_a_request_outlives_the_timeout_of_its_result(shelf: Shelf) -> None:
    shelf.gate.clear()
    with shelf.engine() as engine:
        ticket = engine.submit("classify", "x", "a")
        with pytest.raises(TimeoutError, match=r"not answered after 0\.01 s"):
            ticket.result(0.01)
        shelf.gate.set()
        assert ticket.result(30)


def test_a_listener_that_fails_is_dropped_and_the_answer_comes(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        shelf.gate.clear()
        ticket = engine.submit("classify", "x", "a")

        def fails(event: Any) -> None:
            raise ValueError("mine")

        ticket.listen(fails)
        shelf.gate.set()
        assert ticket.result(30)
        assert engine.classify(["x"], "a")


def test_the_ids_of_requests_tell_nothing_of_those_of_others(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        ids = [int(engine.submit("classify", "x", "a").receipt.id, 16) for _ in range(50)]
    assert len(set(ids)) == 50
    assert min(abs(after - before) for before, after in itertools.pairwise(ids)) > 1 << 24
