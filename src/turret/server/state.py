"""Everything that routes need, in one object: the workspace, the engines, and what follows the store.

`with_access` gives the state as one access sees it: its workspace, engines, aliases, experiments and metrics
have nothing of another tenant. Routes get no other state (`turret.server.routes`).

Questions, the control plane and outcomes have threads of their own, so that many loads delay no answer. Tenants take
turns on them (`turret.turns`).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import partial

from sqlalchemy import Connection, select
from starlette.requests import Request

from turret import process
from turret.access import DEFAULT, OPERATOR, Access
from turret.audit import Mark, NewestActions
from turret.database import Database, adapters, versions
from turret.engine import Done, Event, Failed, Piece, SamplingParams
from turret.errors import Busy, Cancelled, Draining, NotFound, TurretError
from turret.experiments import Recorded, Told
from turret.json_types import JsonMapping
from turret.server import logs
from turret.server.alarms import AlarmSender, AlarmSettings
from turret.server.auth import Caller, Guard
from turret.server.engine_protocol import Answer, EngineProtocol, Input, TicketProtocol
from turret.server.engines import Engines, SeenEngines, ServedBase
from turret.server.input_sampler import InputSampler
from turret.server.limits import ClientConnections, Load, Network, RequestLimits
from turret.server.logs import Log
from turret.server.metrics import MOST_VERSIONS, Metrics, TenantTotals
from turret.server.oidc import Oidc, OidcSettings
from turret.server.pending_answers import PendingAnswers, Submission, unless_disconnected, wait_for_all
from turret.server.quotas import Quota
from turret.server.replica import QUOTA_SECONDS, SESSION_SECONDS, Replica
from turret.server.routing import AliasWatcher, Placement, Routing
from turret.store import promise_inputs, promises
from turret.store.batches import Batches
from turret.store.client_files import ClientFiles
from turret.store.jobs import count_waiting
from turret.store.promises import LONGEST_RECEIPT, LoggedAnswer, Promise
from turret.store.usage import BASE, UsageLog
from turret.store.usage import SECONDS as USAGE_SECONDS
from turret.tasks import Task, stored_task
from turret.tasks.task import RequestKind
from turret.timestamp import timestamp
from turret.turns import ThreadPool
from turret.version import __version__
from turret.visibility import seen_adapters, seen_versions
from turret.workspace.core import Workspace
from turret.workspace.previewing import Previews

# --- shadows ----------------------------------------------------------------------------------------------------------
# Shadows: versions that are run in addition to the answer. They are recorded and compared, and never returned.


LOW_PRIORITY = -1  # that of requests is 0


class Shadows:
    """The shadows of this server.

    Args:
        limit: Of inputs at work or waiting.
        seconds: After which a shadow is abandoned.
        log: Gets the shadows' answers; None if texts are not logged.
    """

    def __init__(
        self,
        engines: SeenEngines,
        routing: Routing,
        metrics: Metrics,
        *,
        limit: int,
        seconds: float,
        clock: Callable[[], float],
        log: Log | None,
    ) -> None:
        self.engines, self.routing, self.metrics = engines, routing, metrics
        self.seconds, self.clock, self.log = seconds, clock, log
        self._limit = limit
        self._thread = ThreadPoolExecutor(1, "turret-shadow")
        self._closed = False
        self.lock = threading.Lock()
        self.running: set[_Shadow] = set()
        self.inputs = 0  # at work or waiting

    def start(
        self,
        placement: Placement,
        kind: RequestKind,
        inputs: Sequence[Input],
        options: Sequence[SamplingParams] | None,
        tickets: Sequence[TicketProtocol],
    ) -> None:
        """Start the shadows of a request if there is room. Returns at once. tickets: of the request."""
        if placement.assignment is None:
            return
        for arm, version in placement.assignment.shadows:
            if not self._reserve(len(inputs)):
                self.metrics.shadow(str(placement.experiment), arm, "shed")
                continue
            shadow = _Shadow(self, placement, arm, kind, tickets)
            with suppress(RuntimeError):  # the server is shutting down
                self._thread.submit(shadow.run, version, list(inputs), options)

    def close(self) -> None:
        """Cancel all shadows."""
        with self.lock:
            self._closed = True
            running = list(self.running)
        self._thread.shutdown(wait=False, cancel_futures=True)
        for each in running:
            each.cancel()

    def _reserve(self, inputs: int) -> bool:
        with self.lock:
            if self._closed or self.inputs + inputs > self._limit:
                return False
            self.inputs += inputs
            return True


class _Shadow:
    """One shadow of one request. It ends when both it and the request's own answers have ended."""

    def __init__(
        self, shadows: Shadows, placement: Placement, arm: str, kind: RequestKind, tickets: Sequence[TicketProtocol]
    ) -> None:
        self._shadows, self._placement, self._arm, self._kind = shadows, placement, arm, kind
        self._request_tickets = list(tickets)
        self._tickets: list[TicketProtocol] = []
        self._answers: dict[tuple[bool, int], Answer | None] = {}  # (of the shadow?, input) -> None if it failed
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._ended_at = 0.0
        self._samples = False

    def run(self, version: str, inputs: Sequence[Input], options: Sequence[SamplingParams] | None) -> None:
        """Submit the shadow and listen to it, on the shadows' thread. Errors are recorded, never raised."""
        engines, clock = self._shadows.engines, self._shadows.clock
        self._started_at = self._ended_at = clock()
        self._samples = options is not None and options[0].samples
        with self._shadows.lock:
            self._shadows.running.add(self)
        try:
            for place, each in enumerate(inputs):
                settings = None if options is None else options[place]
                deadline = self._shadows.seconds
                self._tickets.append(
                    engines.submit(self._kind, each, version, settings, priority=LOW_PRIORITY, deadline=deadline)
                )
        except Exception as error:
            self._error, self._ended_at = error, clock()
            self.cancel()
            self._end()
            return
        for shadow, tickets in ((True, list(self._tickets)), (False, self._request_tickets)):
            for place, ticket in enumerate(tickets):
                ticket.listen(self._listener(shadow, place))

    def cancel(self) -> None:
        for ticket in list(self._tickets):
            ticket.cancel()

    def _listener(self, shadow: bool, place: int) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, Piece):
                return
            with self._lock:
                self._answers[shadow, place] = event.answer if isinstance(event, Done) else None
                if shadow:
                    self._ended_at = self._shadows.clock()
                    if isinstance(event, Failed):
                        self._error = self._error or event.error
                complete = len(self._answers) == len(self._tickets) + len(self._request_tickets)
            if complete:
                self._end()

        return hear

    def _end(self) -> None:
        try:
            self._record()
        finally:
            with self._shadows.lock:
                self._shadows.inputs -= len(self._request_tickets)
                self._shadows.running.discard(self)

    def _record(self) -> None:
        shadows, placement, arm = self._shadows, self._placement, self._arm
        seconds, agrees = self._ended_at - self._started_at, self._agrees()
        assert placement.assignment is not None
        if self._error is not None:
            own = shadows.routing.failed(placement, self._kind, self._error, seconds, arm)
            what = "failed" if own else "shed"
        else:
            shadows.routing.router.shadowed(placement.assignment, arm, seconds=seconds, agrees=agrees)
            what = "answered" if agrees is None else "agreed" if agrees else "differed"
        experiment = str(placement.experiment)
        shadows.metrics.shadow(experiment, arm, what)
        if shadows.log is not None:
            answers = [self._answers.get((True, place)) for place in range(len(self._request_tickets))]
            shadows.log.write("shadow", experiment=experiment, arm=arm, what=what, answers=answers)

    def _agrees(self) -> bool | None:
        """Whether the task judges all answers equal; None if one is missing, or if texts are sampled."""
        pairs = [
            (self._answers.get((True, place)), self._answers.get((False, place)))
            for place in range(len(self._request_tickets))
        ]
        both = [(shadow, answer) for shadow, answer in pairs if shadow and answer]
        task = self._shadows.routing.task(self._placement.experiment)
        if self._samples or len(both) < len(pairs) or task.request != self._kind:
            return None
        return all(task.judged(shadow) == task.judged(answer) for shadow, answer in both)


