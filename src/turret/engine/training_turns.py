"""Parts of trainings that take turns with the passes of answers in an engine's thread.

A part is about as long as one optimiser step. It calls `between_passes` after each of its passes, so that answers wait
for one pass of a training, not for a step. Trainings get a share of the time while answers wait, and all of it else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from turret.errors import Draining
from turret.turns import Places, TurnQueue

T = TypeVar("T")
_thread = threading.local()  # `pause`: what the thread of an engine does between two passes of a training


def between_passes() -> None:
    """Let others have their turn: a training calls it after each of its passes. Outside an engine it does nothing."""
    pause: Callable[[], None] | None = getattr(_thread, "pause", None)
    if pause is not None:
        pause()


class Part:
    """A part of a training, and where its end is told."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self.future = work, Future[None]()

    def run(self, pause: Callable[[], None] | None = None) -> None:
        """Run it. pause: called between its passes."""
        _thread.pause = pause
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self._work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(None)
        finally:
            _thread.pause = None


class TrainingTurns:
    """The parts that wait, and what is owed to answers. Only `run` is thread-safe: the caller has a lock.

    Args:
        share: Of the time, for trainings, while answers wait. Between 0 and 1.
    """

    def __init__(self, share: float) -> None:
        self._share, self._owed = share, 0.0
        self._queue: TurnQueue[Part] = TurnQueue(Places(1, guests=0))

    def run(self, work: Callable[[], T], tenant: str, wake: threading.Condition, ends: Callable[[], bool]) -> T:
        """Queue a part, wake the thread that takes it, and wait for its result, or raise its error.

        Args:
            wake: The caller's lock, which that thread waits on.
            ends: Whether the thread takes no more parts.

        Raises:
            Draining: It takes no more.
        """
        results: list[T] = []
        part = Part(lambda: results.append(work()))
        with wake:
            if ends():
                raise stopped()
            self.put(tenant, part)
            wake.notify_all()
        part.future.result()
        return results[0]

    def put(self, tenant: str, part: Part) -> None:
        """Add a part of a tenant's training."""
        self._queue.put(tenant, part)

    def take(self, *, answers_wait: bool) -> tuple[str, Part] | None:
        """The part that begins now, with its tenant: of the tenant that was given the fewest seconds. None: no part."""
        if not answers_wait:
            self._owed = 0.0
        return None if self._owed > 0.0 else self._queue.take()

    @property
    def waiting(self) -> bool:
        """Whether a part waits."""
        return self._queue.waiting

    @property
    def owes(self) -> bool:
        """Whether answers go first if some wait."""
        return self._owed > 0.0

    def trained(self, seconds: float) -> None:
        """A pass of a training took so long."""
        self._owed += seconds * (1.0 - self._share) / self._share

    def answered(self, seconds: float) -> None:
        """A pass of answers took so long."""
        self._owed = max(0.0, self._owed - seconds)

    def ended(self, tenant: str, seconds: float) -> None:
        """A part has ended. seconds: that it trained."""
        self._queue.ended(tenant, seconds)

    def abandon(self) -> None:
        """End all parts that wait with Draining."""
        for part in self._queue.clear():
            part.future.set_exception(stopped())


def stopped() -> Draining:
    """The error of a training whose engine ends."""
    return Draining("no more trainings run here: this process is being stopped")
