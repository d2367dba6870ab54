"""Many texts in one call: one request for each text, as many at a time as the queue takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from turret.engine.options import Options
from turret.engine.request import Answer, Kind, Limits, Ticket
from turret.errors import Busy, DataError


def answers(
    submit: Callable[..., Ticket],
    kind: Kind,
    texts: Sequence[str],
    adapter: str | None,
    options: Options | None,
    limits: Limits,
    priority: int,
    deadline: float | None,
) -> list[Answer]:
    """The answers, in the order of the texts. The first error fails the call and cancels the other requests.

    Args:
        submit: `Engine.submit`; the other arguments are its own.

    Raises:
        DataError: For one string, or for too few or too many texts.
        TurretError: The error of the first request that failed.
    """
    most = limits.max_inputs
    if isinstance(texts, str) or not texts or len(texts) > most:
        given = "one text" if isinstance(texts, str) else f"{len(texts)} texts"
        raise DataError(f"expected a list of 1 to {most} texts (limit max_inputs), given {given}")
    ask = functools.partial(submit, kind, adapter=adapter, options=options, priority=priority, deadline=deadline)
    tickets: list[Ticket] = []
    try:
        for text in texts:
            tickets.append(_submitted(text, ask, tickets))
        return [ticket.result() for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.cancel()


def _submitted(text: str, submit: Callable[[str], Ticket], before: Sequence[Ticket]) -> Ticket:
    """The ticket of a text. While the queue is full, wait for the earlier texts of this call."""
    while True:
        try:
            return submit(text)
        except Busy:
            first = next((each for each in before if not each.done), None)
            if first is None:
                raise
            first.result()
