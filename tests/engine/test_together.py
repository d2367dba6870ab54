"""Requests that are submitted together: one pass, one tokenization, and nobody else waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from shelf import TEXTS, agree, reference

from turret.engine import Ask, SamplingParams
from turret.errors import Busy, ContextLengthExceeded, NotFound

TEXT = "a great film about the bank"
NAMES = ("a", "b", "c", "d")


def asked(engine: Any, names: Any, text: str = TEXT) -> list[Any]:
    with engine.together():
        return [engine.submit("classify", text, name) for name in names]


@contextmanager
def counted(tokenizer: Any) -> Iterator[list[Any]]:
    """The texts that a tokenizer is asked for."""
    plain, seen = type(tokenizer), list[Any]()

    class Counting(plain):  # type: ignore[misc, valid-type]
        def __call__(self, text: Any, *more: Any, **settings: Any) -> Any:
            seen.append(text)
            return super().__call__(text, *more, **settings)

    tokenizer.__class__ = Counting
    try:
        yield seen
    finally:
        tokenizer.__class__ = plain


def test_one_pass_answers_all_adapters_with_what_each_says_alone(shelf) -> None:
    with shelf.engine() as engine:
        for name in NAMES:
            engine.warm(name)
        before = engine.stats().passes
        found = [each.result(30) for each in asked(engine, NAMES)]
        assert engine.stats().passes == before + 1
    for name, answer in zip(NAMES, found, strict=True):
        agree([answer], reference(shelf, name, [TEXT]))


def test_the_texts_of_one_call_take_one_pass_so_that_their_answers_are_the_same_each_time(shelf) -> None:
    with shelf.engine() as engine:
        engine.warm("a")
        for _ in range(5):
            before = engine.stats().passes
            engine.classify([TEXT + " again" * more for more in range(12)], "a")
            assert engine.stats().passes == before + 1


def test_a_request_that_is_refused_takes_those_before_it_along(shelf) -> None:
    with shelf.engine() as engine:
        engine.warm("a")
        asks = [Ask("classify", TEXT, "a"), Ask("classify", TEXT, "nobody")]
        with pytest.raises(NotFound, match="nobody"):
            engine.submit_all(asks)
        assert engine.answers(asks[:1])[0]["label"]
        assert engine.stats().waiting_tokens == 0
        assert engine.stats().answers == 1


def test_no_pass_begins_before_the_last_one_is_submitted_and_others_are_answered_meanwhile(shelf) -> None:
    with shelf.engine() as engine:
        engine.warm("a"), engine.warm("b")
        other: list[Any] = []
        with engine.together():
            first = engine.submit("classify", TEXT, "a")
            asking = threading.Thread(target=lambda: other.append(engine.classify([TEXTS[0]], "b")))
            asking.start()
            asking.join(30)
            assert len(other) == 1
            assert not first.done
            last = engine.submit("classify", TEXT, "b")
        agree([first.result(30)], reference(shelf, "a", [TEXT]))
        agree([last.result(30)], reference(shelf, "b", [TEXT]))


def test_adapters_that_are_loaded_meanwhile_wait_for_the_others_too(shelf) -> None:
    with shelf.engine() as engine:
        before = engine.stats().passes
        with engine.together():
            tickets = [engine.submit("classify", TEXT, name) for name in NAMES]
            for name in NAMES:
                engine.warm(name)
        assert [each.result(30)["label"] for each in tickets]
        assert engine.stats().passes == before + 1


def test_adapters_that_read_a_text_alike_share_its_tokens(shelf) -> None:
    shelf.put("other", "lora", 9, prefix_text="review: ")
    with shelf.engine() as engine, counted(engine.base.tokenizer) as seen:
        for name in (*NAMES, "other"):
            engine.warm(name)
        seen.clear()
        together = [each.result(30) for each in asked(engine, [*NAMES, "other"])]
        assert seen == [[TEXT], ["review: " + TEXT]]
        seen.clear()
        alone = [engine.submit("classify", TEXT, name).result(30) for name in (*NAMES, "other")]
        assert len(seen) == 5
    agree(together, alone)


def test_what_is_cancelled_in_the_block_never_begins(shelf) -> None:
    with shelf.engine() as engine:
        engine.warm("a"), engine.warm("b")
        with engine.together():
            gone, stays = (engine.submit("classify", TEXT, name) for name in "ab")
            gone.cancel()
        assert stays.result(30)["label"]
        assert gone.error() is not None
        assert engine.stats().waiting_tokens == 0


def test_an_error_in_the_block_leaves_nothing_behind(shelf) -> None:
    with shelf.engine() as engine:
        tickets = []

        def fail() -> None:
            with engine.together():
                tickets.append(engine.submit("classify", TEXT, "a"))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert tickets[0].result(30)["label"]
        assert engine.submit("classify", TEXT, "a").result(30)["label"]


def test_a_group_that_is_larger_than_the_queue_is_answered_if_the_queue_has_room_for_its_first(shelf) -> None:
    with shelf.engine(queue_tokens=24) as engine:
        for name in NAMES:
            engine.warm(name)
        found = [each.result(30) for each in asked(engine, NAMES * 8)]
        assert len(found) == 32
        with engine.together():
            held = engine.submit("classify", TEXT * 4, "a")
            waits = threading.Thread(target=lambda: refused.append(_error(engine)))
            refused: list[Any] = []
            waits.start()
            waits.join(30)
        assert isinstance(refused[0], Busy), "the tokens of a group count for others"
        assert held.result(30)["label"]


def _error(engine: Any) -> BaseException | None:
    try:
        asked(engine, "ab", TEXT * 4)
    except Busy as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1024, 32])
def test_400_adapters_answer_one_text(shelf, slots: int) -> None:
    names = [f"n{number}" for number in range(400)]
    for number, name in enumerate(names):
        shelf.put(name, "lora", number)
    with shelf.engine(slots=slots) as engine:
        found = [each.result(120) for each in asked(engine, names)]
    for number in range(0, 400, 40):
        agree([found[number]], reference(shelf, names[number], [TEXT]))
    assert len({each["probabilities"]["good"] for each in found}) > 390, "each answers by itself"


def test_more_adapters_than_slots_are_answered_in_several_passes(shelf) -> None:
    for number in range(20):
        shelf.put(f"n{number}", "lora", number)
    names = [f"n{number}" for number in range(20)]
    with shelf.engine(slots=3) as engine:
        found = [each.result(60) for each in asked(engine, names)]
    for name, answer in list(zip(names, found, strict=True))[::5]:
        agree([answer], reference(shelf, name, [TEXT]))


def test_a_text_that_is_too_long_is_an_error_of_each_and_of_nobody_else(shelf) -> None:
    with shelf.engine(max_tokens=16) as engine:
        engine.warm("a")
        with engine.together(), pytest.raises(ContextLengthExceeded):
            engine.submit("classify", "the bank " * 30, "a")
        assert engine.classify([TEXTS[0]], "a")


def test_groups_within_groups_and_options_are_kept_apart(shelf) -> None:
    with shelf.engine() as engine:
        with engine.together():
            outer = engine.submit("classify", TEXT, "a")
            with engine.together():
                inner = engine.submit("classify", TEXT, "b", SamplingParams(logits=True))
            assert "logits" in inner.result(30)
            assert not outer.done
        assert outer.result(30)["label"]
