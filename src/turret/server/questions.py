"""Questions of one request: submitted to the engines, awaited in the event loop, charged and counted.

`Asker.ask` submits the inputs of a request to a version, or to the version of an experiment's arm. The engine calls
listeners from its own thread; `PendingAnswers` passes the events to the loop, in order. `close` cancels what is
unfinished, so the request of a client that disconnects is freed between two steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple, Protocol, TypeAlias, TypeVar

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel, Field

from turret.access import DEFAULT
from turret.data import Prompt, TextPair
from turret.engine import Done, Event, Failed, Piece, Receipt, SamplingParams, Ticket
from turret.errors import BadRequest, Cancelled, DeadlineExceeded, Disconnected, NotFound, TurretError
from turret.json_types import JsonObject
from turret.server.auth import Caller, access_of
from turret.server.engines import Input
from turret.server.limits import MOST_UNIT, Quota
from turret.server.live_promises import Covered
from turret.server.routing import Placement
from turret.server.services import Services, View
from turret.store.usage import BASE
from turret.tasks.shapes import Answer, TaskSpec
from turret.tasks.task import RequestKind

T = TypeVar("T")
Options: TypeAlias = Sequence[SamplingParams] | None  # one for each input; None: the server's own
Update = tuple[int, Piece | None]  # (which input, a piece of its text); None once its answer is complete
RETRIES = 4  # of a request whose version is deleted while it waits to be loaded
MOST_SUBMITS = 5  # of a request whose version is deleted while its inputs are submitted
MOST_LOGGED = 32  # versions of one request that its line in the log names
CHARACTERS_PER_TOKEN = 4  # of a prompt that the engine does not count
CHARACTERS_PER_CHARGED_TOKEN = 64  # a prompt is charged at least one token for so many, even if most of it is cut


class Submission(NamedTuple):
    """The inputs of one request at the engine: all at one version."""

    tickets: Sequence[Ticket]
    placement: Placement | None


class PendingAnswers:
    """The answers of one request, in the order of its inputs.

    Args:
        asker: Its request is watched for a disconnect.
        inputs: What was submitted.
        submission: The tickets.
        submit: Submits the request again.
    """

    def __init__(
        self, asker: Asker, inputs: Sequence[Input], submission: Submission, submit: Callable[[], Awaitable[Submission]]
    ) -> None:
        services, self._request = asker.view.services, asker.request
        self._server, self._submit, self.inputs = services.id, submit, inputs
        self.started: float = asker.request.state.started
        self._clock = services.clock
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
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + services.limits.answer_seconds + 1  # the engine's own deadline comes first
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

    def reply(self, kind: str, asked: str) -> JsonObject:
        """The values of a `Reply`. asked: the model of the request."""
        return {"id": f"{kind}-{self.id}", "created": now(), "model": self.model or asked}

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


class Reply(BaseModel):
    """What the answers of OpenAI's API have in common."""

    id: str
    created: int
    model: str = Field(description="The version that answered, such as name@3.")


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(answers: Sequence[Answer]) -> TokenUsage | None:
    """OpenAI's `usage`; None if the engine does not count prompts."""
    if not all("prompt_tokens" in answer for answer in answers):
        return None
    read, generated = sum(map(prompt_tokens, answers)), sum(map(generated_tokens, answers))
    return TokenUsage(prompt_tokens=read, completion_tokens=generated, total_tokens=read + generated)


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


# --- asking ---------------------------------------------------------------------------------------------------------


class Question(Protocol):
    """The body of a request that asks. user: the unit of an experiment, unless the header names one."""

    model: str
    user: str | None


