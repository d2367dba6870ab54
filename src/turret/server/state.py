"""Everything that a handler needs, in one object, and the two ways into the engine: questions and control.

Questions, control and outcomes have threads of their own: no flood of loads holds up an answer. Refuses to know routes.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

from starlette.requests import Request

from turret.errors import Cancelled, NotFound, TurretError
from turret.server.alias_watcher import AliasWatcher
from turret.server.auth import Asker, Guard
from turret.server.connections import ClientConnections, Network
from turret.server.engine_protocol import EngineProtocol, Kind, Text, TicketProtocol, named
from turret.server.limits import Load, RequestLimits
from turret.server.logs import Log
from turret.server.metrics import Metrics, numbers
from turret.server.pending_answers import PendingAnswers, Submission
from turret.server.quotas import Quota, Quotas
from turret.server.routing import Placed, Routing
from turret.server.shadows import Shadows
from turret.server.thread_pool import ThreadPool
from turret.workspace import Workspace

POLL_SECONDS = 0.25
TURN_SECONDS = 0.5  # between two turns of the router, which reads what runs once a second
SETTLE_SECONDS = 3.0  # between two looks at what the guards of experiments ask
MOST_ASIDE = 4  # promotes that ask golden examples at a time, those that wait for their turn included
TRIES = 5  # of one request whose version is deleted while its inputs go in


@dataclass(frozen=True)
class ServerSettings:
    """What `turret serve` was told."""

    host: str = "127.0.0.1"
    port: int = 8000
    alias: str = "production"  # what plain names mean, and loaded beforehand
    limits: RequestLimits = field(default_factory=RequestLimits)
    per_adapter: Quota = field(default_factory=Quota)
    log_texts: bool = False
    proxies: Sequence[Network] = ()  # their connections are many clients', and have no limit of their own


class ServerState:
    """One workspace and one engine, served. options: the engine's own class for the settings of a generation."""

    def __init__(
        self,
        workspace: Workspace,
        engine: EngineProtocol,
        options: Callable[..., Any],
        settings: ServerSettings | None = None,
        *,
        log: Log | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workspace, self.engine, self.options = workspace, engine, options
        self.settings = settings or ServerSettings()
        self.limits = self.settings.limits
        self.log, self.clock = log or Log(), clock
        self.began, self.id = int(time.time()), secrets.token_hex(4)
        self.load = Load()
        self.clients = ClientConnections(
            self.limits.connections, self.limits.connections_per_client, self.settings.proxies
        )
        self.guard = Guard(self.settings.host, workspace.tokens.list(), clock)
        self.quotas = Quotas(clock)
        self.metrics = Metrics(self._gauges)
        self.follow = AliasWatcher(
            workspace.store.last_move,
            workspace.store.pointing,
            engine.warm,
            self.in_memory,
            base=engine.base.fingerprint,
            alias=self.settings.alias,
            clock=clock,
        )
        self.routing = Routing(
            workspace.router(),
            self.follow,
            engine.warm,
            workspace.resolve,
            base=engine.base.fingerprint,
            clock=clock,
        )
        self.shadows = Shadows(
            engine,
            self.routing,
            self.metrics,
            most=self.limits.shadow_inputs,
            seconds=self.limits.answer_seconds,
            clock=clock,
            log=self.log if self.settings.log_texts else None,
        )
        waiting = self.limits.control_waiting
        self._asking = ThreadPool("ask", 8, 2 * self.limits.in_flight, "questions are being put", 1)
        self.reading = ThreadPool("read", 1, self.limits.in_flight, "large bodies are being read", 1)
        # For verbs that may take their time; for those that may take minutes, one by one, so that the others go on.
        self.control = ThreadPool("control", 4, waiting, "verbs of the control plane are waiting", 1)
        self.aside = ThreadPool("aside", 1, MOST_ASIDE, "promotes are asking golden examples", 10)
        self.telling = ThreadPool("tell", 1, self.limits.outcomes_waiting, "requests with outcomes are waiting", 1)
        self._ended, self._settling = threading.Event(), threading.Lock()
        self._followers: list[threading.Thread] = []
        self._away: set[str] = set()  # those of them that could not reach the store when they last looked

    def now(self) -> int:
        """What OpenAI calls `created`: seconds since 1970."""
        return int(time.time())

    # --- the base and what is on it ---------------------------------------------------------------------------------

    @property
    def base_id(self) -> str:
        """The base's id; of a folder, its last name only."""
        said = self.engine.base.id
        return said.replace("\\", "/").rstrip("/").rpartition("/")[2] if said.startswith(("/", ".", "~")) else said

    def in_memory(self, digest: str) -> bool:
        return any(each.digest == digest for each in self.engine.loaded())

    # --- questions --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def ask(
        self,
        request: Request,
        kind: Kind,
        model: str,
        texts: Sequence[Text],
        options: Sequence[Any] | None = None,
        *,
        unit: str | None = None,
    ) -> AsyncIterator[PendingAnswers]:
        """Put the inputs of one request to one version; what is unfinished at the end of the block is cancelled.

        unit: whose request it is, as the client says; an experiment assigns it.
        """
        asked = await self.open(request, kind, model, texts, options, unit=unit)
        try:
            yield asked
        finally:
            self.close(request, kind, asked)

    async def open(
        self,
        request: Request,
        kind: Kind,
        model: str,
        texts: Sequence[Text],
        options: Sequence[Any] | None = None,
        *,
        unit: str | None = None,
    ) -> PendingAnswers:
        """As `ask`, for a stream: whoever opens it closes it."""
        asker: Asker = request.state.asker
        if asker.name is not None:
            self.quotas.admit(asker.key, f"token {asker.name}", asker.quota)
        request.state.began = self.clock()
        if self.settings.log_texts:
            self.log.say("texts", request=request.state.request_id, model=model, texts=list(texts))
        submit = partial(self._asking, self._submit, request, kind, model, texts, options, unit)
        seconds = self.limits.answer_seconds + 1  # the engine's own deadline is first
        asked = PendingAnswers(
            await submit(), texts, request, seconds, self.id, submit, request.state.began, self.clock
        )
        try:
            self._admit_adapter(asked)
        except TurretError as error:
            asked.error = error
            asked.close()
            raise
        return asked

    def close(self, request: Request, kind: Kind, asked: PendingAnswers) -> None:
        """Cancel what is unfinished, and count what was answered."""
        asked.close()
        asker: Asker = request.state.asker
        version, tokens = asked.model or "base", asked.tokens
        unanswered = sum(answer is None for answer in asked.answers)
        seconds = self.clock() - request.state.began
        self.metrics.answered(version, kind, len(asked.tickets), unanswered, tokens, seconds)
        self.quotas.charge(asker.key, asker.quota, tokens)
        if asked.receipt.name:
            self.quotas.charge(f"adapter {asked.receipt.name}", self.settings.per_adapter, tokens)
        told = {"adapter": asked.model, "receipt": asked.id, "inputs": len(asked.tickets), "tokens": tokens}
        if asked.placed is not None:
            self._count(asked.placed, kind, asked)
            told |= {"experiment": str(asked.placed.experiment), "arm": asked.placed.arm}
        request.state.told = told

    def _count(self, placed: Placed, kind: Kind, asked: PendingAnswers) -> None:
        """What an experiment is to know of the answer."""
        if placed.found is None:
            self.metrics.outside(str(placed.experiment))
            return
        seconds, failed = asked.seconds, False
        if all(answer is not None for answer in asked.answers):
            self.routing.answered(placed, seconds)
        elif asked.error is not None and not isinstance(asked.error, Cancelled):
            failed = True
            if not self.routing.failed(placed, kind, asked.error, seconds):
                return
        else:
            seconds = self.clock() - asked.began
            if asked.spoke or not self.routing.given_up(placed, seconds):
                return
        self.metrics.arm(placed.found.experiment, placed.arm, placed.found.version, seconds, failed=failed)

    def _admit_adapter(self, asked: PendingAnswers) -> None:
        if name := asked.receipt.name:
            self.quotas.admit(f"adapter {name}", f"adapter {name}", self.settings.per_adapter)

    def _submit(
        self,
        request: Request,
        kind: Kind,
        model: str,
        texts: Sequence[Text],
        options: Sequence[Any] | None,
        unit: str | None,
    ) -> Submission:
        """Every input to the version of its unit's arm, or to the one that the reference means."""
        began = self.clock()
        placed = None if model == self.base_id else self.routing.place(model, unit, request.state.request_id)
        found = None if placed is None else placed.found
        if placed is not None:  # an error says whose it is, too
            request.state.receipt = placed.headers | ({} if found is None else _version(found.version))
        try:
            tickets = self._tickets(kind, model if found is None else found.version, texts, options)
        except BaseException as error:
            if placed is not None and found is not None:
                seconds = self.clock() - began
                if self.routing.refused(placed, kind, error, seconds):
                    self.metrics.arm(found.experiment, found.arm, found.version, seconds, failed=True)
            raise
        if placed is not None:
            self.routing.began(placed, f"{self.id}-{tickets[0].receipt.id}")
            self.shadows.beside(placed, kind, texts, options, tickets)
        return Submission(tickets, placed)

    def _tickets(
        self, kind: Kind, model: str, texts: Sequence[Text], options: Sequence[Any] | None
    ) -> Sequence[TicketProtocol]:
        """Every input to the version that the first one got; all or none."""
        for _ in range(TRIES):
            tickets: list[TicketProtocol] = []
            reference = None if model == self.base_id else model
            try:
                for place, text in enumerate(texts):
                    asked = None if options is None else options[place]
                    tickets.append(self._submit_one(kind, text, reference, asked))
                    reference = named(tickets[0].receipt)
                return tickets
            except BaseException as error:
                for ticket in tickets:
                    ticket.cancel()
                if not tickets or not isinstance(error, NotFound):
                    raise  # else the version was deleted between two inputs: all once more, to what is meant now
        raise NotFound(f"{ascii(model)[:60]} is being deleted again and again: try again")

    def _submit_one(self, kind: Kind, text: Text, reference: str | None, options: Any) -> TicketProtocol:
        exact, seconds = None if reference is None else self.follow.exact(reference), self.limits.answer_seconds
        try:
            return self.engine.submit(kind, text, exact, options, deadline=seconds)
        except NotFound:
            if exact == reference:
                raise
            # What was in force here was deleted before its follower took over: the store says what the alias means.
            meant = None if reference is None else self.follow.spelled(reference)
            return self.engine.submit(kind, text, meant, options, deadline=seconds)

    # --- following the store ----------------------------------------------------------------------------------------

    def look(self) -> None:
        """Follow the store once: tokens, aliases and experiments."""
        self._know()
        self.follow.poll()
        self.routing.look()

    @property
    def ready(self) -> bool:
        """Whether what will be asked for first is loaded, or was tried."""
        return self.follow.ready and self.routing.ready

    def _settle(self) -> None:
        """Carry out what the guards of experiments ask."""
        with self._settling:
            done = [(str(each.experiment), line) for each in self.workspace.settle() for line in each.done]
        for experiment, line in done:
            self.log.say("experiment", experiment=experiment, done=line)
        if done:
            self.look()

    def _know(self) -> None:
        self.guard.know(self.workspace.tokens.list())

    # --- beginning and end ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Follow the store from now on, each part by itself: a load holds up no token that is revoked and no log."""
        for name, look, seconds in (
            ("turret-follow", self.follow.poll, POLL_SECONDS),
            ("turret-tokens", self._know, POLL_SECONDS),
            ("turret-arms", self.routing.prepare, POLL_SECONDS),
            ("turret-turn", self.routing.turn, TURN_SECONDS),
            ("turret-settle", self._settle, SETTLE_SECONDS),
        ):
            self._followers.append(threading.Thread(target=self._keep_on, args=[look, seconds], name=name, daemon=True))
            self._followers[-1].start()

    def _keep_on(self, look: Callable[[], None], seconds: float) -> None:
        while not self._ended.is_set():
            try:
                look()
            except Exception as error:  # a store that is away for a moment must not end the following
                self.follow.failures += 1
                self._follows(error)
            else:
                self._follows(None)
            self._ended.wait(seconds)

    def _follows(self, error: Exception | None) -> None:
        """Say once that a part of this server follows the store no more, and once that it follows again."""
        part, away = threading.current_thread().name, error is not None
        if error is not None and part not in self._away:
            said = {"error": type(error).__name__, "message": str(error)}
            self.log.say("follow", "error", part=part, following=False, **said)
        elif not away and part in self._away:
            self.log.say("follow", part=part, following=True)
        if away:
            self._away.add(part)
        else:
            self._away.discard(part)

    def stop(self) -> None:
        """Stop following, write the last of the log, and let the threads go."""
        self._ended.set()
        for each in self._followers:
            each.join(timeout=5)
        self.shadows.close()
        try:
            self.routing.router.flush()
        except TurretError as error:
            self.log.say("experiments", "error", error=type(error).__name__, message=f"the last log is lost: {error}")
        for lane in (self._asking, self.reading, self.control, self.aside, self.telling):
            lane.close()

    # --- figures ----------------------------------------------------------------------------------------------------

    def _gauges(self) -> dict[str, float]:
        with suppress(TurretError):
            ours = {
                "in_flight": float(self.load.requests),
                "body_bytes": float(self.load.bytes),
                "draining": float(self.load.draining),
                "ready": float(self.ready),
                "following": float(not self._away),
                "follow_failures": float(self.follow.failures),
                "follow_trouble": float(len(self.follow.trouble)),
                "experiments_away": float(self.routing.router.problem is not None),
                "experiments_unlogged": float(self.routing.router.lost),
                "shadow_inputs": float(self.shadows.inputs),
            }
            return ours | numbers("engine", said(self.engine.stats()))
        return {}


def _version(reference: str) -> dict[str, str]:
    """The headers of a version that was to answer."""
    name, _, number = reference.partition("@")
    return {"turret-adapter": name, "turret-version": number}


def said(value: Any) -> dict[str, Any]:
    """A small value object of the engine, as JSON says it."""
    found = value if isinstance(value, Mapping) else {each.name: getattr(value, each.name) for each in fields(value)}
    return {str(key): _plainly(each) for key, each in found.items()}


def _plainly(value: Any) -> Any:
    if isinstance(value, Mapping) or is_dataclass(value):
        return said(value)
    if isinstance(value, list | tuple):
        return [_plainly(each) for each in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
