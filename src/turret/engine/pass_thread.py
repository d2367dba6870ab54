"""One thread in which trainings take turns, pass by pass, while each has a thread of its own for everything else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from turret import process
from turret.engine.scheduler import TrainingTurns

T = TypeVar("T")


class PassThread:
    """Runs parts of trainings one after another. The tenant that was given the fewest seconds goes next.

    torch's thread pool belongs to the thread that computes, so passes of many threads would each start one.
    """

    def __init__(self) -> None:
        self._turns = TrainingTurns(1.0)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="turret-passes", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training in the thread when its turn comes. Returns its result, or raises its error.

        Args:
            tenant: Whose training it belongs to.

        Raises:
            Draining: The thread was closed before the turn came.
        """
        if threading.current_thread() is self._thread:
            return work()
        return self._turns.run(work, tenant, self._wake, lambda: self._closing)

    def close(self) -> None:
        """End the thread after the part that runs now. Parts that wait raise Draining."""
        with self._wake:
            self._closing = True
            self._turns.abandon()
            self._wake.notify_all()
        self._thread.join()

    @process.keep_freed()
    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._closing and (taken := self._turns.take(answers_wait=False)) is None:
                    self._wake.wait()
                if self._closing:
                    return
            assert taken is not None
            tenant, part = taken
            started = time.monotonic()
            with torch.inference_mode(False), torch.enable_grad():
                part.run()
            with self._wake:
                self._turns.ended(tenant, time.monotonic() - started)