@dataclass(frozen=True)
class Asker:
    """A request that asks versions, with the response to it. unit: of an experiment, as the header names it."""

    view: View
    request: Request
    response: Response
    unit: str | None

    @asynccontextmanager
    async def ask(
        self, kind: RequestKind, body: Question, inputs: Sequence[Input], options: Options = None
    ) -> AsyncIterator[PendingAnswers]:
        """Submit the inputs to one version. The end of the block cancels what is unfinished. options: of each input."""
        (pending,) = await _submit_to(self, _Asked(kind, inputs, options, self.unit or body.user), [body.model])
        try:
            yield pending
        finally:
            finish(self, kind, pending)

    async def answers(
        self, kind: RequestKind, body: Question, inputs: Sequence[Input], options: Options = None
    ) -> tuple[PendingAnswers, list[Answer]]:
        """All answers; the response gets their receipt. As `ask`."""
        async with self.ask(kind, body, inputs, options) as pending:
            answers = await pending.all()
        self.response.headers.update(pending.headers)
        return pending, answers

    @asynccontextmanager
    async def ask_each(
        self, kind: RequestKind, body: Question, models: Sequence[str], input: Input
    ) -> AsyncIterator[Sequence[PendingAnswers]]:
        """Submit one input to several versions, together; as `ask` for each of them.

        Every version is placed, counted, charged and logged as if it had been asked alone. The block begins when all
        have answered. Raises the first error.
        """
        pending = await _submit_to(self, _Asked(kind, [input], None, self.unit or body.user), models)
        try:
            await unless_disconnected(self.request, wait_for_all(pending))
            yield pending
        finally:
            finish(self, kind, *pending)


_UNIT = "The unit of an experiment, such as a user's id. Overrides the body's `user`."


def _asker(
    request: Request,
    response: Response,
    turret_unit: Annotated[str | None, Header(description=_UNIT)] = None,
) -> Asker:
    """The header is read as UTF-8; if it is not UTF-8, as Latin-1. It counts as missing if it is empty."""
    unit = turret_unit or None
    with suppress(UnicodeDecodeError):
        unit = unit and unit.encode("latin-1").decode()
    if unit is not None and len(unit) > MOST_UNIT:
        raise BadRequest(f"Turret-Unit has {len(unit)} characters: at most {MOST_UNIT}")
    server: Services = request.app.state.services
    return Asker(server.view(access_of(request)), request, response, unit)


Asking: TypeAlias = Annotated[Asker, Depends(_asker)]


class _Asked(NamedTuple):
    """What a request asks each of its versions. unit: of an experiment, as the client names it."""

    kind: RequestKind
    inputs: Sequence[Input]
    options: Options
    unit: str | None


async def _submit_to(asker: Asker, asked: _Asked, models: Sequence[str]) -> list[PendingAnswers]:
    """Submit the inputs to every model; all or none."""
    view, request = asker.view, asker.request
    await admit(view, request)
    request.state.started = view.services.clock()
    if view.services.settings.log_texts:
        named = ", ".join(models)
        view.services.log.write("texts", request=request.state.request_id, model=named, texts=list(asked.inputs))
    again = partial(_submit, asker, asked)
    try:
        await _compile(view, models[0], asked.options)
    except NotFound as error:
        raise await view.control(view.missing_model, models[0], error) from None
    submissions = await view.asking(_submit_all, view, again, models)
    pending = [
        PendingAnswers(asker, asked.inputs, submission, partial(view.asking, again, model=model))
        for model, submission in zip(models, submissions, strict=True)
    ]
    try:
        for name in filter(None, (each.receipt.name for each in pending)):
            await _take(view, _adapter_key(view, name), f"adapter {name}", view.services.settings.per_adapter)
    except TurretError as error:
        for each in pending:
            each.error = error
            each.close()
        raise
    return pending


def _submit_all(view: View, submit: Callable[..., Submission], models: Sequence[str]) -> list[Submission]:
    """Submit to every model, so that their passes are shared. Raises NotFound, which lists what may be asked."""
    found: list[Submission] = []
    try:
        with view.engines.together() if len(models) > 1 else nullcontext():
            for model in models:
                try:
                    found.append(submit(model=model))
                except NotFound as error:
                    raise view.missing_model(model, error) from None
    except BaseException:
        for each in found:
            for ticket in each.tickets:
                ticket.cancel()
        raise
    return found


async def _compile(view: View, model: str, options: Options) -> None:
    """Compile a request's constraint, the same for all its inputs, where no request without one waits for it."""
    constraint = options[0].constraint if options else None
    if constraint is not None and not view.engines.is_compiled(constraint):
        await view.compiling(view.engines.compile, model, constraint)


