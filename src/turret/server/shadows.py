"""Shadows: versions that are run in addition to the answer. They are recorded and compared, and never returned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from turret.engine import Done, Event, Failed, Piece, SamplingParams
from turret.server.engine_protocol import Input, TicketProtocol
from turret.server.engines import SeenEngines
from turret.server.logs import Log
from turret.server.metrics import Metrics
from turret.server.routing import Placement, Routing
from turret.tasks.shapes import Answer
from turret.tasks.task import RequestKind

LOW_PRIORITY = -1  # that of requests is 0


class Shadows:
    """The shadows of this server.

    Args:
        limit: Of inputs at work or waiting.
        seconds: After which a shadow is abandoned.
        log: Gets the shadows' answers; None if texts are not logged.
    """

    def __init__(
        self,
        engines: SeenEngines,
        routing: Routing,
        metrics: Metrics,
        *,
        limit: int,
        seconds: float,
        clock: Callable[[], float],
        log: Log | None,
    ) -> None:
        self.engines, self.routing, self.metrics = engines, routing, metrics
        self.seconds, self.clock, self.log = seconds, clock, log
        self._limit = limit
        self._thread = ThreadPoolExecutor(1, "turret-shadow")
        self._closed = False
        self.lock = threading.Lock()
        self.running: set[_Shadow] = set()
        self.inputs = 0  # at work or waiting

    def start(
        self,
        placement: Placement,
        kind: RequestKind,
        inputs: Sequence[Input],
        options: Sequence[SamplingParams] | None,
        tickets: Sequence[TicketProtocol],
    ) -> None:
        """Start the shadows of a request if there is room. Returns at once. tickets: of the request."""
        if placement.assignment is None:
            return
        for arm, version in placement.assignment.shadows:
            if not self._reserve(len(inputs)):
                self.metrics.shadow(str(placement.experiment), arm, "shed")
                continue
            shadow = _Shadow(self, placement, arm, kind, tickets)
            with suppress(RuntimeError):  # the server is shutting down
                self._thread.submit(shadow.run, version, list(inputs), options)

    def close(self) -> None:
        """Cancel all shadows."""
        with self.lock:
            self._closed = True
            running = list(self.running)
        self._thread.shutdown(wait=False, cancel_futures=True)
        for each in running:
            each.cancel()

    def _reserve(self, inputs: int) -> bool:
        with self.lock:
            if self._closed or self.inputs + inputs > self._limit:
                return False
            self.inputs += inputs
            return True


class _Shadow:
    """One shadow of one request. It ends when both it and the request's own answers have ended."""

    def __init__(
        self, shadows: Shadows, placement: Placement, arm: str, kind: RequestKind, tickets: Sequence[TicketProtocol]
    ) -> None:
        self._shadows, self._placement, self._arm, self._kind = shadows, placement, arm, kind
        self._request_tickets = list(tickets)
        self._tickets: list[TicketProtocol] = []
        self._answers: dict[tuple[bool, int], Answer | None] = {}  # (of the shadow?, input) -> None if it failed
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._ended_at = 0.0
        self._samples = False

    def run(self, version: str, inputs: Sequence[Input], options: Sequence[SamplingParams] | None) -> None:
        """Submit the shadow and listen to it, on the shadows' thread. Errors are recorded, never raised."""
        engines, clock = self._shadows.engines, self._shadows.clock
        self._started_at = self._ended_at = clock()
        self._samples = options is not None and options[0].samples
        with self._shadows.lock:
            self._shadows.running.add(self)
        try:
            for place, each in enumerate(inputs):
                settings = None if options is None else options[place]
                deadline = self._shadows.seconds
                self._tickets.append(
                    engines.submit(self._kind, each, version, settings, priority=LOW_PRIORITY, deadline=deadline)
                )
        except Exception as error:
            self._error, self._ended_at = error, clock()
            self.cancel()
            self._end()
            return
        for shadow, tickets in ((True, list(self._tickets)), (False, self._request_tickets)):
            for place, ticket in enumerate(tickets):
                ticket.listen(self._listener(shadow, place))

    def cancel(self) -> None:
        for ticket in list(self._tickets):
            ticket.cancel()

    def _listener(self, shadow: bool, place: int) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, Piece):
                return
            with self._lock:
                self._answers[shadow, place] = event.answer if isinstance(event, Done) else None
                if shadow:
                    self._ended_at = self._shadows.clock()
                    if isinstance(event, Failed):
                        self._error = self._error or event.error
                complete = len(self._answers) == len(self._tickets) + len(self._request_tickets)
            if complete:
                self._end()

        return hear

    def _end(self) -> None:
        try:
            self._record()
        finally:
            with self._shadows.lock:
                self._shadows.inputs -= len(self._request_tickets)
                self._shadows.running.discard(self)

    def _record(self) -> None:
        shadows, placement, arm = self._shadows, self._placement, self._arm
        seconds, agrees = self._ended_at - self._started_at, self._agrees()
        assert placement.assignment is not None
        if self._error is not None:
            own = shadows.routing.failed(placement, self._kind, self._error, seconds, arm)
            what = "failed" if own else "shed"
        else:
            shadows.routing.router.shadowed(placement.assignment, arm, seconds=seconds, agrees=agrees)
            what = "answered" if agrees is None else "agreed" if agrees else "differed"
        experiment = str(placement.experiment)
        shadows.metrics.shadow(experiment, arm, what)
        if shadows.log is not None:
            answers = [self._answers.get((True, place)) for place in range(len(self._request_tickets))]
            shadows.log.write("shadow", experiment=experiment, arm=arm, what=what, answers=answers)

    def _agrees(self) -> bool | None:
        """Whether the task judges all answers equal; None if one is missing, or if texts are sampled."""
        pairs = [
            (self._answers.get((True, place)), self._answers.get((False, place)))
            for place in range(len(self._request_tickets))
        ]
        both = [(shadow, answer) for shadow, answer in pairs if shadow and answer]
        task = self._shadows.routing.task(self._placement.experiment)
        if self._samples or len(both) < len(pairs) or task.request != self._kind:
            return None
        return all(task.judged(shadow) == task.judged(answer) for shadow, answer in both)
