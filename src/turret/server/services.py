"""What a server makes once, and what one access sees of it.

`Services` has the engines, limits, threads and logs, and follows the store. `Services.view` gives the server as one
access sees it: its workspace, engines, aliases, experiments and metrics have nothing of another tenant. Routes get a
`View` (`turret.server.routes`).

Questions, the control plane and outcomes have threads of their own, so that many loads delay no answer. Tenants take
turns on them (`turret.turns`).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial

from sqlalchemy import select

from turret import process
from turret.access import DEFAULT, Access
from turret.audit import Mark, NewestActions
from turret.database import Database, adapters, seen_adapters, seen_versions, versions
from turret.engine import SamplingParams, Ticket
from turret.errors import Busy, Draining, LeaseLost, NotFound, StoreError, TurretError
from turret.experiments import Recorded, Told
from turret.server import logs
from turret.server.auth import Guard, Sessions
from turret.server.engines import Engines, SeenEngines, ServedBase
from turret.server.limits import ClientConnections, Load, Network, Quota, RequestLimits, SharedQuotas
from turret.server.live_promises import AlarmSender, AlarmSettings, InputSampler, LivePromises
from turret.server.logs import Log
from turret.server.metrics import MOST_VERSIONS, Figures, Metrics, TenantTotals
from turret.server.oidc import Oidc, OidcSettings
from turret.server.routing import LOW_PRIORITY, AliasWatcher, Routing, SeenAliases, Shadows
from turret.store import leases
from turret.store.access_tokens import SessionRows
from turret.store.batches import Batches
from turret.store.client_files import ClientFiles
from turret.store.jobs import count_waiting
from turret.store.leases import Lease
from turret.store.usage import SECONDS as USAGE_SECONDS
from turret.store.usage import Budgets, UsageLog
from turret.tasks import stored_task
from turret.tasks.shapes import Answer
from turret.tasks.task import RequestKind
from turret.turns import TenantThreads, ThreadPool
from turret.version import __version__
from turret.workspace.core import Workspace
from turret.workspace.previewing import Previews

# --- leader -----------------------------------------------------------------------------------------------------------
# Which server of a store does the work that one of them must do: it holds a lease.


class Leader:
    """Holds the lease of some work while this server lives, if no other server holds it.

    Args:
        name: of the lease.
    """

    def __init__(self, database: Database, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._database, self._name, self._clock = database, name, clock
        self._lease: Lease | None = None
        self._renew_at = 0.0
        self._lock = threading.Lock()

    @property
    def leads(self) -> bool:
        return self._lease is not None

    def lead(self) -> bool:
        """Whether this server does the work now; takes or renews the lease if needed. Raises StoreError."""
        with self._lock:
            if self._lease is None:
                self._take()
            elif self._clock() >= self._renew_at:
                self._renew(self._lease)
            return self._lease is not None

    def close(self) -> None:
        """Give the lease back, so that another server goes on at once."""
        with self._lock, suppress(StoreError):
            if self._lease is not None:
                with self._database.writing() as connection:
                    leases.release(connection, self._lease)
                self._lease = None

    def _take(self) -> None:
        with self._database.reading() as connection:  # most servers wait for another one, and readers block nobody
            if leases.is_taken(connection, self._name):
                return
        with self._database.writing() as connection:
            self._lease = leases.take(connection, self._name)
        self._set_renewal()

    def _renew(self, lease: Lease) -> None:
        try:
            with self._database.writing() as connection:
                leases.renew(connection, lease)
        except LeaseLost:
            self._lease = None
        self._set_renewal()

    def _set_renewal(self) -> None:
        self._renew_at = self._clock() + (self._lease.seconds / 3 if self._lease is not None else 0.0)


# --- replica ----------------------------------------------------------------------------------------------------------
# What a server shares with the other servers of its store: quotas, sessions, and which of them applies the guards.


QUOTA_SECONDS = 0.5  # between two writes of charges to the catalog
REFRESH_SECONDS = 1.0  # between two looks for sessions that ended on another server
MOST_LOOKUPS = 64  # sessions that are looked up in the catalog, or wait for it


class Replica:
    """One server of several on one store.

    Args:
        database: Opened for the operator.
        sessions: Of this server.
    """

    def __init__(
        self, database: Database, sessions: Sessions, limits: RequestLimits, clock: Callable[[], float], log: Log
    ) -> None:
        self.quotas = SharedQuotas(clock, Budgets(database), self._log_quotas)
        self._sessions, self._log = sessions, log
        sessions.share(SessionRows(database))
        self._database, self._guards = database, Leader(database, "guards of experiments", clock)
        # Any client may send a cookie, so they wait apart from the control plane.
        self.signing = ThreadPool("session", 1, MOST_LOOKUPS, "sessions are being looked up", 1)
        self._reserving = ThreadPool("quota", 2, 2 * limits.in_flight, "requests wait for their quotas", 1)

    async def reserve(self, key: str, owner: str, quota: Quota) -> None:
        """Take the request that `SharedQuotas.admit` did not find from the catalog. Raises QuotaSpent."""
        await self._reserving.of(key)(self.quotas.reserve, key, owner, quota)

    async def look_up_session(self, session: str, client: str) -> None:
        """Look for a session that another server opened; it stays unknown if the catalog does not answer."""
        if self._sessions.is_strange(session):
            with suppress(TurretError):
                await self.signing.of(client)(self._sessions.look_up, session)

    async def share_session(self, begun: str | None, ended: str | None) -> None:
        """Make a session known to all servers, and end another one there; only here if the catalog does not answer."""
        signing = self.signing.of(self._sessions.token_hash(begun or ended) or "")
        try:
            if begun is not None:
                await signing(self._sessions.keep, begun)
            if ended is not None:
                await signing(self._sessions.forget, ended)
        except TurretError as error:
            self._log.write("sessions", "error", alone=True, error=type(error).__name__, message=str(error))

    @property
    def leads(self) -> bool:
        """Whether this server applied the guards of experiments at the last look."""
        return self._guards.leads

    def lead(self) -> bool:
        """Whether this server applies the guards of experiments now. Raises StoreError."""
        return self._database.writable() and self._guards.lead()

    def close(self) -> None:
        """Give back what this server holds, and stop the threads."""
        self.quotas.close()
        self._guards.close()
        self.signing.close()
        self._reserving.close()

    def _log_quotas(self, error: StoreError) -> None:
        self._log.write("quotas", "error", alone=True, error=type(error).__name__, message=str(error))


# --- settings ---------------------------------------------------------------------------------------------------------


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


# --- services ---------------------------------------------------------------------------------------------------------


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
MOST_NAMED = 8  # adapters in the error for a model that is not here


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


class Services:
    """What a server makes once, for all who call it.

    Args:
        options: Makes the settings of a generation, as `turret.engine.SamplingParams` does.
    """

    def __init__(
        self,
        workspace: Workspace,
        engines: Engines,
        options: Callable[..., SamplingParams],
        settings: ServerSettings | None = None,
        *,
        log: Log | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options, self.default_options = options, options()
        self.settings = settings or ServerSettings()
        self.limits = limits = self.settings.limits
        self.spans = logs.provider() if self.settings.otel else None
        self.log, self.clock = log or Log(), clock
        self.started_at, self.id = int(time.time()), secrets.token_hex(4)
        self.load = Load(limits)
        self.clients = ClientConnections(limits.connections, limits.connections_per_client, self.settings.proxies)
        self.guard = Guard(self.settings.host, workspace.tokens.of_all_tenants(), clock, workspace.store.access)
        self._database = workspace.store.database(make=True)
        self.replica = Replica(self._database, self.guard.sessions, limits, clock, self.log)
        self.quotas, provider, secret = self.replica.quotas, self.settings.oidc, self.guard.sessions.sign_in_secret
        self.oidc = None if provider is None else Oidc(provider, secret)
        self.usage = UsageLog(self._database)
        if not self.usage.counts:
            self.log.write("usage", "warning", message="nothing is counted: the store is read-only here")
        self.files, self.batches = ClientFiles.of(workspace.store), Batches.of(workspace.store)
        self.previews = Previews(workspace.store)
        self._home, self.engines = workspace, engines
        self._newest = NewestActions(self._database, time.monotonic)
        self._tokens_mark: Mark | None = None  # of the tokens that are known here
        marks = lambda: (self._newest.mark("promises"), self._newest.mark("experiments"))
        self._alarms = AlarmSender(self._database, self.settings.alarm, marks, self.log)
        self._pools = {
            "asking": ThreadPool("ask", 8, 2 * limits.in_flight, "questions are being submitted", 1),
            "parsing": ThreadPool("read", 1, limits.in_flight, "large bodies are being parsed", 1),
            "compiling": ThreadPool("compile", 1, limits.in_flight, "constraints are being compiled", 1),
            "control": ThreadPool("control", 4, limits.control_waiting, "control requests are waiting", 1),
            # Promotes that ask golden examples may take minutes.
            "promoting": ThreadPool("aside", 1, MOST_PROMOTES, "promotes are asking golden examples", 10),
            "recording": ThreadPool("tell", 1, limits.outcomes_waiting, "requests with outcomes are waiting", 1),
            # A plan loads a base, and a hostile table takes as long as it may.
            "preview": ThreadPool("preview", 2, MOST_PREVIEWS, "tables are being read and recipes planned", 5),
        }
        # Anybody may come back from a provider, and it may be slow.
        self.signing_in = ThreadPool("sign-in", 4, MOST_SIGN_INS, "sign-ins wait for the provider", 5)
        self._tenants_lock, self._token_lock, self._guard_lock = (threading.Lock() for _ in range(3))
        self.tenants: dict[str, View] = {}  # each as an access that sees all of it
        self._totals = TenantTotals()
        self.view: Callable[[Access], View] = lru_cache(MOST_VIEWS)(self._view)  # the server as an access sees it
        self.metrics = self.tenant(DEFAULT).metrics  # of all requests
        self._open_tenants()
        self._followers = Followers(self.log, self._count_failure)

    # --- tenants ------------------------------------------------------------------------------------------------------

    def tenant(self, name: str) -> View:
        """What this server keeps for a tenant, made when it is first asked for."""
        with self._tenants_lock:
            if name not in self.tenants:
                self.tenants[name] = self._open_tenant(name)
            return self.tenants[name]

    def _view(self, access: Access) -> View:
        whole = self.tenant(access.tenant)
        if access.whole:
            return replace(whole, access=access)
        workspace = whole.workspace.with_access(access)
        engines = SeenEngines(self.engines, workspace.resolve, access, self._home.store.access.tenant)
        aliases = SeenAliases(whole.aliases, engines)
        return replace(whole, access=access, workspace=workspace, engines=engines, aliases=aliases)

    def _open_tenant(self, name: str) -> View:
        home = self._home.store.access.tenant
        workspace = self._home if name == home else self._home.with_access(Access(name))
        build = [
            {"version": __version__, "base": each.name, "fingerprint": each.fingerprint} for each in self.engines.bases
        ]
        made = partial(Metrics, replica=self.settings.replica, tenant=name, totals=self._totals)
        engines = SeenEngines(self.engines, workspace.resolve, workspace.store.access, home)
        store, clock = workspace.store, self.clock
        database = store.database(make=True)
        aliases = AliasWatcher(store, engines, self.settings.alias, clock)
        routed = partial(_callable, aliases, engines)
        metrics = made(self._gauges, self._figures, build, adapters=routed) if name == DEFAULT else made(dict)
        router = workspace.router(mark=partial(self._newest.mark, "experiments", store.access.tenant))
        routing = Routing(router, aliases, engines, store, clock)
        log = self.log if self.settings.log_texts else None
        shadows = Shadows(engines, routing, metrics, self.limits, clock, log)
        return View(
            services=self,
            access=Access(name),
            workspace=workspace,
            engines=engines,
            aliases=aliases,
            routing=routing,
            shadows=shadows,
            promises=LivePromises(database, partial(self._newest.mark, "promises", store.access.tenant)),
            sampler=InputSampler(database, self.engines, self.options, name, self.log, clock),
            metrics=metrics,
            **{each: pool.of(name) for each, pool in self._pools.items()},
        )

    def _open_tenants(self) -> None:
        """Follow the store for every tenant that has a token."""
        for access in self.guard.accesses():
            self.tenant(access.tenant)

    # --- following the store ------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the versions to load in advance are loaded, or failed to load."""
        return all(each.ready for each in self._all_tenants())

    def read_tokens(self) -> None:
        """Follow tokens once."""
        with self._token_lock:  # or an older reading could bring back what was revoked since
            self.guard.set_tokens(self._home.tokens.of_all_tenants())
        self._open_tenants()

    def _all_tenants(self) -> Sequence[View]:
        return list(self.tenants.values())

    def _apply_guards(self) -> None:
        """Do what the guards of experiments ask, on one server."""
        if self.replica.lead():
            self._each_tenant(self._apply_guards_of)()

    def _apply_guards_of(self, tenant: View) -> None:
        acts = tenant.routing.router.running_experiments() or tenant.workspace.settles or tenant.promises.has_any
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
            tenant.follow()

    def _send_alarms(self) -> None:
        self._alarms.turn(leads=self.settings.alarm is not None and self.replica.lead())

    def _follow_tokens(self) -> None:
        mark = self._newest.mark("tokens")
        if mark != self._tokens_mark:
            self.read_tokens()
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
            ("turret-sessions", self.guard.sessions.refresh, REFRESH_SECONDS),
            ("turret-heap", trim, TRIM_SECONDS),
        ):
            self._followers.start(name, follow, seconds)

    def _follow_aliases(self, tenant: View) -> None:
        tenant.aliases.poll(mark=self._newest.mark("aliases", tenant.workspace.store.access.tenant))

    def _each_tenant(self, follow: Callable[[View], None]) -> Callable[[], None]:
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
        for pool in (*self._pools.values(), self.signing_in):
            pool.close()
        self.previews.close()

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _gauges(self) -> dict[str, float]:
        tenants, jobs = self._all_tenants(), dict[str, float]()
        with suppress(TurretError):  # the other figures do not need the store
            jobs["jobs_waiting"] = float(count_waiting(self._database))
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

    def _figures(self) -> dict[str, Figures]:
        """The figures of the engine of each base."""
        return {each.name: asdict(each.engine.stats()) for each in self.engines.bases}