async def admit(view: View, request: Request) -> None:
    """Take one request from the quota of the caller, once for each request. Raises QuotaSpent."""
    caller: Caller = request.state.caller
    if caller.name is not None and not getattr(request.state, "admitted", False):
        await _take(view, caller.key, f"token {caller.name}", caller.quota)
        request.state.admitted = True


async def _take(view: View, key: str, owner: str, quota: Quota) -> None:
    """Take one request from a quota that all servers share. Raises QuotaSpent."""
    if not view.services.quotas.admit(key, owner, quota):
        await view.services.replica.reserve(key, owner, quota)


def charge(view: View, request: Request, tokens: int) -> None:
    """Take tokens from the quota of the caller."""
    caller: Caller = request.state.caller
    view.services.quotas.charge(caller.key, caller.quota, tokens)


def count_tokens(view: View, request: Request, tokens: int) -> None:
    """Charge and count a request that reads or writes tokens of a base, and generates none."""
    charge(view, request, tokens)
    view.services.usage.add(view.access.tenant, BASE, 1, tokens, 0)


def finish(asker: Asker, kind: RequestKind, *pending: PendingAnswers) -> None:
    """Cancel what is unfinished, and count what was answered."""
    request = asker.request
    for each in pending:
        _finish(asker.view, request, kind, each)
    if len(pending) > 1:
        request.state.left = any(None in each.answers and each.error is None for each in pending)
        names = [str(each.model) for each in pending]
        request.state.log_fields = {
            "adapters": names[:MOST_LOGGED],
            "receipt": pending[0].id,
            "inputs": len(pending),
            "tokens": sum(each.tokens for each in pending),
        }


def _finish(view: View, request: Request, kind: RequestKind, pending: PendingAnswers) -> None:
    """As `finish`, for one version."""
    pending.close()
    version, tokens, inputs = pending.model or "base", pending.tokens, len(pending.tickets)
    unanswered = sum(answer is None for answer in pending.answers)
    request.state.left = left = bool(unanswered) and pending.error is None  # the client, before its last answer
    failed = 0 if left else unanswered
    seconds = view.services.clock() - request.state.started
    view.metrics.count_request(version, kind, inputs - unanswered, failed, tokens, seconds)
    charge(view, request, tokens)
    view.services.usage.add(
        view.access.tenant, pending.receipt.name or BASE, inputs - unanswered, *pending.token_counts
    )
    if pending.receipt.name:
        view.services.quotas.charge(
            _adapter_key(view, pending.receipt.name), view.services.settings.per_adapter, tokens
        )
    fields = {"adapter": pending.model, "receipt": pending.id, "inputs": inputs, "tokens": tokens}
    if pending.placement is not None:
        _count_placement(view, pending.placement, kind, pending)
        fields |= {"experiment": str(pending.placement.experiment), "arm": pending.placement.arm}
    request.state.log_fields = fields


async def promise_of(view: View, pending: PendingAnswers) -> Covered | None:
    """The promise of the version that answers; None without one."""
    digest = pending.receipt.digest
    if digest is None:
        return None
    if not view.promises.knows(digest):
        await view.asking(view.promises.of, digest)
    return view.promises.of(digest)


async def abstaining(view: View, pending: PendingAnswers, answers: Sequence[Answer]) -> list[bool] | None:
    """Whether each answer is below the threshold of its version's promise; None without a promise. Logs them."""
    covered = await promise_of(view, pending)
    if covered is None:
        return None
    found = view.promises.log_answers(covered, pending.id, answers)
    if covered.watched and view.services.settings.watch_inputs:
        view.sampler.offer(covered.promise.id, pending.receipt.base, pending.inputs)
    view.metrics.count_abstained(pending.model or "base", len(found), sum(found))
    return found


def _adapter_key(view: View, name: str) -> str:
    return f"adapter {name}" if view.access.tenant == DEFAULT else f"adapter {view.access.tenant}/{name}"


