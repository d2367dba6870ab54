"""How the engine's thread waits: when helpers are let go and woken, and who may have the lock meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from turret.engine import thread_parking


class Watched:
    """`turret.kernels` as `idle` sees it: what was called, and whether others could have the lock meanwhile."""

    def __init__(self, lock: threading.Condition) -> None:
        self.lock, self.calls, self.free = lock, list[str](), True
        self.rested = threading.Event()

    def rest(self) -> None:
        self.calls.append("rest")
        self.rested.set()

    def wake(self) -> None:
        self.calls.append("wake")
        other = threading.Thread(target=self._try)
        other.start()
        other.join()

    def _try(self) -> None:
        got = self.lock.acquire(timeout=1)
        self.free = self.free and got
        if got:
            self.lock.release()


class Waiting:
    """A thread in `idle.wait` until `busy` is set."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.kernels = Watched(self.lock)
        self.busy, self.held = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self.lock:
            self.held.set()
            thread_parking.wait(self.lock, self.busy.is_set, lambda: None)

    def tell(self) -> None:
        with self.lock:
            self.lock.notify_all()

    def end(self) -> list[str]:
        self.busy.set()
        self.tell()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.kernels.free
        return self.kernels.calls


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    it = Waiting()
    monkeypatch.setattr(thread_parking, "kernels", it.kernels)
    it.thread.start()
    it.held.wait()
    yield it
    it.end()


def test_helpers_are_let_go_once_and_woken_when_somebody_begins_something(waiting: Waiting) -> None:
    assert waiting.kernels.rested.wait(10)
    waiting.kernels.rested.clear()
    assert not waiting.kernels.rested.wait(4 * thread_parking.IDLE)  # once is enough
    waiting.tell()  # a load, and nothing to do for a while
    assert waiting.kernels.rested.wait(10)
    assert waiting.end() == ["rest", "wake", "rest", "wake"]


def test_work_that_is_there_already_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Condition()
    monkeypatch.setattr(thread_parking, "kernels", watched := Watched(lock))
    with lock:
        thread_parking.wait(lock, lambda: True, lambda: None)
    assert not watched.calls


def test_a_moment_that_comes_by_itself_is_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Condition()
    monkeypatch.setattr(thread_parking, "kernels", watched := Watched(lock))
    turns = iter([False, False, True])
    with lock:
        thread_parking.wait(lock, lambda: next(turns), lambda: 0.001)
    assert watched.calls == ["rest"]