# --- promises ---------------------------------------------------------------------------------------------------------
# Which answers of a version abstain, and a log of the answers that a promise covers.
#
# The promises of a tenant are read when one has changed. A version that was never asked for is looked up before its
# first answer is sent, so no answer slips past a promise while a new version follows an alias. A killed process loses
# the log of its last second.


MOST_KEPT = 100_000  # unwritten answers, while the store cannot be reached
MOST_KNOWN = 10_000  # versions


@dataclass(frozen=True)
class Covered:
    """A version's promise, and the task that its answers are of."""

    promise: Promise
    task: type[Task]
    watched: bool  # live texts are compared with its examples


class LivePromises:
    """The promises of one tenant. `turn` has a thread of its own; any thread calls the rest.

    Args:
        mark: Returns what differs after a change of a promise; without it they are read at every turn.
    """

    def __init__(
        self, database: Database, mark: Callable[[], Mark] | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database, self._mark, self._clock = database, mark, clock
        self._read_mark: Mark | None = None  # of the last read
        self._known: dict[str, Covered | None] = {}  # by the digest of a version
        self._unwritten: list[LoggedAnswer] = []
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self.lost = 0  # answers that were not logged

    @property
    def has_any(self) -> bool:
        """Whether the tenant had a promise at the last read."""
        return any(each is not None for each in self._known.values())

    def knows(self, digest: str) -> bool:
        """Whether `of` reads nothing."""
        return digest in self._known

    def of(self, digest: str) -> Covered | None:
        """The promise of a version; None without one. Reads the store for a version that is not known yet."""
        if digest not in self._known:
            with self._database.reading() as connection:
                found = promises.of_digest(connection, digest)
                self._known[digest] = None if found is None else _covered(connection, found)
        return self._known[digest]

    def answered(self, covered: Covered, receipt: str, answers: Sequence[Answer]) -> list[bool]:
        """Whether each answer abstains; logs all of them.

        Args:
            receipt: the id of the request; each of several answers has `RECEIPT#0`, `RECEIPT#1` and so on.
        """
        promise, at = covered.promise, timestamp(self._clock())
        found, logged = [], list[LoggedAnswer]()
        for place, answer in enumerate(answers):
            abstains = promise.abstains(covered.task, answer)
            found.append(abstains)
            if (decision := covered.task.decision(answer)) is not None:
                own = (receipt if len(answers) == 1 else f"{receipt}#{place}")[:LONGEST_RECEIPT]
                logged.append(LoggedAnswer(promise.id, own, *decision, int(not abstains), at))
        with self._lock:
            room = max(MOST_KEPT - len(self._unwritten), 0)
            self._unwritten += logged[:room]
            self.lost += len(logged) - min(room, len(logged))
        return found

    def turn(self) -> None:
        """Write the log, and read the promises in force if one may have changed. Raises StoreError."""
        self.flush()
        mark = self._mark() if self._mark else None
        if mark is not None and mark == self._read_mark:
            return
        with self._database.reading() as connection:
            new = {each.digest: _covered(connection, each) for each in promises.in_force(connection)}
        known = list(self._known) if len(self._known) < MOST_KNOWN else []
        self._known = {**{digest: new.get(digest) for digest in known}, **new}
        self._read_mark = mark

    def flush(self) -> None:
        """Write the log now. If that fails, the log is kept. Raises StoreError."""
        with self._writing:
            with self._lock:
                logged, self._unwritten = self._unwritten, []
            if not logged:
                return
            try:
                with self._database.writing() as connection:
                    promises.log(connection, logged)
            except BaseException:
                with self._lock:
                    self._unwritten = [*logged, *self._unwritten]
                raise


def _covered(connection: Connection, promise: Promise) -> Covered:
    watch = promise_inputs.watch_of(connection, promise.id)
    return Covered(promise, promises.task_of(connection, promise), watch is not None and watch.drifted is None)


# --- settings ---------------------------------------------------------------------------------------------------------
# The options of `turret serve`.


@dataclass(frozen=True)
class ServerSettings:
    """The options of `turret serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    alias: str = "production"  # what plain names mean; its versions are loaded in advance
    limits: RequestLimits = field(default_factory=RequestLimits)
    per_adapter: Quota = field(default_factory=Quota)
    log_texts: bool = False
    strict: bool = False  # unknown keys of a request are an error, not a header
    proxies: Sequence[Network] = ()  # networks without a limit per client
    origins: Sequence[str] = ()  # of pages that may call the API; "*" for any
    otel: bool = False  # spans of requests go to OpenTelemetry
    replica: str | None = None  # the name of this server in metrics
    oidc: OidcSettings | None = None  # who signs people in to the console, besides access tokens
    alarm: AlarmSettings | None = None  # where alarms are sent
    watch_inputs: bool = True  # embed samples of the texts that promises cover


# --- followers --------------------------------------------------------------------------------------------------------
# Threads that follow the store, one for each part of a server, so that a slow part delays no other.


class Followers:
    """The threads of one server.

    Args:
        log: Gets one line when a part has lost the store, and one when it is back.
        failed: Called at each try that fails.
    """

    def __init__(self, log: Log, failed: Callable[[], None]) -> None:
        self._log, self._failed = log, failed
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.failing: set[str] = set()  # names of the parts that could not reach the store

    def start(self, name: str, follow: Callable[[], None], seconds: float) -> None:
        """Call `follow` again and again, with so many seconds in between, on a thread with this name."""
        thread = threading.Thread(target=self._repeat, args=[name, follow, seconds], name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """End all threads."""
        self._stopping.set()
        for each in self._threads:
            each.join(timeout=5)

    def _repeat(self, part: str, follow: Callable[[], None], seconds: float) -> None:
        while not self._stopping.is_set():
            try:
                follow()
            except Exception as error:  # the store may be back at the next try
                self._failed()
                if part not in self.failing:
                    problem = {"error": type(error).__name__, "message": str(error)}
                    self._log.write("follow", "error", part=part, following=False, **problem)
                    self.failing.add(part)
            else:
                if part in self.failing:
                    self._log.write("follow", part=part, following=True)
                    self.failing.discard(part)
            self._stopping.wait(seconds)


# --- missing ----------------------------------------------------------------------------------------------------------
# The error for a model that is not here: it lists what the caller may ask on this server's bases.


MOST = 8  # names in the error


def missing_model(
    database: Database,
    fingerprints: Collection[str],
    bases: Sequence[str],
    model: str,
    error: NotFound,
    panels: Sequence[str] = (),
) -> NotFound:
    """The error for a reference that names nothing.

    Args:
        fingerprints: Of the server's bases.
        bases: The names of those that the caller may ask.
        error: Of the store; kept if the adapter is here, since it then lists its own versions and aliases.
        panels: Names of panels, where a model may be one.
    """
    name = model.partition("@")[0]
    on_base = versions.c.manifest[("base", "fingerprint")].as_string().in_(fingerprints)
    query = select(adapters.c.name).join(versions, versions.c.adapter_id == adapters.c.id).where(on_base).distinct()
    with database.reading() as connection:
        query = query.where(seen_adapters(connection), seen_versions(connection))
        if connection.execute(query.where(adapters.c.name == name).limit(1)).first() is not None:
            return error
        names = connection.execute(query.order_by(adapters.c.name).limit(MOST)).scalars().all()
    known = [*names, *bases]
    which = f"expected one of {', '.join(known)}" if known else "you may ask none"
    which += f", or a panel: {', '.join(panels[:MOST])}" if panels else ""
    where = "this server's base" if len(fingerprints) == 1 else "the bases of this server"
    return NotFound(f"no adapter named {ascii(name)[:60]} on {where}: {which}")


# --- tenants ----------------------------------------------------------------------------------------------------------
# The tenants of a server share its engines, its limits and its threads. Each has its own aliases, experiments, shadows
# and metrics, so a name means only what it means for its tenant.


@dataclass(frozen=True)
class Tenant:
    """What a server keeps for one tenant."""

    workspace: Workspace
    engines: SeenEngines  # as the tenant sees them
    aliases: AliasWatcher
    routing: Routing
    shadows: Shadows
    promises: LivePromises
    sampler: InputSampler
    metrics: Metrics

    @property
    def ready(self) -> bool:
        """Whether the versions to load in advance are loaded, or failed to load."""
        return self.aliases.ready and self.routing.ready

    def refresh(self) -> None:
        """Follow aliases and experiments once."""
        self.aliases.poll()
        self.routing.refresh()
        self.promises.turn()

    def turn(self) -> None:
        """Write the logs, and read experiments and promises."""
        self.routing.turn()
        self.promises.turn()


# --- state ------------------------------------------------------------------------------------------------------------


POLL_SECONDS = 0.25
TURN_SECONDS = 0.5  # between two turns of the experiments' router, which reads the store once a second
GUARD_SECONDS = 3.0  # between two evaluations of the guards of experiments
INPUT_SECONDS = 1.0  # between two looks for texts to embed
ALARM_SECONDS = 0.5  # between two looks for alarms to send
TRIM_SECONDS = 10.0  # between two looks at the memory that is free and not returned to the system
GOLDEN_AT_ONCE = 16  # golden examples at the engines at the same time
GOLDEN_PATIENCE = 60.0  # seconds to wait for room in a full queue
MOST_PROMOTES = 4  # promotes that ask golden examples, running or waiting
MOST_SIGN_INS = 32  # that wait for the provider
MOST_PREVIEWS = 8  # tables that are read and recipes that are planned, running or waiting
MOST_VIEWS = 1024  # of accesses that are kept
LAST_TRIES = 3  # of the flush when a server ends
MOST_LOGGED = 32  # versions of one request that its line in the log names
RETRIES = 5  # of a request whose version is deleted while its inputs are submitted


class ServerState:
    """One server.

    Args:
        engines: One engine, or those of several bases.
        options: Makes the settings of a generation, as `turret.engine.SamplingParams` does.
    """

    def __init__(
        self,
        workspace: Workspace,
        engines: EngineProtocol | Engines,
        options: Callable[..., SamplingParams],
        settings: ServerSettings | None = None,
        *,
        log: Log | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options, self._plain = options, options()
        self.settings = settings or ServerSettings()
        self.limits = limits = self.settings.limits
        self.spans = logs.provider() if self.settings.otel else None
        self.log, self.clock = log or Log(), clock
        self.started_at, self.id = int(time.time()), secrets.token_hex(4)
        self.load = Load(limits)
        self.clients = ClientConnections(limits.connections, limits.connections_per_client, self.settings.proxies)
        self.guard = Guard(self.settings.host, workspace.tokens.of_all_tenants(), clock, workspace.store.access)
        self.replica = Replica(workspace.store.database(make=True), self.guard.sessions, limits, clock, self.log)
        self.quotas, provider, secret = self.replica.quotas, self.settings.oidc, self.guard.sessions.sign_in_secret
        self.oidc = None if provider is None else Oidc(provider, secret)
        self.usage = UsageLog(workspace.store.database(make=True))
        if not self.usage.counts:
            self.log.write("usage", "warning", message="nothing is counted: the store is read-only here")
        self.files, self.batches = ClientFiles.of(workspace.store), Batches.of(workspace.store)
        self.previews = Previews(workspace.store)
        self._home, self._all_engines = workspace, engines if isinstance(engines, Engines) else Engines(engines)
        self._newest = NewestActions(workspace.store.database(make=True), time.monotonic)
        self._tokens_mark: Mark | None = None  # of the tokens that are known here
        marks = lambda: (self._newest.mark("promises"), self._newest.mark("experiments"))
        self._alarms = AlarmSender(workspace.store.database(make=True), self.settings.alarm, marks, self.log)
        self._tenants_lock = threading.Lock()
        self.tenants: dict[str, Tenant] = {}
        self._views: dict[Access, ServerState] = {}
        self._totals = TenantTotals()
        self._threads = (
            ThreadPool("ask", 8, 2 * limits.in_flight, "questions are being submitted", 1),
            ThreadPool("read", 1, limits.in_flight, "large bodies are being parsed", 1),
            ThreadPool("compile", 1, limits.in_flight, "constraints are being compiled", 1),
            ThreadPool("control", 4, limits.control_waiting, "control requests are waiting", 1),
            # Promotes that ask golden examples may take minutes.
            ThreadPool("aside", 1, MOST_PROMOTES, "promotes are asking golden examples", 10),
            ThreadPool("tell", 1, limits.outcomes_waiting, "requests with outcomes are waiting", 1),
            # A plan loads a base, and a hostile table takes as long as it may.
            ThreadPool("preview", 2, MOST_PREVIEWS, "tables are being read and recipes planned", 5),
        )
        # Anybody may come back from a provider, and it may be slow.
        self.signing_in = ThreadPool("sign-in", 4, MOST_SIGN_INS, "sign-ins wait for the provider", 5)
        self._use(self.tenant(DEFAULT), OPERATOR)
        self._open_tenants()
        self._guard_lock = threading.Lock()
        self._followers = Followers(self.log, self._count_failure)

    def now(self) -> int:
        """Seconds since 1970, for OpenAI's `created`."""
        return int(time.time())

    @property
    def in_flight(self) -> int:
        """Requests in flight, as far as they concern the access."""
        return self.load.requests if self.access.operates else self.load.requests_of(self.access.tenant)

    # --- tenants ------------------------------------------------------------------------------------------------------

    def with_access(self, access: Access) -> ServerState:
        """The state as this access sees it. What it does not see is not there."""
        view = self._views.get(access)
        if view is None:
            view = copy(self)
            view._use(self.tenant(access.tenant), access)
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            self._views[access] = view
        return view

    def tenant(self, name: str) -> Tenant:
        """What this server keeps for a tenant, made when it is first asked for."""
        with self._tenants_lock:
            if name not in self.tenants:
                self.tenants[name] = self._open_tenant(name)
            return self.tenants[name]

    def _open_tenant(self, name: str) -> Tenant:
        home = self._home.store.access.tenant
        workspace = self._home if name == home else self._home.with_access(Access(name))
        build = [
            {"version": __version__, "base": each.name, "fingerprint": each.fingerprint}
            for each in self._all_engines.bases
        ]
        made = partial(Metrics, replica=self.settings.replica, tenant=name, totals=self._totals)
        engines = SeenEngines(self._all_engines, workspace, home)
        store, bases, clock = workspace.store, engines.fingerprints, self.clock
        aliases = AliasWatcher(
            store.last_move,
            store.pointing,
            engines.warm,
            engines.warm_ahead,
            engines.in_memory,
            bases=bases,
            alias=self.settings.alias,
            clock=clock,
        )
        routed = partial(_callable, aliases, engines)
        metrics = made(self._gauges, self._figures, build, adapters=routed) if name == DEFAULT else made(dict)
        router = workspace.router(mark=partial(self._newest.mark, "experiments", store.access.tenant))
        routing = Routing(router, aliases, engines.warm, workspace.resolve, bases=bases, clock=clock)
        shadows = Shadows(
            engines,
            routing,
            metrics,
            limit=self.limits.shadow_inputs,
            seconds=self.limits.answer_seconds,
            clock=clock,
            log=self.log if self.settings.log_texts else None,
        )
        live = LivePromises(store.database(make=True), partial(self._newest.mark, "promises", store.access.tenant))
        sampler = InputSampler(store.database(make=True), self._all_engines, self.options, name, self.log, self.clock)
        return Tenant(workspace, engines, aliases, routing, shadows, live, sampler, metrics)

    def _use(self, tenant: Tenant, access: Access) -> None:
        self.access, self.workspace, self.engines = access, tenant.workspace, tenant.engines
        self.aliases, self.routing = tenant.aliases, tenant.routing
        self.shadows, self.promises, self.metrics = tenant.shadows, tenant.promises, tenant.metrics
        self._sampler = tenant.sampler
        threads = [each.of(access.tenant) for each in self._threads]
        self.asking, self.parsing, self.compiling, self.control, self.promoting, self.recording, self.preview = threads
        if not access.whole:
            self.workspace = tenant.workspace.with_access(access)
            self.engines = SeenEngines(self._all_engines, self.workspace, self._home.store.access.tenant)

    def _open_tenants(self) -> None:
        """Follow the store for every tenant that has a token."""
        for access in self.guard.accesses():
            self.tenant(access.tenant)

    # --- bases and their adapters -------------------------------------------------------------------------------------

    def is_base(self, model: str) -> bool:
        """Whether a request for this model is for a bare base."""
        return self.engines.bare(model) is not None

    def base_of(self, model: str) -> ServedBase:
        """The base of a model. May read the store. Raises NotFound, or BadRequest for adapters of different bases."""
        try:
            return self.engines.base_of(model if self.is_base(model) else self.aliases.exact(model))
        except NotFound as error:
            raise self.missing_model(model, error) from None

    def missing_model(self, model: str, error: NotFound, *, panels: bool = False) -> NotFound:
        """The error for a model that is not here. Reads the store. panels: whether the model may be a panel."""
        database, names = self.workspace.store.database(make=True), [each.name for each in self.engines.askable]
        known = self.workspace.panels.names() if panels else ()
        if model.partition("@")[0] in known:
            return self.workspace.panels.missing(model, error)
        return missing_model(database, self.engines.fingerprints, names, model, error, known)

    # --- questions ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def ask(
        self,
        request: Request,
        kind: RequestKind,
        model: str,
        inputs: Sequence[Input],
        options: Sequence[SamplingParams] | None = None,
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
        options: Sequence[SamplingParams] | None = None,
        *,
        unit: str | None = None,
    ) -> PendingAnswers:
        """As `ask`, for a stream. The caller must call `finish`."""
        return (await self._submit_to(request, kind, [model], inputs, options, unit))[0]

    @asynccontextmanager
    async def ask_each(
        self, request: Request, kind: RequestKind, models: Sequence[str], input: Input, *, unit: str | None = None
    ) -> AsyncIterator[Sequence[PendingAnswers]]:
        """Submit one input to several versions, together; as `ask` for each of them.

        Every version is placed, counted, charged and logged as if it had been asked alone. The block begins when all
        have answered. Raises the first error.
        """
        pending = await self._submit_to(request, kind, models, [input], None, unit)
        try:
            await unless_disconnected(request, wait_for_all(pending))
            yield pending
        finally:
            self.finish(request, kind, *pending)

    async def _submit_to(
        self,
        request: Request,
        kind: RequestKind,
        models: Sequence[str],
        inputs: Sequence[Input],
        options: Sequence[SamplingParams] | None,
        unit: str | None,
    ) -> list[PendingAnswers]:
        """Submit the inputs to every model; all or none."""
        await self.admit(request)
        request.state.started = started = self.clock()
        if self.settings.log_texts:
            named = ", ".join(models)
            self.log.write("texts", request=request.state.request_id, model=named, texts=list(inputs))
        again = partial(self._submit, request, kind, inputs=inputs, options=options, unit=unit)
        try:
            await self._compile(models[0], options)
        except NotFound as error:
            raise await self.control(self.missing_model, models[0], error) from None
        submissions = await self.asking(self._submit_all, again, models)
        seconds = self.limits.answer_seconds + 1  # the engine's own deadline comes first
        pending = []
        for model, submission in zip(models, submissions, strict=True):
            submit = partial(self.asking, again, model=model)
            pending.append(PendingAnswers(submission, inputs, request, seconds, self.id, submit, started, self.clock))
        try:
            for name in filter(None, (each.receipt.name for each in pending)):
                await self._take(self._adapter_key(name), f"adapter {name}", self.settings.per_adapter)
        except TurretError as error:
            for each in pending:
                each.error = error
                each.close()
            raise
        return pending

    def _submit_all(self, submit: Callable[..., Submission], models: Sequence[str]) -> list[Submission]:
        """Submit to every model, so that their passes are shared. Raises NotFound, which lists what may be asked."""
        found: list[Submission] = []
        try:
            with self.engines.together() if len(models) > 1 else nullcontext():
                for model in models:
                    try:
                        found.append(submit(model=model))
                    except NotFound as error:
                        raise self.missing_model(model, error) from None
        except BaseException:
            for each in found:
                for ticket in each.tickets:
                    ticket.cancel()
            raise
        return found

    async def _compile(self, model: str, options: Sequence[SamplingParams] | None) -> None:
        """Compile a request's constraint, the same for all its inputs, where no request without one waits for it."""
        constraint = options[0].constraint if options else None
        if constraint is not None and not self.engines.is_compiled(constraint):
            await self.compiling(self.engines.compile, model, constraint)

    async def admit(self, request: Request) -> None:
        """Take one request from the quota of the caller, once for each request. Raises QuotaSpent."""
        caller: Caller = request.state.caller
        if caller.name is not None and not getattr(request.state, "admitted", False):
            await self._take(caller.key, f"token {caller.name}", caller.quota)
            request.state.admitted = True

    async def _take(self, key: str, owner: str, quota: Quota) -> None:
        """Take one request from a quota that all servers share. Raises QuotaSpent."""
        if not self.quotas.admit(key, owner, quota):
            await self.replica.reserve(key, owner, quota)

    def charge(self, request: Request, tokens: int) -> None:
        """Take tokens from the quota of the caller."""
        caller: Caller = request.state.caller
        self.quotas.charge(caller.key, caller.quota, tokens)

    def count_tokens(self, request: Request, tokens: int) -> None:
        """Charge and count a request that reads or writes tokens of a base, and generates none."""
        self.charge(request, tokens)
        self.usage.add(self.access.tenant, BASE, 1, tokens, 0)

    def finish(self, request: Request, kind: RequestKind, *pending: PendingAnswers) -> None:
        """Cancel what is unfinished, and count what was answered."""
        for each in pending:
            self._finish(request, kind, each)
        if len(pending) > 1:
            request.state.left = any(None in each.answers and each.error is None for each in pending)
            names = [str(each.model) for each in pending]
            request.state.log_fields = {
                "adapters": names[:MOST_LOGGED],
                "receipt": pending[0].id,
                "inputs": len(pending),
                "tokens": sum(each.tokens for each in pending),
            }

    def _finish(self, request: Request, kind: RequestKind, pending: PendingAnswers) -> None:
        """As `finish`, for one version."""
        pending.close()
        version, tokens, inputs = pending.model or "base", pending.tokens, len(pending.tickets)
        unanswered = sum(answer is None for answer in pending.answers)
        request.state.left = left = bool(unanswered) and pending.error is None  # the client, before its last answer
        failed = 0 if left else unanswered
        seconds = self.clock() - request.state.started
        self.metrics.answered(version, kind, inputs - unanswered, failed, tokens, seconds)
        self.charge(request, tokens)
        self.usage.add(self.access.tenant, pending.receipt.name or BASE, inputs - unanswered, *pending.token_counts)
        if pending.receipt.name:
            self.quotas.charge(self._adapter_key(pending.receipt.name), self.settings.per_adapter, tokens)
        fields = {"adapter": pending.model, "receipt": pending.id, "inputs": inputs, "tokens": tokens}
        if pending.placement is not None:
            self._count_placement(pending.placement, kind, pending)
            fields |= {"experiment": str(pending.placement.experiment), "arm": pending.placement.arm}
        request.state.log_fields = fields

    async def covered(self, pending: PendingAnswers) -> Covered | None:
        """The promise of the version that answers; None without one."""
        digest = pending.receipt.digest
        if digest is None:
            return None
        if not self.promises.knows(digest):
            await self.asking(self.promises.of, digest)
        return self.promises.of(digest)

    async def abstaining(self, pending: PendingAnswers, answers: Sequence[Answer]) -> list[bool] | None:
        """Whether each answer is below the threshold of its version's promise; None without a promise. Logs them."""
        covered = await self.covered(pending)
        if covered is None:
            return None
        found = self.promises.answered(covered, pending.id, answers)
        if covered.watched and self.settings.watch_inputs:
            self._sampler.offer(covered.promise.id, pending.receipt.base, pending.inputs)
        self.metrics.abstained(pending.model or "base", len(found), sum(found))
        return found

    def record(self, told: Sequence[Told]) -> list[Recorded]:
        """Record outcomes, of an experiment if it covers the answer and takes the value, else of a promise. Blocks."""
        results = self.routing.router.outcomes(told, self.access)
        rest = [
            place
            for place, each in enumerate(told)
            if each.receipt is not None and results[place].status in ("unknown", "refused")
        ]
        if rest:
            self.promises.flush()
            values = [(str(told[place].receipt), told[place].value) for place in rest]
            for place, result in zip(rest, self.workspace.promise_outcomes(values), strict=True):
                results[place] = results[place] if result.status == "unknown" else result
        return results

    def _adapter_key(self, name: str) -> str:
        return f"adapter {name}" if self.access.tenant == DEFAULT else f"adapter {self.access.tenant}/{name}"

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
        options: Sequence[SamplingParams] | None,
        unit: str | None,
    ) -> Submission:
        """Submit every input to the version of its unit's arm, or to the version of the reference."""
        started = self.clock()
        is_base = self.is_base(model)
        if not is_base and not self.access.whole:
            for part in model.split("+"):  # several, if adapters are composed
                self.workspace.resolve(part)  # raises NotFound before an experiment of its tenant answers
        placement = None if is_base else self.routing.place(model, unit, request.state.request_id)
        arm = None if placement is None else placement.assignment
        if placement is not None:  # the response to an error names the arm too
            request.state.receipt = placement.headers | ({} if arm is None else _version_headers(arm.version))
        try:
            priority = getattr(request.state, "priority", 0)  # below 0 for a line of a batch
            tickets = self._tickets(kind, model if arm is None else arm.version, inputs, options, priority)
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
        self,
        kind: RequestKind,
        model: str,
        inputs: Sequence[Input],
        options: Sequence[SamplingParams] | None,
        priority: int,
    ) -> Sequence[TicketProtocol]:
        """Submit every input to the version that accepted the first one; all or none."""
        for _ in range(RETRIES):
            tickets: list[TicketProtocol] = []
            asked = model
            try:
                for place, each in enumerate(inputs):
                    settings = self._plain if options is None else options[place]
                    tickets.append(self._ticket(kind, each, asked, settings, priority))
                    asked = tickets[0].receipt.version or model
                return tickets
            except BaseException as error:
                for ticket in tickets:
                    ticket.cancel()
                if not tickets or not isinstance(error, NotFound):
                    raise  # else the version was deleted between two inputs: submit all to its successor
        raise NotFound(f"{ascii(model)[:60]} was deleted several times while the request was submitted: try again")

    def _ticket(
        self, kind: RequestKind, text: Input, model: str, options: SamplingParams, priority: int
    ) -> TicketProtocol:
        exact = model if self.is_base(model) else self.aliases.exact(model)
        seconds = self.limits.answer_seconds
        try:
            return self.engines.submit(kind, text, exact, options, priority=priority, deadline=seconds)
        except NotFound:
            if exact == model:
                raise
            # The version in force was deleted before the next poll: the store knows what the alias means.
            named = self.aliases.with_alias(model)
            return self.engines.submit(kind, text, named, options, priority=priority, deadline=seconds)

    # --- following the store ------------------------------------------------------------------------------------------

    def golden_answers(self, reference: str, texts: Sequence[str]) -> list[Answer]:
        """A version's answers to golden examples, in order, so that a promote loads no second base. Blocks.

        A few at a time, after all requests, so they delay none. Raises what `submit` and tickets raise.
        """
        kind = stored_task(self.workspace.resolve(reference).part("task")).request
        found: list[Answer] = []
        for start in range(0, len(texts), GOLDEN_AT_ONCE):
            tickets: list[TicketProtocol] = []
            try:
                tickets.extend(self._submit_golden(kind, reference, text) for text in texts[start:][:GOLDEN_AT_ONCE])
                found += [ticket.result() for ticket in tickets]
            finally:
                for ticket in tickets:
                    ticket.cancel()
        return found

    def _submit_golden(self, kind: RequestKind, reference: str, text: str) -> TicketProtocol:
        until = time.monotonic() + GOLDEN_PATIENCE
        while True:
            if self.load.draining:
                raise Draining("the server is shutting down: not all golden examples were asked, and nothing was moved")
            try:
                deadline = self.limits.answer_seconds
                return self.engines.submit(kind, text, reference, priority=LOW_PRIORITY, deadline=deadline)
            except Busy as error:
                if time.monotonic() >= until:
                    raise
                time.sleep(min(1.0, max(0.01, error.retry_after)))

    def refresh(self) -> None:
        """Follow tokens once, and the aliases and experiments of the tenant."""
        self._read_tokens()
        self.tenant(self.access.tenant).refresh()

    @property
    def ready(self) -> bool:
        """Whether the versions to load in advance are loaded, or failed to load."""
        return all(tenant.ready for tenant in self._all_tenants())

    def _all_tenants(self) -> Sequence[Tenant]:
        return list(self.tenants.values())

    def _apply_guards(self) -> None:
        """Do what the guards of experiments ask, on one server."""
        if self.replica.lead():
            self._each_tenant(self._apply_guards_of)()

    def _apply_guards_of(self, tenant: Tenant) -> None:
        acts = tenant.routing.router.all_running() or tenant.workspace.settles or tenant.promises.has_any
        if not acts or not self.replica.lead():
            return
        with self._guard_lock:
            done = [(str(each.experiment), line) for each in tenant.workspace.settle() for line in each.done]
            promised = tenant.workspace.settle_promises()
        for experiment, line in done:
            self.log.write("experiment", experiment=experiment, done=line)
        for promise in promised:
            for line in promise.done:
                self.log.write("promise", "warning", version=promise.version, done=line)
        tenant.metrics.promises(promised)
        if done or any(each.done for each in promised):
            tenant.refresh()

    def _send_alarms(self) -> None:
        self._alarms.turn(leads=self.settings.alarm is not None and self.replica.lead())

    def _read_tokens(self) -> None:
        self.guard.set_tokens(self._home.tokens.of_all_tenants())
        self._open_tenants()

    def _follow_tokens(self) -> None:
        mark = self._newest.mark("tokens")
        if mark != self._tokens_mark:
            self._read_tokens()
            self._tokens_mark = mark

    def start(self) -> None:
        """Follow the store from now on, each part on its own thread, so that a load delays no revoked token."""
        trim: Callable[[], None] = process.Trim()
        for name, follow, seconds in (
            ("turret-follow", self._each_tenant(self._follow_aliases), POLL_SECONDS),
            ("turret-tokens", self._follow_tokens, POLL_SECONDS),
            ("turret-arms", self._each_tenant(lambda tenant: tenant.routing.prepare()), POLL_SECONDS),
            ("turret-turn", self._each_tenant(lambda tenant: tenant.turn()), TURN_SECONDS),
            ("turret-usage", self.usage.flush, USAGE_SECONDS),
            ("turret-quotas", self.quotas.turn, QUOTA_SECONDS),
            ("turret-guards", self._apply_guards, GUARD_SECONDS),
            ("turret-inputs", self._each_tenant(lambda tenant: tenant.sampler.turn()), INPUT_SECONDS),
            ("turret-alarms", self._send_alarms, ALARM_SECONDS),
            ("turret-sessions", self.guard.sessions.refresh, SESSION_SECONDS),
            ("turret-heap", trim, TRIM_SECONDS),
        ):
            self._followers.start(name, follow, seconds)

    def _follow_aliases(self, tenant: Tenant) -> None:
        tenant.aliases.poll(mark=self._newest.mark("aliases", tenant.workspace.store.access.tenant))

    def _each_tenant(self, follow: Callable[[Tenant], None]) -> Callable[[], None]:
        """A function that follows the store for every tenant, also if one fails, and then raises the first error."""

        def every() -> None:
            failed: Exception | None = None
            for tenant in self._all_tenants():
                try:
                    follow(tenant)
                except Exception as error:
                    failed = failed or error
            if failed is not None:
                raise failed

        return every

    def _count_failure(self) -> None:
        self.tenants[DEFAULT].aliases.failures += 1

    def stop(self) -> None:
        """Stop following, write the last outcomes, and stop the threads."""
        self._alarms.close()
        self._followers.stop()
        self.replica.close()
        for tenant in self._all_tenants():
            tenant.shadows.close()
            try:
                tenant.routing.router.flush()
                tenant.promises.flush()
            except TurretError as error:
                message = f"the last log is lost: {error}"
                self.log.write("experiments", "error", error=type(error).__name__, message=message)
        for left in range(LAST_TRIES)[::-1]:
            try:
                self.usage.flush()
                break
            except TurretError as error:
                message = str(error) if left else f"the last usage is lost: {error}"
                self.log.write("usage", "error", error=type(error).__name__, message=message)
        if self.spans is not None:
            self.spans.shutdown()
        for pool in (*self._threads, self.signing_in):
            pool.close()
        self.previews.close()

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _gauges(self) -> dict[str, float]:
        tenants, jobs = self._all_tenants(), dict[str, float]()
        with suppress(TurretError):  # the other figures do not need the store
            jobs["jobs_waiting"] = float(count_waiting(self._home.store.database(make=True)))
        with suppress(TurretError):
            return jobs | {
                "in_flight": float(self.load.requests),
                "body_bytes": float(self.load.bytes),
                "draining": float(self.load.draining),
                "ready": float(self.ready),
                "following": float(not self._followers.failing),
                "leads_guards": float(self.replica.leads),
                "follow_failures": float(sum(each.aliases.failures for each in tenants)),
                "follow_trouble": float(sum(len(each.aliases.failed_moves) for each in tenants)),
                **self._alarms.figures,
                "experiments_away": float(any(each.routing.router.problem is not None for each in tenants)),
                "experiments_unlogged": float(sum(each.routing.router.lost for each in tenants)),
                "shadow_inputs": float(sum(each.shadows.inputs for each in tenants)),
            }
        return {}

    def _figures(self) -> dict[str, JsonMapping]:
        """The figures of the engine of each base."""
        return {each.name: asdict(each.engine.stats()) for each in self._all_engines.bases}


def _callable(aliases: AliasWatcher, engines: SeenEngines) -> tuple[Sequence[str], Sequence[str]]:
    """What clients may call the adapters in memory, and those that requests wait for: `news@3`, and `news` if it is."""

    def names(versions: Sequence[str]) -> list[str]:
        plain = [each.partition("@")[0] for each in versions]
        return [*versions, *(name for name, each in zip(plain, versions, strict=True) if aliases.exact(name) == each)]

    waiting = [each for stats in engines.stats().values() for each in stats.waiting_adapters]
    return names([each.version for each in engines.loaded()][:MOST_VERSIONS]), names(waiting[:MOST_VERSIONS])


def _version_headers(reference: str) -> dict[str, str]:
    name, _, number = reference.partition("@")
    return {"turret-adapter": name, "turret-version": number}
