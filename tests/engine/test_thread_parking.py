"""How the engine's thread waits: when helper threads are parked and woken, and that the lock is free meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from turret.engine import thread_parking


class Watched:
    """A fake of `turret.kernels` that records calls, and whether another thread could take the lock during `wake`."""

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
    """A thread in `thread_parking.wait` until `busy` is set."""

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


def test_helpers_are_parked_once_and_woken_by_a_notification(waiting: Waiting) -> None:
    assert waiting.kernels.rested.wait(10)
    waiting.kernels.rested.clear()
    assert not waiting.kernels.rested.wait(4 * thread_parking.IDLE)  # once is enough
    waiting.tell()  # a load starts, but there is no work yet
    assert waiting.kernels.rested.wait(10)
    assert waiting.end() == ["rest", "wake", "rest", "wake"]


def test_there_is_no_wait_if_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Condition()
    monkeypatch.setattr(thread_parking, "kernels", watched := Watched(lock))
    with lock:
        thread_parking.wait(lock, lambda: True, lambda: None)
    assert not watched.calls


def test_a_deadline_ends_the_wait_without_a_notification(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Condition()
    monkeypatch.setattr(thread_parking, "kernels", watched := Watched(lock))
    turns = iter([False, False, True])
    with lock:
        thread_parking.wait(lock, lambda: next(turns), lambda: 0.001)
    assert watched.calls == ["rest"]