def _count_placement(view: View, placement: Placement, kind: RequestKind, pending: PendingAnswers) -> None:
    if placement.assignment is None:
        view.metrics.count_uncounted(str(placement.experiment))
        return
    seconds, failed = pending.seconds, False
    if all(answer is not None for answer in pending.answers):
        view.routing.note_answer(placement, seconds)
    elif pending.error is not None and not isinstance(pending.error, Cancelled):
        failed = True
        if not view.routing.failed(placement, kind, pending.error, seconds):
            return
    else:
        seconds = view.services.clock() - pending.started
        if pending.has_output or not view.routing.abandoned(placement, seconds):
            return
    arm = placement.assignment
    view.metrics.arm(arm.experiment, placement.arm, arm.version, seconds, failed=failed)


def _submit(asker: Asker, asked: _Asked, model: str) -> Submission:
    """Submit every input to the version of its unit's arm, or to the version of the reference."""
    view, request = asker.view, asker.request
    started = view.services.clock()
    is_base = view.engines.is_base(model)
    if not is_base and not view.access.whole:
        for part in model.split("+"):  # several, if adapters are composed
            view.workspace.resolve(part)  # raises NotFound before an experiment of its tenant answers
    placement = None if is_base else view.routing.place(model, asked.unit, request.state.request_id, view.engines.sees)
    arm = None if placement is None else placement.assignment
    if placement is not None:  # the response to an error names the arm too
        request.state.receipt = placement.headers | ({} if arm is None else _version_headers(arm.version))
    try:
        priority = getattr(request.state, "priority", 0)  # below 0 for a line of a batch
        tickets = _tickets(view, asked, model if arm is None else arm.version, priority)
    except BaseException as error:
        if placement is not None and arm is not None:
            seconds = view.services.clock() - started
            if view.routing.refused(placement, asked.kind, error, seconds):
                view.metrics.arm(arm.experiment, arm.arm, arm.version, seconds, failed=True)
        raise
    if placement is not None:
        view.routing.log_accepted(placement, f"{view.services.id}-{tickets[0].receipt.id}")
        view.shadows.start(placement, asked.kind, asked.inputs, asked.options, tickets)
    return Submission(tickets, placement)


def _tickets(view: View, asked: _Asked, model: str, priority: int) -> Sequence[Ticket]:
    """Submit every input to the version that accepted the first one; all or none."""
    for _ in range(MOST_SUBMITS):
        tickets: list[Ticket] = []
        version = model
        try:
            for place, each in enumerate(asked.inputs):
                settings = view.services.default_options if asked.options is None else asked.options[place]
                tickets.append(_ticket(view, asked.kind, each, version, settings, priority))
                version = tickets[0].receipt.version or model
            return tickets
        except BaseException as error:
            for ticket in tickets:
                ticket.cancel()
            if not tickets or not isinstance(error, NotFound):
                raise  # else the version was deleted between two inputs: submit all to its successor
    raise NotFound(f"{ascii(model)[:60]} was deleted several times while the request was submitted: try again")


def _ticket(view: View, kind: RequestKind, text: Input, model: str, options: SamplingParams, priority: int) -> Ticket:
    exact = model if view.engines.is_base(model) else view.aliases.exact(model)
    seconds = view.services.limits.answer_seconds
    try:
        return view.engines.submit(kind, text, exact, options, priority=priority, deadline=seconds)
    except NotFound:
        if exact == model:
            raise
        # The version in force was deleted before the next poll: the store knows what the alias means.
        named = view.aliases.with_alias(model)
        return view.engines.submit(kind, text, named, options, priority=priority, deadline=seconds)


def scores_pairs(task: TaskSpec) -> bool:
    """Whether a version of this task reads two texts together and answers with a number. task: as in a manifest."""
    return bool(task.get("pairs")) and not task.get("labels")


def now() -> int:
    """Seconds since 1970, for OpenAI's `created`."""
    return int(time.time())


def _version_headers(reference: str) -> dict[str, str]:
    name, _, number = reference.partition("@")
    return {"turret-adapter": name, "turret-version": number}
