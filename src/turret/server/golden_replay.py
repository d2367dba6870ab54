"""Golden examples put to the engine that serves, so that a promote over HTTP loads no second base.

A few at a time and behind everybody's questions: a promote holds up no answer, however many examples there are. Refuses
to know what is right and what an alias asks for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from turret.errors import Busy, Draining
from turret.server.engine_protocol import Kind, TicketProtocol
from turret.server.pending_answers import Answer
from turret.server.shadows import BEHIND
from turret.server.state import ServerState
from turret.tasks import stored_task

AT_ONCE = 16
PATIENCE = 60.0  # seconds that a full queue is waited for


def answers(here: ServerState, reference: str, texts: Sequence[str]) -> list[Answer]:
    """What the version answers to each text, in order; blocking. Raises what `submit` and its tickets do."""
    kind = stored_task(here.workspace.resolve(reference).part("task")).request
    found: list[Answer] = []
    for start in range(0, len(texts), AT_ONCE):
        tickets: list[TicketProtocol] = []
        try:
            tickets.extend(_submitted(here, kind, reference, text) for text in texts[start : start + AT_ONCE])
            found += [ticket.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()
    return found


def _submitted(here: ServerState, kind: Kind, reference: str, text: str) -> TicketProtocol:
    until = time.monotonic() + PATIENCE
    while True:
        if here.load.draining:
            raise Draining("the server is going down: not all golden examples were asked, and nothing was moved")
        try:
            return here.engine.submit(kind, text, reference, priority=BEHIND, deadline=here.limits.answer_seconds)
        except Busy as error:
            if time.monotonic() >= until:
                raise
            time.sleep(min(1.0, max(0.01, error.retry_after)))