@dataclass(frozen=True, eq=False)
class View:
    """A server as one access sees it. What the access does not see is not there."""

    services: Services
    access: Access
    workspace: Workspace
    engines: SeenEngines
    # Of the whole tenant:
    aliases: AliasWatcher
    routing: Routing
    shadows: Shadows
    promises: LivePromises
    sampler: InputSampler
    metrics: Metrics
    # Threads, on which the tenant takes turns with others:
    asking: TenantThreads
    parsing: TenantThreads
    compiling: TenantThreads
    control: TenantThreads
    promoting: TenantThreads
    recording: TenantThreads
    preview: TenantThreads

    @property
    def ready(self) -> bool:
        """Whether the versions of the tenant to load in advance are loaded, or failed to load."""
        return self.aliases.ready and self.routing.ready

    @property
    def in_flight(self) -> int:
        """Requests in flight, as far as they concern the access."""
        load = self.services.load
        return load.requests if self.access.operates else load.requests_of(self.access.tenant)

    # --- bases and their adapters -------------------------------------------------------------------------------------

    def base_of(self, model: str) -> ServedBase:
        """The base of a model. May read the store. Raises NotFound, or BadRequest for adapters of different bases."""
        try:
            return self.engines.base_of(model if self.engines.is_base(model) else self.aliases.exact(model))
        except NotFound as error:
            raise self.missing_model(model, error) from None

    def missing_model(self, model: str, error: NotFound, *, panels: bool = False) -> NotFound:
        """The error for a model that is not here: it lists what the access may ask on this server's bases.

        Reads the store.

        Args:
            error: Of the store; kept if the adapter is here, since it then lists its own versions and aliases.
            panels: Whether the model may be a panel.
        """
        known, name = self.workspace.panels.names() if panels else (), model.partition("@")[0]
        if name in known:
            return self.workspace.panels.missing(model, error)
        fingerprints = self.engines.fingerprints
        on_base = versions.c.manifest[("base", "fingerprint")].as_string().in_(fingerprints)
        query = select(adapters.c.name).join(versions, versions.c.adapter_id == adapters.c.id).where(on_base).distinct()
        with self.workspace.store.database(make=True).reading() as connection:
            query = query.where(seen_adapters(connection), seen_versions(connection))
            if connection.execute(query.where(adapters.c.name == name).limit(1)).first() is not None:
                return error
            names = connection.execute(query.order_by(adapters.c.name).limit(MOST_NAMED)).scalars().all()
        may_ask = [*names, *(each.name for each in self.engines.askable)]
        which = f"expected one of {', '.join(may_ask)}" if may_ask else "you may ask none"
        which += f", or a panel: {', '.join(known[:MOST_NAMED])}" if known else ""
        where = "this server's base" if len(fingerprints) == 1 else "the bases of this server"
        return NotFound(f"no adapter named {ascii(name)[:60]} on {where}: {which}")

    # --- outcomes, golden examples, and the store ---------------------------------------------------------------------

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

    def golden_answers(self, reference: str, texts: Sequence[str]) -> list[Answer]:
        """A version's answers to golden examples, in order, so that a promote loads no second base. Blocks.

        A few at a time, after all requests, so they delay none. Raises what `submit` and tickets raise.
        """
        kind = stored_task(self.workspace.resolve(reference).task).request
        found: list[Answer] = []
        for start in range(0, len(texts), GOLDEN_AT_ONCE):
            tickets: list[Ticket] = []
            try:
                tickets.extend(self._submit_golden(kind, reference, text) for text in texts[start:][:GOLDEN_AT_ONCE])
                found += [ticket.result() for ticket in tickets]
            finally:
                for ticket in tickets:
                    ticket.cancel()
        return found

    def _submit_golden(self, kind: RequestKind, reference: str, text: str) -> Ticket:
        until = time.monotonic() + GOLDEN_PATIENCE
        while True:
            if self.services.load.draining:
                raise Draining("the server is shutting down: not all golden examples were asked, and nothing was moved")
            try:
                deadline = self.services.limits.answer_seconds
                return self.engines.submit(kind, text, reference, priority=LOW_PRIORITY, deadline=deadline)
            except Busy as error:
                if time.monotonic() >= until:
                    raise
                time.sleep(min(1.0, max(0.01, error.retry_after)))

    def refresh(self) -> None:
        """Follow tokens once, and the aliases, experiments and promises of the tenant."""
        self.services.read_tokens()
        self.follow()

    def follow(self) -> None:
        """Follow the aliases, experiments and promises of the tenant once."""
        self.aliases.poll()
        self.routing.refresh()
        self.promises.turn()

    def turn(self) -> None:
        """Write the logs, and read experiments and promises."""
        self.routing.turn()
        self.promises.turn()


def _callable(aliases: AliasWatcher, engines: SeenEngines) -> tuple[Sequence[str], Sequence[str]]:
    """What clients may call the adapters in memory, and those that requests wait for: `news@3`, and `news` if it is."""

    def names(versions: Sequence[str]) -> list[str]:
        plain = [each.partition("@")[0] for each in versions]
        return [*versions, *(name for name, each in zip(plain, versions, strict=True) if aliases.exact(name) == each)]

    waiting = [each for stats in engines.stats().values() for each in stats.waiting_adapters]
    return names([each.version for each in engines.loaded_adapters()][:MOST_VERSIONS]), names(waiting[:MOST_VERSIONS])
