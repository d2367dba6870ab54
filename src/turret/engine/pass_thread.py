"""One thread in which trainings take turns, pass by pass, while each has a thread of its own for everything else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch

from turret import process
from turret.errors import Draining
from turret.turns import Places, TurnQueue

T = TypeVar("T")


class PassThread:
    """Runs pieces of work one after another. The tenant that was given the fewest seconds goes next.

    torch's thread pool belongs to the thread that computes, so passes of many threads would each start one.
    """

    def __init__(self) -> None:
        self._queue: TurnQueue[_Piece[Any]] = TurnQueue(Places(1, guests=0))  # pieces have results of any type
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="turret-passes", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a piece of work in the thread when its turn comes. Returns its result, or raises its error.

        Args:
            tenant: Whose training it belongs to.

        Raises:
            Draining: The thread was closed before the turn came.
        """
        if threading.current_thread() is self._thread:
            return work()
        piece = _Piece(work, Future())
        with self._wake:
            if self._closing:
                raise Draining("no more trainings run here: this process is being stopped")
            self._queue.put(tenant, piece)
            self._wake.notify_all()
        return piece.future.result()

    def close(self) -> None:
        """End the thread after the piece that runs now. Pieces that wait raise Draining."""
        with self._wake:
            self._closing = True
            left = self._queue.clear()
            self._wake.notify_all()
        for piece in left:
            piece.future.set_exception(Draining("no more trainings run here: this process is being stopped"))
        self._thread.join()

    @process.keep_freed()
    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._closing and (taken := self._queue.take()) is None:
                    self._wake.wait()
                if self._closing:
                    return
            assert taken is not None
            tenant, piece = taken
            started = time.monotonic()
            piece.run()
            with self._wake:
                self._queue.ended(tenant, time.monotonic() - started)


class _Piece(Generic[T]):
    """A piece of work, and where its result goes."""

    def __init__(self, work: Callable[[], T], future: Future[T]) -> None:
        self._work, self.future = work, future

    def run(self) -> None:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                result = self._work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)
