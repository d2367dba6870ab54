"""Everything that routes need, in one object: the workspace, the engine, and what follows the store.

Questions, the control plane and outcomes have threads of their own, so that many loads delay no answer.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field

from starlette.requests import Request

from turret.engine import Options
from turret.errors import Cancelled, NotFound, TurretError
from turret.server.alias_watcher import AliasWatcher
from turret.server.auth import Caller, Guard
from turret.server.connections import ClientConnections, Network
from turret.server.engine_protocol import EngineProtocol, Input, TicketProtocol, answering_version
from turret.server.limits import Load, RequestLimits
from turret.server.logs import Log
from turret.server.metrics import Metrics, numbers
from turret.server.pending_answers import PendingAnswers, Submission
from turret.server.quotas import Quota, Quotas
from turret.server.routing import Placement, Routing
from turret.server.shadows import Shadows
from turret.server.thread_pool import ThreadPool
from turret.tasks.task import RequestKind
from turret.workspace import Workspace

POLL_SECONDS = 0.25
TURN_SECONDS = 0.5  # between two turns of the experiments' router, which reads the store once a second
SETTLE_SECONDS = 3.0  # between two evaluations of the guards of experiments
MOST_PROMOTES = 4  # promotes that ask golden examples, running or waiting
RETRIES = 5  # of a request whose version is deleted while its inputs are submitted


@dataclass(frozen=True)
class ServerSettings:
    """The options of `turret serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    alias: str = "production"  # what plain names mean; its versions are loaded in advance
    limits: RequestLimits = field(default_factory=RequestLimits)
    per_adapter: Quota = field(default_factory=Quota)
    log_texts: bool = False
    proxies: Sequence[Network] = ()  # networks without a limit per client


class ServerState:
    """One server.

    Args:
        options: Makes the settings of a generation, as `turret.engine.Options` does.
    """

    def __init__(
        self,
        workspace: Workspace,
        engine: EngineProtocol,
        options: Callable[..., Options],
        settings: ServerSettings | None = None,
        *,
        log: Log | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workspace, self.engine, self.options = workspace, engine, options
        self.settings = settings or ServerSettings()
        self.limits = limits = self.settings.limits
        self.log, self.clock = log or Log(), clock
        self.started_at, self.id = int(time.time()), secrets.token_hex(4)
        self.load = Load()
        self.clients = ClientConnections(limits.connections, limits.connections_per_client, self.settings.proxies)
        self.guard = Guard(self.settings.host, workspace.tokens.list(), clock)
        self.quotas = Quotas(clock)
        self.metrics = Metrics(self._gauges)
        base = engine.base.fingerprint
        self.aliases = AliasWatcher(
            workspace.store.last_move,
            workspace.store.pointing,
            engine.warm,
            self.in_memory,
            base=base,
            alias=self.settings.alias,
            clock=clock,
        )
        self.routing = Routing(workspace.router(), self.aliases, engine.warm, workspace.resolve, base=base, clock=clock)
        self.shadows = Shadows(
            engine,
            self.routing,
            self.metrics,
            limit=limits.shadow_inputs,
            seconds=limits.answer_seconds,
            clock=clock,
            log=self.log if self.settings.log_texts else None,
        )
        self._submitting = ThreadPool("ask", 8, 2 * limits.in_flight, "questions are being submitted", 1)
        self.parsing = ThreadPool("read", 1, limits.in_flight, "large bodies are being parsed", 1)
        self.control = ThreadPool("control", 4, limits.control_waiting, "control requests are waiting", 1)
        # Promotes that ask golden examples may take minutes.
        self.promoting = ThreadPool("aside", 1, MOST_PROMOTES, "promotes are asking golden examples", 10)
        self.recording = ThreadPool("tell", 1, limits.outcomes_waiting, "requests with outcomes are waiting", 1)
        self._stopping, self._settle_lock = threading.Event(), threading.Lock()
        self._followers: list[threading.Thread] = []
        self._failing: set[str] = set()  # names of the followers that could not reach the store

    def now(self) -> int:
        """Seconds since 1970, for OpenAI's `created`."""
        return int(time.time())

    # --- the base and its adapters ------------------------------------------------------------------------------------

    @property
    def base_id(self) -> str:
        """The base's id; for a base in a folder, the folder's name."""
        id = self.engine.base.id
        return id.replace("\\", "/").rstrip("/").rpartition("/")[2] if id.startswith(("/", ".", "~")) else id

    def in_memory(self, digest: str) -> bool:
        return any(each.digest == digest for each in self.engine.loaded())

    # --- questions ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def ask(
        self,
        request: Request,
        kind: RequestKind,
        model: str,
        inputs: Sequence[Input],
        options: Sequence[Options] | None = None,
        *,
        unit: str | None = None,
    ) -> AsyncIterator[PendingAnswers]:
        """Submit the inputs of one request to one version. The end of the block cancels what is unfinished.

        Args:
            model: A reference, or the id of the base.
            options: One for each input.
            unit: The unit of an experiment, as the client names it.
        """
        pending = await self.submit(request, kind, model, inputs, options, unit=unit)
        try:
            yield pending
        finally:
            self.finish(request, kind, pending)

    async def submit(
        self,
        request: Request,
        kind: RequestKind,
        model: str,
        inputs: Sequence[Input],
        options: Sequence[Options] | None = None,
        *,
        unit: str | None = None,
    ) -> PendingAnswers:
        """As `ask`, for a stream. The caller must call `finish`."""
        caller: Caller = request.state.caller
        if caller.name is not None:
            self.quotas.admit(caller.key, f"token {caller.name}", caller.quota)
        request.state.started = started = self.clock()
        if self.settings.log_texts:
            self.log.write("texts", request=request.state.request_id, model=model, texts=list(inputs))

        async def submit() -> Submission:
            return await self._submitting(self._submit, request, kind, model, inputs, options, unit)

        seconds = self.limits.answer_seconds + 1  # the engine's own deadline comes first
        pending = PendingAnswers(await submit(), inputs, request, seconds, self.id, submit, started, self.clock)
        try:
            if name := pending.receipt.name:
                self.quotas.admit(f"adapter {name}", f"adapter {name}", self.settings.per_adapter)
        except TurretError as error:
            pending.error = error
            pending.close()
            raise
        return pending

    def finish(self, request: Request, kind: RequestKind, pending: PendingAnswers) -> None:
        """Cancel what is unfinished, and count what was answered."""
        pending.close()
        caller: Caller = request.state.caller
        version, tokens, inputs = pending.model or "base", pending.tokens, len(pending.tickets)
        unanswered = sum(answer is None for answer in pending.answers)
        self.metrics.answered(version, kind, inputs, unanswered, tokens, self.clock() - request.state.started)
        self.quotas.charge(caller.key, caller.quota, tokens)
        if pending.receipt.name:
            self.quotas.charge(f"adapter {pending.receipt.name}", self.settings.per_adapter, tokens)
        fields = {"adapter": pending.model, "receipt": pending.id, "inputs": inputs, "tokens": tokens}
        if pending.placement is not None:
            self._count_placement(pending.placement, kind, pending)
            fields |= {"experiment": str(pending.placement.experiment), "arm": pending.placement.arm}
        request.state.log_fields = fields

    def _count_placement(self, placement: Placement, kind: RequestKind, pending: PendingAnswers) -> None:
        if placement.assignment is None:
            self.metrics.uncounted(str(placement.experiment))
            return
        seconds, failed = pending.seconds, False
        if all(answer is not None for answer in pending.answers):
            self.routing.answered(placement, seconds)
        elif pending.error is not None and not isinstance(pending.error, Cancelled):
            failed = True
            if not self.routing.failed(placement, kind, pending.error, seconds):
                return
        else:
            seconds = self.clock() - pending.started
            if pending.has_output or not self.routing.abandoned(placement, seconds):
                return
        arm = placement.assignment
        self.metrics.arm(arm.experiment, placement.arm, arm.version, seconds, failed=failed)

    def _submit(
        self,
        request: Request,
        kind: RequestKind,
        model: str,
        inputs: Sequence[Input],
        options: Sequence[Options] | None,
        unit: str | None,
    ) -> Submission:
        """Submit every input to the version of its unit's arm, or to the version of the reference."""
        started = self.clock()
        placement = None if model == self.base_id else self.routing.place(model, unit, request.state.request_id)
        arm = None if placement is None else placement.assignment
        if placement is not None:  # the response to an error names the arm too
            request.state.receipt = placement.headers | ({} if arm is None else _version_headers(arm.version))
        try:
            tickets = self._tickets(kind, model if arm is None else arm.version, inputs, options)
        except BaseException as error:
            if placement is not None and arm is not None:
                seconds = self.clock() - started
                if self.routing.refused(placement, kind, error, seconds):
                    self.metrics.arm(arm.experiment, arm.arm, arm.version, seconds, failed=True)
            raise
        if placement is not None:
            self.routing.accepted(placement, f"{self.id}-{tickets[0].receipt.id}")
            self.shadows.start(placement, kind, inputs, options, tickets)
        return Submission(tickets, placement)

    def _tickets(
        self, kind: RequestKind, model: str, inputs: Sequence[Input], options: Sequence[Options] | None
    ) -> Sequence[TicketProtocol]:
        """Submit every input to the version that accepted the first one; all or none."""
        for _ in range(RETRIES):
            tickets: list[TicketProtocol] = []
            reference = None if model == self.base_id else model
            try:
                for place, each in enumerate(inputs):
                    settings = None if options is None else options[place]
                    tickets.append(self._ticket(kind, each, reference, settings))
                    reference = answering_version(tickets[0].receipt)
                return tickets
            except BaseException as error:
                for ticket in tickets:
                    ticket.cancel()
                if not tickets or not isinstance(error, NotFound):
                    raise  # else the version was deleted between two inputs: submit all to its successor
        raise NotFound(f"{ascii(model)[:60]} was deleted several times while the request was submitted: try again")

    def _ticket(self, kind: RequestKind, text: Input, reference: str | None, options: Options | None) -> TicketProtocol:
        exact = None if reference is None else self.aliases.exact(reference)
        seconds = self.limits.answer_seconds
        try:
            return self.engine.submit(kind, text, exact, options, deadline=seconds)
        except NotFound:
            if exact == reference:
                raise
            # The version in force was deleted before the next poll: the store knows what the alias means.
            named = None if reference is None else self.aliases.with_alias(reference)
            return self.engine.submit(kind, text, named, options, deadline=seconds)

    # --- following the store ------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Follow tokens, aliases and experiments once."""
        self._read_tokens()
        self.aliases.poll()
        self.routing.refresh()

    @property
    def ready(self) -> bool:
        """Whether the versions to load in advance are loaded, or failed to load."""
        return self.aliases.ready and self.routing.ready

    def _settle(self) -> None:
        """Do what the guards of experiments ask."""
        with self._settle_lock:
            done = [(str(each.experiment), line) for each in self.workspace.settle() for line in each.done]
        for experiment, line in done:
            self.log.write("experiment", experiment=experiment, done=line)
        if done:
            self.refresh()

    def _read_tokens(self) -> None:
        self.guard.set_tokens(self.workspace.tokens.list())

    def start(self) -> None:
        """Follow the store from now on, each part on its own thread, so that a load delays no revoked token."""
        for name, follow, seconds in (
            ("turret-follow", self.aliases.poll, POLL_SECONDS),
            ("turret-tokens", self._read_tokens, POLL_SECONDS),
            ("turret-arms", self.routing.prepare, POLL_SECONDS),
            ("turret-turn", self.routing.turn, TURN_SECONDS),
            ("turret-settle", self._settle, SETTLE_SECONDS),
        ):
            thread = threading.Thread(target=self._repeat, args=[follow, seconds], name=name, daemon=True)
            self._followers.append(thread)
            thread.start()

    def _repeat(self, follow: Callable[[], None], seconds: float) -> None:
        while not self._stopping.is_set():
            try:
                follow()
            except Exception as error:  # the store may be back at the next try
                self.aliases.failures += 1
                self._log_following(error)
            else:
                self._log_following(None)
            self._stopping.wait(seconds)

    def _log_following(self, error: Exception | None) -> None:
        """Log once that a follower has lost the store, and once that it is back."""
        part = threading.current_thread().name
        if error is not None and part not in self._failing:
            problem = {"error": type(error).__name__, "message": str(error)}
            self.log.write("follow", "error", part=part, following=False, **problem)
            self._failing.add(part)
        elif error is None and part in self._failing:
            self.log.write("follow", part=part, following=True)
            self._failing.discard(part)

    def stop(self) -> None:
        """Stop following, write the last outcomes, and stop the threads."""
        self._stopping.set()
        for each in self._followers:
            each.join(timeout=5)
        self.shadows.close()
        try:
            self.routing.router.flush()
        except TurretError as error:
            message = f"the last log is lost: {error}"
            self.log.write("experiments", "error", error=type(error).__name__, message=message)
        for pool in (self._submitting, self.parsing, self.control, self.promoting, self.recording):
            pool.close()

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _gauges(self) -> dict[str, float]:
        with suppress(TurretError):
            own = {
                "in_flight": float(self.load.requests),
                "body_bytes": float(self.load.bytes),
                "draining": float(self.load.draining),
                "ready": float(self.ready),
                "following": float(not self._failing),
                "follow_failures": float(self.aliases.failures),
                "follow_trouble": float(len(self.aliases.failed_moves)),
                "experiments_away": float(self.routing.router.problem is not None),
                "experiments_unlogged": float(self.routing.router.lost),
                "shadow_inputs": float(self.shadows.inputs),
            }
            return own | numbers("engine", asdict(self.engine.stats()))
        return {}


def _version_headers(reference: str) -> dict[str, str]:
    name, _, number = reference.partition("@")
    return {"turret-adapter": name, "turret-version": number}
