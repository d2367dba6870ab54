"""The tickets of one request, heard in the event loop, and given back when nobody listens any more.

An engine speaks from a thread of its own; `Asked` hands its events over to the loop, in order. Whoever opened one
closes it: what is unfinished then is cancelled, so a client that goes away frees its place between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request

from turret.errors import Cancelled, DeadlineExceeded, NotFound
from turret.server.engine_protocol import ReceiptProtocol, Text, TicketProtocol, named
from turret.server.routing import Placed

T = TypeVar("T")
Answer = dict[str, Any]
TRIES = 4  # after the first, of a request whose version is deleted while it waits to be loaded
CHARACTERS = 4  # of a token, where nobody has counted
LEAST = 64  # characters of a text for which a token is charged at least, however few of its tokens are kept


class Submission(NamedTuple):
    """The inputs of one request, at the engine: all at one version, the one of an experiment's arm or not."""

    tickets: Sequence[TicketProtocol]
    placed: Placed | None


class PendingAnswers:
    """Tickets at work, in the order of their inputs; all of one version. began: on the clock, when they were put."""

    def __init__(
        self,
        put: Submission,
        texts: Sequence[Text],
        request: Request,
        seconds: float,
        server: str,
        submit: Callable[[], Coroutine[Any, Any, Submission]],
        began: float,
        clock: Callable[[], float],
    ) -> None:
        self._server, self._submit = server, submit
        self.began, self._clock = began, clock
        self.error: BaseException | None = None  # what was raised to whoever asked
        self._tries = TRIES
        self._guessed = [len(text) // CHARACTERS + 1 if isinstance(text, str) else len(text) for text in texts]
        self._least = [len(text) // LEAST if isinstance(text, str) else 0 for text in texts]
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + seconds
        self._hear(put)

    def _hear(self, put: Submission) -> None:
        tickets, self.placed = put
        self.tickets = tickets
        self._heard = self._clock()
        self.receipt: ReceiptProtocol = tickets[0].receipt
        self.answers: list[Answer | None] = [None] * len(tickets)
        self._pieces = [0] * len(tickets)
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        for place, ticket in enumerate(tickets):
            ticket.listen(self._listener(place, self._events))

    @property
    def id(self) -> str:
        """Of the answer: the engine counts its own, and every server that ever ran has another first part."""
        return f"{self._server}-{self.receipt.id}"

    @property
    def model(self) -> str | None:
        return named(self.receipt)

    @property
    def headers(self) -> dict[str, str]:
        """The receipt, as every answer carries it."""
        said = {
            "turret-receipt": self.id,
            "turret-adapter": self.receipt.name,
            "turret-version": str(self.receipt.number) if self.receipt.name else None,
            "turret-digest": self.receipt.digest,
            "turret-base": self.receipt.base,
            **(self.placed.headers if self.placed is not None else {}),
        }
        return {key: value for key, value in said.items() if value is not None}

    @property
    def seconds(self) -> float:
        """From putting it until the engine said the last word so far, however slowly the client reads."""
        return self._heard - self.began

    @property
    def spoke(self) -> bool:
        """Whether anything was answered yet."""
        return any(self._pieces) or any(answer is not None for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Read and decided: what a quota is charged. Of an answer that nobody waited for, the pieces that came; of a
        prompt that the engine does not count, a guess by its length."""
        total = 0
        counts = zip(self.answers, self._pieces, self._guessed, self._least, strict=True)
        for answer, pieces, guess, least in counts:
            total += max(prompt_tokens(answer or {}) or guess, least)
            total += pieces if answer is None else made_tokens(answer)
        return total

    async def all(self) -> list[Answer]:
        """An answer per input, or the first error; raises Cancelled when the client goes away before."""
        await unless_gone(self._request, self._all())
        return [answer for answer in self.answers if answer is not None]

    async def _all(self) -> None:
        async for _ in self.events():
            pass

    async def first(self) -> tuple[tuple[int, str | None], AsyncIterator[tuple[int, str | None]]]:
        """The first event, and the rest: what fails before anything was said is an answer of its own."""
        events = self.events()
        return await unless_gone(self._request, anext(events)), events

    async def events(self) -> AsyncIterator[tuple[int, str | None]]:
        """(which input, a piece of text; None once its answer is whole), as they come; raises the first error."""
        left = len(self.tickets)
        while left:
            place, event = await self._next()
            if (error := getattr(event, "error", None)) is not None:
                if not isinstance(error, NotFound) or self.spoke or not self._tries:
                    self.error = error
                    raise error
                await self._again()
                continue
            if (answer := getattr(event, "answer", None)) is not None:
                self.answers[place] = answer
                left -= 1
                yield place, None
            else:
                self._pieces[place] += 1
                yield place, event.text

    def close(self) -> None:
        """Take back what is not finished."""
        for ticket, answer in zip(self.tickets, self.answers, strict=True):
            if answer is None:
                ticket.cancel()

    async def _again(self) -> None:
        """All once more: the version was deleted while it waited to be loaded, and the reference means another now."""
        self._tries -= 1
        self.close()
        submitted = asyncio.ensure_future(self._submit())
        try:
            self._hear(await asyncio.shield(submitted))
        except asyncio.CancelledError:
            submitted.add_done_callback(_give_back)
            raise

    async def _next(self) -> tuple[int, Any]:
        try:
            async with asyncio.timeout_at(self._until):
                return await self._events.get()
        except TimeoutError:
            self.error = DeadlineExceeded("the answer was not there in time: ask for less at once, or fewer tokens")
            raise self.error from None

    def _listener(self, place: int, events: asyncio.Queue[tuple[int, Any]]) -> Callable[[Any], None]:
        def hear(event: Any) -> None:
            if events is self._events:
                self._heard = self._clock()
            with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
                self._loop.call_soon_threadsafe(events.put_nowait, (place, event))

        return hear


def _give_back(submitted: asyncio.Future[Submission]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for ticket in submitted.result().tickets:
            ticket.cancel()


def prompt_tokens(answer: Answer) -> int:
    return int(answer.get("prompt_tokens") or 0)


def made_tokens(answer: Answer) -> int:
    return int(answer.get("tokens") or 0)


async def unless_gone(request: Request, wanted: Awaitable[T]) -> T:
    """What is waited for; raises Cancelled when the client goes away first."""
    work, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise Cancelled("the client went away")
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
