"""The tickets of one request, and their events in the event loop.

The engine calls listeners from its own thread; `PendingAnswers` passes the events to the loop, in order. `close`
cancels what is unfinished, so the request of a client that disconnects is freed between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from starlette.requests import Request

from turret.data import Prompt, TextPair
from turret.engine import Done, Event, Failed, Piece, Receipt
from turret.errors import DeadlineExceeded, Disconnected, NotFound
from turret.server.engine_protocol import Answer, Input, TicketProtocol
from turret.server.routing import Placement
from turret.server.schemas import Usage

T = TypeVar("T")
Update = tuple[int, Piece | None]  # (which input, a piece of its text); None once its answer is complete
RETRIES = 4  # of a request whose version is deleted while it waits to be loaded
CHARACTERS_PER_TOKEN = 4  # of a prompt that the engine does not count
CHARACTERS_PER_CHARGED_TOKEN = 64  # a prompt is charged at least one token for so many, even if most of it is cut


class Submission(NamedTuple):
    """The inputs of one request at the engine: all at one version."""

    tickets: Sequence[TicketProtocol]
    placement: Placement | None


class PendingAnswers:
    """The answers of one request, in the order of its inputs.

    Args:
        submission: The tickets.
        inputs: What was submitted.
        request: Watched for a disconnect.
        seconds: Until the answers are abandoned.
        server: Prefix of the answers' ids.
        submit: Submits the request again.
        started: When the request was submitted, on the clock.
    """

    def __init__(
        self,
        submission: Submission,
        inputs: Sequence[Input],
        request: Request,
        seconds: float,
        server: str,
        submit: Callable[[], Awaitable[Submission]],
        started: float,
        clock: Callable[[], float],
    ) -> None:
        self._server, self._submit, self.inputs = server, submit, inputs
        self.started, self._clock = started, clock
        self.error: BaseException | None = None  # the one that the request failed with
        self._retries = RETRIES
        self._guesses: list[int] = []
        self._charges: list[int] = []
        for each in inputs:
            if isinstance(each, (str, TextPair, Prompt)):
                characters = each.characters if isinstance(each, Prompt) else len(str(each))
                self._guesses.append(characters // CHARACTERS_PER_TOKEN + 1)
                self._charges.append(characters // CHARACTERS_PER_CHARGED_TOKEN)
            else:  # token ids
                self._guesses.append(len(each))
                self._charges.append(0)
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + seconds
        self._listen(submission)

    def _listen(self, submission: Submission) -> None:
        tickets, self.placement = submission
        self.tickets = tickets
        self._last_event = self._clock()
        self.receipt: Receipt = tickets[0].receipt
        self.answers: list[Answer | None] = [None] * len(tickets)
        self._pieces = [0] * len(tickets)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        for place, ticket in enumerate(tickets):
            ticket.listen(self._listener(place, self._events))

    @property
    def id(self) -> str:
        """The id of the answer: the engine's own number, after a prefix that differs between servers."""
        return f"{self._server}-{self.receipt.id}"

    @property
    def model(self) -> str | None:
        """The version that answers, as `name@3`; None for the bare base."""
        return self.receipt.version

    @property
    def headers(self) -> dict[str, str]:
        """The receipt, as the headers of the response."""
        headers = {
            "turret-receipt": self.id,
            "turret-adapter": self.receipt.name,
            "turret-version": str(self.receipt.number) if self.receipt.name else None,
            "turret-digest": self.receipt.digest,
            "turret-base": self.receipt.base,
            **(self.placement.headers if self.placement is not None else {}),
        }
        if cut := sum(ticket.cut for ticket in self.tickets):
            headers["turret-truncated"] = str(cut)
        return {key: value for key, value in headers.items() if value is not None}

    @property
    def seconds(self) -> float:
        """Seconds from submission to the last engine event."""
        return self._last_event - self.started

    @property
    def has_output(self) -> bool:
        """Whether any part of an answer has come."""
        return any(self._pieces) or any(answer is not None for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens read and generated so far, as quotas charge them."""
        return sum(self.token_counts)

    @property
    def token_counts(self) -> tuple[int, int]:
        """Tokens read, and tokens generated so far.

        An unfinished answer counts its pieces. A prompt that the engine does not count is estimated by its length.
        """
        read = generated = 0
        counts = zip(self.answers, self._pieces, self._guesses, self._charges, strict=True)
        for answer, pieces, guess, charge in counts:
            read += max(prompt_tokens(answer or {}) or guess, charge)
            generated += pieces if answer is None else generated_tokens(answer)
        return read, generated

    async def all(self) -> list[Answer]:
        """An answer for each input, or the first error. Raises Disconnected if the client leaves first."""
        await unless_disconnected(self._request, self.drain())
        return self.complete

    @property
    def complete(self) -> list[Answer]:
        """The answers that have come, in the order of the inputs."""
        return [answer for answer in self.answers if answer is not None]

    async def drain(self) -> None:
        """Wait for all answers. Raises the first error."""
        async for _ in self.events():
            pass

    async def first(self) -> tuple[Update, AsyncIterator[Update]]:
        """The first update, and the rest. An error before the first update is raised, so it gets an HTTP status."""
        events = self.events()
        return await unless_disconnected(self._request, anext(events)), events

    async def events(self) -> AsyncIterator[Update]:
        """Pieces and ends of answers as they come. Raises the first error."""
        left = len(self.tickets)
        while left:
            place, event = await self._next()
            if isinstance(event, Failed):
                if not isinstance(event.error, NotFound) or self.has_output or not self._retries:
                    self.error = event.error
                    raise event.error
                await self._retry()
            elif isinstance(event, Done):
                self.answers[place] = event.answer
                left -= 1
                yield place, None
            else:
                self._pieces[place] += 1
                yield place, event

    def close(self) -> None:
        """Cancel what is unfinished."""
        for ticket, answer in zip(self.tickets, self.answers, strict=True):
            if answer is None:
                ticket.cancel()

    async def _retry(self) -> None:
        """Submit again: the version was deleted before it was loaded, and the reference means another one now."""
        self._retries -= 1
        self.close()
        submitted = asyncio.ensure_future(self._submit())
        try:
            self._listen(await asyncio.shield(submitted))
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_tickets)
            raise

    async def _next(self) -> tuple[int, Event]:
        try:
            async with asyncio.timeout_at(self._until):
                return await self._events.get()
        except TimeoutError:
            self.error = DeadlineExceeded(
                "the answer was not ready in time: send fewer inputs, or ask for fewer tokens"
            )
            raise self.error from None

    def _listener(self, place: int, events: asyncio.Queue[tuple[int, Event]]) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if events is self._events:
                self._last_event = self._clock()
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(events.put_nowait, (place, event))

        return hear


def _cancel_tickets(submitted: asyncio.Future[Submission]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for ticket in submitted.result().tickets:
            ticket.cancel()


def prompt_tokens(answer: Answer) -> int:
    return int(answer.get("prompt_tokens") or 0)


def generated_tokens(answer: Answer) -> int:
    return int(answer.get("tokens") or 0)


def usage(answers: Sequence[Answer]) -> Usage | None:
    """OpenAI's `usage`; None if the engine does not count prompts."""
    if not all("prompt_tokens" in answer for answer in answers):
        return None
    read, generated = sum(map(prompt_tokens, answers)), sum(map(generated_tokens, answers))
    return Usage(prompt_tokens=read, completion_tokens=generated, total_tokens=read + generated)


async def wait_for_all(pending: Sequence[PendingAnswers]) -> None:
    """Wait for the answers of every one. Raises the first error."""
    waiting = [asyncio.ensure_future(each.drain()) for each in pending]
    try:
        await asyncio.gather(*waiting)
    finally:
        for each in waiting:
            each.cancel()


async def unless_disconnected(request: Request, result: Awaitable[T]) -> T:
    """The result. Raises Disconnected if the client leaves first."""
    work, gone = asyncio.ensure_future(result), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise Disconnected("the client left before it had its answer")
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
