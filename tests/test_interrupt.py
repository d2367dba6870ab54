"""Ctrl-C and SIGTERM as a request to stop, and delayed until the end of a block."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress

import pytest

from turret.process import StopRequest, delay_signals


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_asks_and_the_second_stops(sent: signal.Signals) -> None:
    before = signal.getsignal(sent)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), sent)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), sent)
    assert signal.getsignal(sent) is before


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def body() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_block_and_then_does_what_it_always_does(sent: signal.Signals) -> None:
    before, seen = signal.signal(sent, lambda number, _frame: seen.append(number)), list[int]()
    try:
        with delay_signals():
            os.kill(os.getpid(), sent)
            assert seen == []
        assert seen == [sent]
        with suppress(OSError), delay_signals():  # also where the block fails
            os.kill(os.getpid(), sent)
            raise OSError("full")
        assert seen == [sent, sent]
    finally:
        signal.signal(sent, before)


def test_a_second_signal_stops_the_block() -> None:
    reached = []
    with suppress(KeyboardInterrupt), delay_signals():
        for number in (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(number)
    assert reached == [1]
