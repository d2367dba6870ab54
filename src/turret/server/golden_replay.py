"""Ask the serving engines golden examples, so that a promote over HTTP loads no second base.

A few examples at a time, with a lower priority than requests: a promote delays no answer, however many examples it has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from turret.errors import Busy, Draining
from turret.server.engine_protocol import Answer, TicketProtocol
from turret.server.shadows import LOW_PRIORITY
from turret.server.state import ServerState
from turret.tasks import stored_task
from turret.tasks.task import RequestKind

AT_ONCE = 16
PATIENCE = 60.0  # seconds to wait for room in a full queue


def answers(state: ServerState, reference: str, texts: Sequence[str]) -> list[Answer]:
    """The version's answer to each text, in order. Blocks. Raises what `submit` and its tickets raise."""
    kind = stored_task(state.workspace.resolve(reference).part("task")).request
    found: list[Answer] = []
    for start in range(0, len(texts), AT_ONCE):
        tickets: list[TicketProtocol] = []
        try:
            tickets.extend(_submit(state, kind, reference, text) for text in texts[start : start + AT_ONCE])
            found += [ticket.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()
    return found


def _submit(state: ServerState, kind: RequestKind, reference: str, text: str) -> TicketProtocol:
    until = time.monotonic() + PATIENCE
    while True:
        if state.load.draining:
            raise Draining("the server is shutting down: not all golden examples were asked, and nothing was moved")
        try:
            deadline = state.limits.answer_seconds
            return state.engines.submit(kind, text, reference, priority=LOW_PRIORITY, deadline=deadline)
        except Busy as error:
            if time.monotonic() >= until:
                raise
            time.sleep(min(1.0, max(0.01, error.retry_after)))
