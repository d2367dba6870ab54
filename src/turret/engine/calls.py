"""Many texts in one call: a request each, as many at a time as the queue takes. Knows tickets alone; loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from turret.engine.request import Answer, Ticket
from turret.errors import Busy, DataError


def answers(texts: Sequence[str], submit: Callable[[str], Ticket], most: int) -> list[Answer]:
    """An answer a text, in their order. The first that fails fails the call, and the others are cancelled."""
    if isinstance(texts, str) or not texts or len(texts) > most:
        given = "one text" if isinstance(texts, str) else f"{len(texts)} texts"
        raise DataError(f"expected a list of 1 to {most} texts (limit max_inputs), given {given}")
    tickets: list[Ticket] = []
    try:
        for text in texts:
            tickets.append(_submitted(text, submit, tickets))
        return [ticket.result() for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.cancel()


def _submitted(text: str, submit: Callable[[str], Ticket], before: Sequence[Ticket]) -> Ticket:
    """Its ticket; while the queue is full, the call's own earlier texts are waited for."""
    while True:
        try:
            return submit(text)
        except Busy:
            first = next((each for each in before if not each.done), None)
            if first is None:
                raise
            first.result()
