"""Versions that are run beside an answer: recorded, compared, never returned. No torch, no HTTP.

A shadow is put to the engine right behind the request that it watches, with a lower priority and by a thread of its
own: it shares passes with it, takes no place before anybody, and whoever waits for the answer does not wait for it. At
most `most` inputs are at work or waiting at a time; what comes beyond that, or when the engine is full, is shed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from turret.server.engine_protocol import EngineProtocol, Kind, Text, TicketProtocol
from turret.server.logs import Log
from turret.server.metrics import Metrics
from turret.server.routing import Placed, Routing

BEHIND = -1  # priority: everybody else's is 0


class Shadows:
    """All that are at work on this server."""

    def __init__(
        self,
        engine: EngineProtocol,
        routing: Routing,
        metrics: Metrics,
        *,
        most: int,
        seconds: float,
        clock: Callable[[], float],
        log: Log | None,
    ) -> None:
        self._engine, self._routing, self._metrics = engine, routing, metrics
        self._most, self._seconds, self._clock, self._log = most, seconds, clock, log
        self._thread = ThreadPoolExecutor(1, "turret-shadow")
        self._lock = threading.Lock()
        self._taken = 0  # inputs
        self._at_work: set[ShadowRequest] = set()
        self._over = False

    def beside(
        self,
        placed: Placed,
        kind: Kind,
        texts: Sequence[Text],
        options: Sequence[Any] | None,
        tickets: Sequence[TicketProtocol],
    ) -> None:
        """Run the shadows of the experiment beside these tickets, as far as there is room. Returns at once."""
        if placed.found is None:
            return
        for arm, version in placed.found.shadows:
            if not self._take(len(texts)):
                self._metrics.shadow(str(placed.experiment), arm, "shed")
                continue
            each = ShadowRequest(self, placed, arm, kind, tickets)
            with suppress(RuntimeError):  # it is going down
                self._thread.submit(each.run, version, list(texts), options)

    def close(self) -> None:
        """Take all of them back."""
        with self._lock:
            self._over = True
            left = list(self._at_work)
        self._thread.shutdown(wait=False, cancel_futures=True)
        for each in left:
            each.cancel()

    @property
    def inputs(self) -> int:
        """At work or waiting now."""
        return self._taken

    def _take(self, inputs: int) -> bool:
        with self._lock:
            if self._over or self._taken + inputs > self._most:
                return False
            self._taken += inputs
            return True


class ShadowRequest:
    """One shadow of one request: ends when it and the answer that it is compared with have ended."""

    def __init__(self, all_: Shadows, placed: Placed, arm: str, kind: Kind, tickets: Sequence[TicketProtocol]) -> None:
        self._all, self._placed, self._arm, self._kind = all_, placed, arm, kind
        self._seen = list(tickets)  # those that are returned
        self._tickets: list[TicketProtocol] = []
        self._answers: dict[tuple[bool, int], Any] = {}  # (a shadow's, input) -> its answer, None where it has none
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._ended = 0.0
        self._sampled = False

    def run(self, version: str, texts: Sequence[Text], options: Sequence[Any] | None) -> None:
        """On the shadows' thread: ask, and listen. Nothing that goes wrong here reaches anybody."""
        engine, clock = self._all._engine, self._all._clock
        self._began = self._ended = clock()
        self._sampled = options is not None and bool(getattr(options[0], "samples", False))
        with self._all._lock:
            self._all._at_work.add(self)
        try:
            for place, text in enumerate(texts):
                asked = None if options is None else options[place]
                deadline = self._all._seconds
                self._tickets.append(
                    engine.submit(self._kind, text, version, asked, priority=BEHIND, deadline=deadline)
                )
        except Exception as error:
            self._error, self._ended = error, clock()
            self.cancel()
            self._tell()
            return
        for shadow, tickets in ((True, list(self._tickets)), (False, self._seen)):
            for place, ticket in enumerate(tickets):
                ticket.listen(self._listener(shadow, place))

    def cancel(self) -> None:
        for ticket in list(self._tickets):
            ticket.cancel()

    def _listener(self, shadow: bool, place: int) -> Callable[[Any], None]:
        def hear(event: Any) -> None:
            error, answer = getattr(event, "error", None), getattr(event, "answer", None)
            if error is None and answer is None:
                return  # a piece
            with self._lock:
                self._answers[shadow, place] = answer
                if shadow:
                    self._ended = self._all._clock()
                    self._error = self._error or error
                whole = len(self._answers) == len(self._tickets) + len(self._seen)
            if whole:
                self._tell()

        return hear

    def _tell(self) -> None:
        """It has ended: record what is known of it, and then, whatever comes of that, make room for the next."""
        try:
            self._record()
        finally:
            with self._all._lock:
                self._all._taken -= len(self._seen)
                self._all._at_work.discard(self)

    def _record(self) -> None:
        routing, seconds, agrees = self._all._routing, self._ended - self._began, self._agrees()
        assert self._placed.found is not None
        if self._error is not None:
            own = routing.failed(self._placed, self._kind, self._error, seconds, self._arm)
            what = "failed" if own else "shed"
        else:
            routing.router.shadowed(self._placed.found, self._arm, seconds=seconds, agrees=agrees)
            what = "answered" if agrees is None else "agreed" if agrees else "differed"
        self._all._metrics.shadow(str(self._placed.experiment), self._arm, what)
        if self._all._log is not None:  # texts are logged
            answers = [self._answers.get((True, place)) for place in range(len(self._seen))]
            experiment = str(self._placed.experiment)
            self._all._log.say("shadow", experiment=experiment, arm=self._arm, what=what, answers=answers)

    def _agrees(self) -> bool | None:
        """The same labels or texts for all inputs; None where one has no answer, or texts are drawn by chance."""
        pairs = [
            (self._answers.get((True, place)), self._answers.get((False, place))) for place in range(len(self._seen))
        ]
        both = [(shadow, seen) for shadow, seen in pairs if shadow and seen]
        if self._sampled or len(both) < len(pairs):
            return None
        key = "label" if self._kind == "classify" else "text"
        return all(shadow[key] == seen[key] for shadow, seen in both)
