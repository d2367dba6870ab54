"""Everything that a handler needs, in one object, and the two ways into the engine: questions and control.

Questions and control have threads of their own: no flood of loads holds up an answer. Refuses to know routes.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from turret.errors import Busy, NotFound, TurretError
from turret.server.asked import Asked
from turret.server.auth import Asker, Guard
from turret.server.face import Engine, Kind, Text, Ticket, named
from turret.server.follow import Follow
from turret.server.limits import Limits, Load
from turret.server.logs import Log
from turret.server.metrics import Metrics, numbers
from turret.server.quotas import Quota, Quotas
from turret.workspace import Workspace

T = TypeVar("T")
POLL_SECONDS = 0.25
MOST_ASIDE = 4  # promotes that ask golden examples at a time, those that wait for their turn included
TRIES = 5  # of one request whose version is deleted while its inputs go in


@dataclass(frozen=True)
class Settings:
    """What `turret serve` was told."""

    host: str = "127.0.0.1"
    port: int = 8000
    alias: str = "production"  # what plain names mean, and loaded beforehand
    limits: Limits = field(default_factory=Limits)
    per_adapter: Quota = field(default_factory=Quota)
    log_texts: bool = False


class Served:
    """One workspace and one engine, served. options: the engine's own class for the settings of a generation."""

    def __init__(
        self,
        workspace: Workspace,
        engine: Engine,
        options: Callable[..., Any],
        settings: Settings | None = None,
        *,
        log: Log | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workspace, self.engine, self.options = workspace, engine, options
        self.settings = settings or Settings()
        self.limits = self.settings.limits
        self.log, self.clock = log or Log(), clock
        self.began, self.id = int(time.time()), secrets.token_hex(4)
        self.load = Load()
        self.guard = Guard(self.settings.host, workspace.tokens.list())
        self.quotas = Quotas(clock)
        self.metrics = Metrics(self._gauges)
        self.follow = Follow(
            workspace.store.last_move,
            workspace.store.pointing,
            engine.warm,
            self.in_memory,
            base=engine.base.fingerprint,
            alias=self.settings.alias,
            clock=clock,
        )
        self._asking = ThreadPoolExecutor(8, "turret-ask")
        self._control = ThreadPoolExecutor(4, "turret-control")
        self._aside = ThreadPoolExecutor(1, "turret-aside")
        self._controlling = self._waiting_aside = 0
        self._ended = threading.Event()
        self._followers: list[threading.Thread] = []

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
        self, request: Request, kind: Kind, model: str, texts: Sequence[Text], options: Sequence[Any] | None = None
    ) -> AsyncIterator[Asked]:
        """Put the inputs of one request to one version; what is unfinished at the end of the block is cancelled."""
        asked = await self.open(request, kind, model, texts, options)
        try:
            yield asked
        finally:
            self.close(request, kind, asked)

    async def open(
        self, request: Request, kind: Kind, model: str, texts: Sequence[Text], options: Sequence[Any] | None = None
    ) -> Asked:
        """As `ask`, for a stream: whoever opens it closes it."""
        asker: Asker = request.state.asker
        if asker.name is not None:
            self.quotas.admit(asker.key, f"token {asker.name}", asker.quota)
        request.state.began = self.clock()
        if self.settings.log_texts:
            self.log.say("texts", request=request.state.request_id, model=model, texts=list(texts))
        submit = partial(self._thread, self._asking, self._submit, kind, model, texts, options)
        seconds = self.limits.answer_seconds + 1  # the engine's own deadline is first
        asked = Asked(await submit(), texts, request, seconds, self.id, submit)
        try:
            self._admit_adapter(asked)
        except TurretError:
            asked.close()
            raise
        return asked

    def close(self, request: Request, kind: Kind, asked: Asked) -> None:
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
        request.state.told = told

    def _admit_adapter(self, asked: Asked) -> None:
        if name := asked.receipt.name:
            self.quotas.admit(f"adapter {name}", f"adapter {name}", self.settings.per_adapter)

    def _submit(self, kind: Kind, model: str, texts: Sequence[Text], options: Sequence[Any] | None) -> Sequence[Ticket]:
        """Every input to the version that the first one got; all or none."""
        for _ in range(TRIES):
            tickets: list[Ticket] = []
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

    def _submit_one(self, kind: Kind, text: Text, reference: str | None, options: Any) -> Ticket:
        exact, seconds = None if reference is None else self.follow.exact(reference), self.limits.answer_seconds
        try:
            return self.engine.submit(kind, text, exact, options, deadline=seconds)
        except NotFound:
            if exact == reference:
                raise
            # What was in force here was deleted before its follower took over: the store says what the alias means.
            meant = None if reference is None else self.follow.spelled(reference)
            return self.engine.submit(kind, text, meant, options, deadline=seconds)

    # --- control ----------------------------------------------------------------------------------------------------

    async def control(self, verb: Callable[..., T], *arguments: Any, **settings: Any) -> T:
        """Carry out a verb that may take its time, on a thread of the control plane; refuses when many wait."""
        if self._controlling >= self.limits.control_waiting:
            raise Busy(f"{self._controlling} verbs of the control plane are waiting: try again", retry_after=1)
        self._controlling += 1
        try:
            return await self._thread(self._control, verb, *arguments, **settings)
        finally:
            self._controlling -= 1

    async def aside(self, verb: Callable[..., T], *arguments: Any, **settings: Any) -> T:
        """Carry out a verb that may take minutes, one at a time, so that the others of the control plane go on."""
        if self._waiting_aside >= MOST_ASIDE:
            raise Busy(f"{self._waiting_aside} promotes are asking golden examples: try again", retry_after=10)
        self._waiting_aside += 1
        try:
            return await self._thread(self._aside, verb, *arguments, **settings)
        finally:
            self._waiting_aside -= 1

    async def _thread(self, pool: ThreadPoolExecutor, verb: Callable[..., T], *arguments: Any, **settings: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: verb(*arguments, **settings))

    def look(self) -> None:
        """Follow the store once: tokens and aliases."""
        self._know()
        self.follow.poll()

    def _know(self) -> None:
        self.guard.know(self.workspace.tokens.list())

    # --- beginning and end ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Follow the store from now on; a load that takes its time does not hold up a token that is revoked."""
        for name, look in (("turret-follow", self.follow.poll), ("turret-tokens", self._know)):
            self._followers.append(threading.Thread(target=self._keep_on, args=[look], name=name, daemon=True))
            self._followers[-1].start()

    def _keep_on(self, look: Callable[[], None]) -> None:
        while not self._ended.is_set():
            try:
                look()
            except Exception as error:  # a store that is away for a moment must not end the following
                self.follow.failures += 1
                self.log.say("follow", "error", error=type(error).__name__, message=str(error))
            self._ended.wait(POLL_SECONDS)

    def stop(self) -> None:
        """Stop following, and let the threads go."""
        self._ended.set()
        for each in self._followers:
            each.join(timeout=5)
        self._asking.shutdown(wait=False, cancel_futures=True)
        self._control.shutdown(wait=False, cancel_futures=True)
        self._aside.shutdown(wait=False, cancel_futures=True)

    # --- figures ----------------------------------------------------------------------------------------------------

    def _gauges(self) -> dict[str, float]:
        with suppress(TurretError):
            ours = {
                "in_flight": float(self.load.requests),
                "body_bytes": float(self.load.bytes),
                "draining": float(self.load.draining),
                "ready": float(self.follow.ready),
                "follow_failures": float(self.follow.failures),
                "follow_trouble": float(len(self.follow.trouble)),
            }
            return ours | numbers("engine", said(self.engine.stats()))
        return {}


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
