"""Where a fleet of 1,000 replicas, 100,000 adapters and 1,000 tenants breaks first, from the measured costs of one.

    python benchmarks/fleet.py --measure             # what one server asks of PostgreSQL and S3; some minutes
    python benchmarks/fleet.py --validate            # 1 and 3 real servers behind HAProxy, beside their simulation
    python benchmarks/fleet.py --simulate            # the fleet; the same seed gives the same numbers
    python benchmarks/fleet.py --jobs                # claims of a job among 10,000; cells a minute with 1 and 2 workers
    python benchmarks/fleet.py --report

`--measure` fills a catalog with the rows of the fleet, and times each transaction of a server and a worker on it: its
statements as PostgreSQL logs them, the time of its processors, and the time that it takes. `--simulate` is a
discrete-event simulation of requests, loads, promotes, jobs and the single writer of the catalog. The requests go to
servers as `deploy/haproxy.cfg` sends them. The designs are:

- tenant: each server asks the store for each tenant, loads every promoted version, and adds sums as the only writer
- log: each server follows all tenants by the audit log, loads in advance what its memory holds, and adds sums beside
  the writer
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import hashlib
import heapq
import itertools
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import record
from serve_sides import BASES, adapters

if TYPE_CHECKING:
    from turret.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # what starts PostgreSQL and S3

NAME = "fleet"
CLAIM = "costs of one server on PostgreSQL and S3, and what a fleet of a thousand makes of them"
BASE, KILOBYTES = BASES["encoder"], 1000
CORES = 16  # of the database in the tables
BLOCKS = 10  # of the repeats of a transaction
POINTS = 16  # that HAProxy gives each server on its ring
FACTOR = 200  # hash-balance-factor of deploy/haproxy.cfg
WRITES = ("usage of 1", "usage of 50", "quotas of 1", "quotas of 50", "promote", "claim", "renewal", "end of a job")
PROMOTED = "production"


# --- the world that is simulated --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """How large a fleet is, and what is asked of it. Rates are of the whole fleet, in a second."""

    replicas: int = 1000
    tenants: int = 1000
    adapters: int = 100_000  # each of one tenant, each promoted
    slots: int = 1024  # adapters in the memory of a replica
    requests: float = 20_000.0
    zipf: float = 1.0  # the popularity of the adapter at place n is n ** -zipf
    quotas: float = 0.5  # the share of tenants whose tokens have a quota of tokens
    promotes: float = 0.2
    workers: int = 100
    jobs: float = 2.0
    job_seconds: float = 40.0
    seconds: float = 20.0
    warm_up: float = 20.0  # seconds before, which are not counted
    design: str = "log"
    factor: int = FACTOR
    seed: int = 0
    prefilled: bool = True  # every replica has in memory what hashes to it


@dataclass
class Cost:
    """One transaction: its statements, milliseconds of the database's processors, and milliseconds that it takes."""

    statements: float
    cpu: float
    wall: float


@dataclass
class Replica:
    """A server: what it has in memory, and when its loader and its engine are free."""

    memory: OrderedDict[int, None] = field(default_factory=OrderedDict)
    loading: dict[int, float] = field(default_factory=dict)
    loader_free: float = 0.0
    engine_free: float = 0.0
    used: set[int] = field(default_factory=set)  # adapters since the last flush of usage
    charged: set[int] = field(default_factory=set)  # tenants since the last flush of quotas
    resolved: dict[int, float] = field(default_factory=dict)


class Ring:
    """Consistent hashing with bounded loads, as HAProxy does it, with other hashes.

    Source: `chash_get_server_hash` and `chash_server_is_eligible` of HAProxy: a server may have its part of
    `(all requests in flight + 1) * factor / 100`, rounded up, and one at least. A full one gives the request to the
    next on the ring.
    """

    def __init__(self, servers: int, factor: int = FACTOR) -> None:
        places = ((_hash(f"server {server} {point}"), server) for server in range(servers) for point in range(POINTS))
        points = sorted(places)
        self._keys, self._owners = [key for key, _ in points], [owner for _, owner in points]
        self._servers, self._factor = servers, factor
        self._starts: dict[str, int] = {}

    def own(self, model: str) -> int:
        """The server of a model."""
        return self._owners[self._start(model)]

    def choose(self, model: str, in_flight: Sequence[int], all_in_flight: int) -> int:
        """The server that gets a request. in_flight: the requests of each server."""
        whole, rest = divmod(((all_in_flight + 1) * self._factor + 99) // 100, self._servers)
        start, owners = self._start(model), self._owners
        for place in range(start, start + len(owners)):
            server = owners[place % len(owners)]
            if in_flight[server] < max(1, whole + (server < rest)):
                return server
        return owners[start]

    def _start(self, model: str) -> int:
        if model not in self._starts:
            self._starts[model] = bisect.bisect(self._keys, _hash(model)) % len(self._keys)
        return self._starts[model]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Simulation:
    """One run. `costs` are those of `--measure`, by the name of the transaction."""

    def __init__(self, fleet: Fleet, costs: Mapping[str, Cost], load_ms: float, answer_ms: float) -> None:
        self.fleet, self.costs = fleet, costs
        self.load, self.answer = load_ms / 1000, answer_ms / 1000
        self.draw = random.Random(fleet.seed)
        self.ring = Ring(fleet.replicas, fleet.factor)
        self.replicas = [Replica() for _ in range(fleet.replicas)]
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.order = itertools.count()
        self.loads, self.in_flight = [0] * fleet.replicas, 0  # requests in flight
        self.lock_free = 0.0
        self.count: Counter[str] = Counter()  # transactions by name, after the warm-up
        self.happened: Counter[str] = Counter()
        self.waits: list[float] = []  # of requests
        self.lock_waits: list[float] = []
        self.lock_busy = 0.0
        weights = itertools.accumulate((place + 1) ** -fleet.zipf for place in range(fleet.adapters))
        self.weights = list(weights)
        self.popular = list(range(fleet.adapters))
        self.draw.shuffle(self.popular)  # so that a tenant has popular and rare ones

    # --- the clock ------------------------------------------------------------------------------------------------

    def at(self, moment: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (moment, next(self.order), act))

    def every(self, seconds: float, act: Callable[[float], float | None]) -> None:
        """Again and again; `act` may return when it has ended, and the pause begins then."""

        def again(now: float) -> None:
            self.at((act(now) or now) + seconds, again)

        self.at(self.draw.random() * seconds, again)

    def counted(self, now: float) -> bool:
        return self.fleet.warm_up <= now

    def run(self) -> dict[str, Any]:
        fleet = self.fleet
        if fleet.prefilled:
            self.fill()
        for number in range(fleet.replicas):
            self.begin_replica(number)
        for _ in range(fleet.workers):
            self.every(1.0, lambda now: self.read(now, "no job waits"))
        self.poisson(fleet.requests, self.request)
        self.poisson(fleet.promotes, self.promote)
        self.poisson(fleet.jobs, self.job)
        end = fleet.warm_up + fleet.seconds
        while self.events and self.events[0][0] < end:
            now, _, act = heapq.heappop(self.events)
            act(now)
        return self.result()

    def poisson(self, rate: float, act: Callable[[float], None]) -> None:
        def again(now: float) -> None:
            act(now)
            self.at(now + self.draw.expovariate(rate), again)

        if rate > 0:
            self.at(self.draw.expovariate(rate), again)

    # --- the database ---------------------------------------------------------------------------------------------

    def read(self, now: float, name: str, times: int = 1) -> None:
        if self.counted(now):
            self.count[name] += times

    def write(self, now: float, name: str, rows: int = 1) -> float:
        """One transaction that writes. Returns when it ends. rows: of usage or quotas."""
        held = self.costs[name].wall
        if name.endswith(" of 1"):
            held = along(self.costs[name].wall, self.costs[name.replace(" of 1", " of 50")].wall, rows)
        if self.counted(now):
            self.count[name] += 1
            if name.endswith(" of 1"):
                self.count[f"more {name}"] += rows - 1
        if name.endswith(" of 1") and self.fleet.design != "tenant":  # sums are added beside the writer
            return now + held / 1000
        start = max(now, self.lock_free)
        self.lock_free = start + held / 1000
        if self.counted(now):
            self.lock_waits.append(start - now)
            self.lock_busy += held / 1000
        return self.lock_free

    # --- replicas -------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Each adapter is in the memory of the server that its name hashes to, the popular ones are last."""
        for place in reversed(range(self.fleet.adapters)):
            adapter = self.popular[place]
            memory = self.replicas[self.ring.own(f"a{adapter}")].memory
            memory[adapter] = None
            if len(memory) > self.fleet.slots:
                memory.popitem(last=False)

    def begin_replica(self, number: int) -> None:
        replica, tenants = self.replicas[number], self.fleet.tenants
        if self.fleet.design == "tenant":
            self.every(0.25, lambda now: self.read(now, "newest move"))
            self.every(0.25, lambda now: self.read(now, "tokens"))
            self.every(1.0, lambda now: self.read(now, "experiments of a tenant", tenants))
            self.every(3.0, lambda now: self.read(now, "guards", tenants))
        else:
            self.every(0.25, lambda now: self.read(now, "look"))
            self.every(3.0, lambda now: self.read(now, "guards"))

        def usage(now: float) -> float | None:
            rows, replica.used = len(replica.used), set()
            return self.write(now, "usage of 1", rows) if rows else None

        def quotas(now: float) -> float | None:
            rows, replica.charged = len(replica.charged), set()
            return self.write(now, "quotas of 1", rows) if rows else None

        self.every(2.0, usage)
        self.every(0.5, quotas)

    def request(self, now: float) -> None:
        fleet = self.fleet
        place = bisect.bisect(self.weights, self.draw.random() * self.weights[-1])
        adapter = self.popular[min(place, fleet.adapters - 1)]
        number = self.ring.choose(f"a{adapter}", self.loads, self.in_flight)
        replica = self.replicas[number]
        self.loads[number] += 1
        self.in_flight += 1
        if replica.resolved.get(adapter, 0.0) <= now:
            replica.resolved[adapter] = now + 1.0
            self.read(now, "resolve")
        self.tell(now, "requests")
        if self.ring.own(f"a{adapter}") != number:
            self.tell(now, "given to a neighbour")
        if adapter in replica.memory:
            replica.memory.move_to_end(adapter)
            self.compute(now, now, number, adapter)
            return
        self.tell(now, "misses")
        ready = replica.loading.get(adapter) or self.load_one(now, replica, adapter)
        self.at(ready, lambda then: self.compute(now, then, number, adapter))

    def tell(self, now: float, what: str, times: int = 1) -> None:
        if self.counted(now):
            self.happened[what] += times

    def load_one(self, now: float, replica: Replica, adapter: int) -> float:
        """When the replica's loader has it in memory; it loads one after the other."""
        ready = replica.loading[adapter] = replica.loader_free = max(now, replica.loader_free) + self.load
        self.tell(now, "loads")
        self.read(now, "load")

        def mount(_: float) -> None:
            replica.loading.pop(adapter, None)
            replica.memory[adapter] = None
            if len(replica.memory) > self.fleet.slots:
                replica.memory.popitem(last=False)

        self.at(ready, mount)
        return ready

    def compute(self, asked: float, now: float, number: int, adapter: int) -> None:
        replica = self.replicas[number]
        done = replica.engine_free = max(now, replica.engine_free) + self.answer

        def end(then: float) -> None:
            self.loads[number] -= 1
            self.in_flight -= 1
            replica.used.add(adapter)
            tenant = adapter % self.fleet.tenants
            if tenant < self.fleet.quotas * self.fleet.tenants:
                replica.charged.add(tenant)
            if self.counted(asked):
                self.waits.append(then - asked)

        self.at(done, end)

    # --- the control plane ----------------------------------------------------------------------------------------

    def promote(self, now: float) -> None:
        adapter, fleet = self.draw.randrange(self.fleet.adapters), self.fleet
        moved = self.write(now, "promote")
        self.tell(now, "promotes")
        if self.counted(now):
            self.happened["milliseconds of promotes"] += round(1000 * (moved - now))

        def follow(then: float) -> None:
            everyone = fleet.design == "tenant"
            self.read(then, "aliases of a tenant", fleet.replicas * (fleet.tenants if everyone else 1))
            for replica in self.replicas:
                if adapter in replica.memory or everyone:
                    replica.memory.pop(adapter, None)
                    self.load_one(then, replica, adapter)

        self.at(moved + 0.25, follow)

    def job(self, now: float) -> None:
        taken = self.write(now, "claim")
        for turn in range(1, int(self.fleet.job_seconds / 10)):
            self.at(taken + 10 * turn, lambda then: void(self.write(then, "renewal")))
        self.at(taken + self.fleet.job_seconds, lambda then: void(self.write(then, "end of a job")))

    # --- what came out --------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        seconds, happened = self.fleet.seconds, self.happened
        statements: Counter[str] = Counter()
        cpu: Counter[str] = Counter()
        for name, times in self.count.items():
            if name.startswith("more "):
                name = name.removeprefix("more ")
                one, many = self.costs[name], self.costs[name.replace(" of 1", " of 50")]
                cost = Cost((many.statements - one.statements) / 49, (many.cpu - one.cpu) / 49, 0.0)
            else:
                cost = self.costs[name]
            statements[name] += times * cost.statements / seconds
            cpu[name] += times * cost.cpu / 1000 / seconds
        ahead = self.fleet.adapters if self.fleet.design == "tenant" else min(self.fleet.adapters, self.fleet.slots)
        return {
            "statements": sum(statements.values()),
            "database_cores": sum(cpu.values()),
            "by_transaction": {name: round(each, 3) for name, each in statements.most_common()},
            "cores_by_transaction": {name: round(each, 4) for name, each in cpu.most_common()},
            "lock_use": self.lock_busy / seconds,
            "lock_wait": quantiles(self.lock_waits),
            "hit_rate": 1 - happened["misses"] / max(1, happened["requests"]),
            "given_to_a_neighbour": happened["given to a neighbour"] / max(1, happened["requests"]),
            "loads": happened["loads"] / seconds,
            "promote_ms": happened["milliseconds of promotes"] / max(1, happened["promotes"]),
            "request_ms": [1000 * each for each in quantiles(self.waits)],
            "in_flight_at_the_end": self.in_flight,
            "ready_after": ahead * self.load,
        }


def along(one: float, fifty: float, rows: int) -> float:
    """What some rows cost, on the line through what 1 and 50 cost."""
    return one + (rows - 1) * max(0.0, fifty - one) / 49


def void(_: float) -> None:
    """An event that returns nothing."""


def quantiles(values: Sequence[float]) -> list[float]:
    """p50, p99 and the most."""
    if len(values) < 2:
        return [0.0, 0.0, 0.0]
    found = statistics.quantiles(values, n=100, method="inclusive")
    return [found[49], found[98], max(values)]


# --- costs of one -----------------------------------------------------------------------------------------------------


@contextmanager
def store_by_url() -> Iterator[tuple[Any, str, str]]:
    """PostgreSQL, the name of a new database there, and the URL of a store with files in S3."""
    from servers import BUCKET, postgres, s3

    with postgres() as server, s3(), server.database() as name, tempfile.TemporaryDirectory() as local:
        yield server, name, f"{server.url(name)}&files=s3://{BUCKET}/{name}&local={local}"


def put_one(store: Store, folder: Path, names: Sequence[str]) -> None:
    """Real LoRAs with random weights, one version a name."""
    from turret import bases
    from turret.adapters import BaseInfo
    from turret.bundles import save_bundle

    base = bases.load(BASE, task="classify", num_labels=5, dtype="float32")
    info = BaseInfo(BASE, base.fingerprint, base.family.name)
    for name, adapter in zip(names, adapters(base.model, "classify", len(names)).values(), strict=False):
        save_bundle(replace(adapter, base=info), folder / name)
        store.put(name, folder / name, metrics={"test": {"accuracy": 0.9, "loss": 0.3}})


def fill(server: Any, database: str, tenants: int, count: int) -> None:
    """Rows of the fleet: `a0` … of tenants `t0` …, all with the files of the first version, each promoted."""
    digest = "'sha256:' || md5(a.id::text) || md5('x' || a.id)"
    for statement in (
        f"INSERT INTO adapters (tenant, name, last_number, created) SELECT 't' || n % {tenants}, 'a' || n, 1, '2026' "
        f"FROM generate_series(0, {count - 1}) n",
        "INSERT INTO versions (adapter_id, number, digest, created, bytes, metrics, manifest, who) "
        f"SELECT a.id, 1, {digest}, v.created, v.bytes, v.metrics, v.manifest, v.who "
        "FROM adapters a, versions v WHERE v.id = 1 AND a.tenant <> 'default'",
        "INSERT INTO files SELECT v.id, f.path, f.digest, f.bytes, f.upload FROM versions v, files f "
        "WHERE f.version_id = 1 AND v.id IN (SELECT v.id FROM versions v JOIN adapters a ON a.id = v.adapter_id "
        "WHERE a.tenant <> 'default')",
        f"INSERT INTO aliases SELECT v.adapter_id, '{PROMOTED}', v.id, '2026' FROM versions v JOIN adapters a "
        "ON a.id = v.adapter_id WHERE a.tenant <> 'default'",
        "INSERT INTO alias_history (adapter_id, alias, version_id, moved, number, verb) "
        "SELECT adapter_id, alias, version_id, moved, 1, 'promote' FROM aliases",
        "ANALYZE",
    ):
        server.execute(statement, database)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Each transaction of a server and a worker, on a catalog with the rows of the fleet."""
    with store_by_url() as (server, database, url), tempfile.TemporaryDirectory() as folder:
        from turret.access import Access
        from turret.workspace import Workspace

        whole = Workspace(url)
        put_one(whole.store, Path(folder), ["first"])
        fill(server, database, options.tenants, options.adapters)
        for number in range(options.tenants):
            whole.with_access(Access(f"t{number}")).tokens.create("t", tokens_per_minute=1_000_000)
        meter = Meter(server)
        costs = {}
        for name, act in transactions(whole, options).items():
            costs[name] = meter.cost(act, options.repeats)
            print(f"{name}: {costs[name]}", file=sys.stderr)
        load = loaded(whole, options)
        sizes = server.execute("SELECT pg_total_relation_size('usage') / count(*) FROM usage", database)
        return {
            "what": "costs", "tenants": options.tenants, "adapters": options.adapters, "repeats": options.repeats,
            "costs": {name: asdict(cost) for name, cost in costs.items()},
            "load_ms": load, "usage_row_bytes": int(sizes[0][0]),  # type: ignore[call-overload]
            "machine": record.machine(threads=1),
        }  # fmt: skip


def transactions(whole: Any, options: argparse.Namespace) -> dict[str, Callable[[int], object]]:
    """By name, what is called with the number of the repeat."""
    from turret.access import Access
    from turret.audit import NewestActions
    from turret.experiments import rows
    from turret.store import leases
    from turret.store.jobs import JobQueue
    from turret.store.usage import Budgets, UsageLog

    store, database = whole.store, whole.store.database()
    owners = [whole.with_access(Access(f"t{number}")).store for number in range(100)]
    newest, usage, budgets = NewestActions(database, time.monotonic, 0.0), UsageLog(database), Budgets(database)
    newest.mark("aliases")
    queues = [JobQueue.of(each) for each in owners]
    held: list[Any] = []

    def adapter(number: int) -> str:  # of the tenant at this place of `owners`
        return f"a{number % 100 + options.tenants * (number % (options.adapters // options.tenants))}"

    def counted(number: int, keys: int) -> None:
        for place in range(keys):
            usage.add(f"t{place}", f"a{number % 20 * 50 + place}", 1, 10, 1)
        usage.flush()

    def charged(keys: int) -> None:
        budgets.change(
            [(f"tenant t{place}", "tokens", 1_000_000, -10.0) for place in range(keys)], budgets.writer.next()
        )

    def experiments(number: int) -> None:
        with owners[number % 100].database().reading() as connection:
            rows.running_experiments(connection)

    def guards(_: int) -> None:
        database.writable()
        with database.reading() as connection:
            leases.is_taken(connection, "guards of experiments")

    def load(number: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            owners[number % 100].materialize(f"{adapter(number)}@1", Path(folder, "bundle"))

    def submit(number: int) -> None:
        queues[number % 100].submit("new", f'name = "new"\nbase = "{BASE}"\n# {number}\n')

    def claim(_: int) -> None:
        held.append(queues[0].take())

    def renew(number: int) -> None:
        with database.writing() as connection:
            leases.renew(connection, held[number % len(held)].lease)

    def promote(number: int) -> None:
        owner, name = owners[number % 100], adapter(number)
        owner.promote(f"{name}@1", f"stage{number}")

    return {
        "look": lambda _: newest.mark("aliases"),
        "resolve": lambda number: owners[number % 100].resolve(f"{adapter(number)}@1"),
        "load": load,
        "aliases of a tenant": lambda number: owners[number % 100].pointing(),
        "experiments of a tenant": experiments,
        "newest move": lambda _: store.last_move(),
        "tokens": lambda _: store.tokens.of_all_tenants(),
        "guards": guards,
        "no job waits": lambda _: queues[0].take(),
        "usage of 1": lambda number: counted(number, 1),
        "usage of 50": lambda number: counted(number, 50),
        "quotas of 1": lambda _: charged(1),
        "quotas of 50": lambda _: charged(50),
        "promote": promote,
        "submit": submit,
        "claim": claim,
        "renewal": renew,
        "end of a job": lambda number: queues[0].finish(held[number], {"version": "new@1"}),
    }


class Meter:
    """Measures transactions on a PostgreSQL of this benchmark."""

    def __init__(self, server: Any) -> None:
        self._server, self._log = server, server.folder / "log"

    def cost(self, act: Callable[[int], object], repeats: int) -> Cost:
        """Half of the repeats are logged, and the others timed, in ten blocks.

        Other work on the machine makes a block slower, and none quicker. So the time is the lowest decile, and that of
        the processors is of the second cheapest block.
        """
        with self.statements() as said:
            for number in range(repeats):
                act(number)
        walls, blocks, size = [], [], repeats // BLOCKS
        for block in range(BLOCKS):
            before = self.cpu()
            for number in range(repeats + block * size, repeats + (block + 1) * size):
                start = time.perf_counter()
                act(number)
                walls.append(time.perf_counter() - start)
            blocks.append((self.cpu() - before) / size)
        return Cost(said[0] / repeats, 1000 * sorted(blocks)[1], 1000 * statistics.quantiles(walls, n=10)[0])

    @contextmanager
    def statements(self) -> Iterator[list[int]]:
        """What PostgreSQL executes in the block: in the list, after it."""
        said: list[int] = []
        self._set("all")
        start = self._log.stat().st_size
        try:
            yield said
        finally:
            self._set("none")
            with self._log.open("rb") as log:
                log.seek(start)
                found = re.findall(rb"LOG:  (?:statement|execute [^:]*): (?!ALTER SYSTEM|SELECT pg_reload)", log.read())
            said.append(len(found))

    def _set(self, what: str) -> None:
        self._server.execute(f"ALTER SYSTEM SET log_statement = '{what}'")
        self._server.execute("SELECT pg_reload_conf()")
        time.sleep(0.5)

    def cpu(self) -> float:
        """Seconds of processors that the server's processes have had."""
        root = self._server.processes[-1].pid
        children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
        ticks = 0.0
        fields = Path(f"/proc/{root}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(each) for each in fields[13:15]) / os.sysconf("SC_CLK_TCK")  # of those that have ended
        for each in (str(root), *children):
            try:
                ticks += int(Path(f"/proc/{each}/schedstat").read_text().split()[0]) / 1e9
            except OSError:
                continue
        return ticks


def loaded(whole: Any, options: argparse.Namespace) -> float:
    """Milliseconds until an engine has one more adapter of the store in memory; the lowest decile."""
    from turret.engine import Limits

    seconds = []
    with whole.engine(BASE, limits=Limits(slots=16), dtype="float32") as engine:
        for number in range(options.repeats // 2):
            start = time.perf_counter()
            engine.warm(f"t{number % 10}/a{number % 10 + options.tenants * (number // 10)}@1")
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.quantiles(seconds[2:], n=10)[0]


# --- jobs -------------------------------------------------------------------------------------------------------------


def claims(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of taking a job and of giving it back, with more and more that wait: 100 tenants, one owner each."""
    found: dict[str, Any] = {}
    with store_by_url() as (_, _, url), tempfile.TemporaryDirectory() as folder:
        for kind, where in (("folder", folder), ("PostgreSQL", url)):
            for waiting in (100, 1_000, 10_000):
                found[f"{kind}, {waiting}"] = _claims(where, waiting, options.repeats)
    return {"what": "claims", "ms": found, "machine": record.machine(threads=1)}


def _claims(where: str, waiting: int, repeats: int) -> list[float]:
    from sqlalchemy import func, insert, select

    from turret.database import jobs
    from turret.store import Store
    from turret.store.jobs import JobQueue, add_job

    store = Store(where)
    queue, database = JobQueue.of(store, make=True), store.database(make=True)
    with database.writing() as connection:
        have = connection.execute(select(func.count()).select_from(jobs)).scalar_one()
        if not have:
            add_job(connection, "training", "r0", "t0", name="n", recipe="name = 'n'", owner="o0")
            have = 1
        one = dict(connection.execute(select(jobs).where(jobs.c.id == "r0")).mappings().one())
        more = [one | {"id": f"r{n}", "tenant": f"t{n % 100}", "owner": f"o{n % 100}"} for n in range(have, waiting)]
        if more:
            connection.execute(insert(jobs), more)
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        taken = queue.take()
        took.append(1000 * (time.perf_counter() - start))
        queue.put_aside(taken)
    return [round(each, 2) for each in took]


def cells(workers: int) -> dict[str, Any]:
    """A comparison's trainings and measurements through workers on PostgreSQL and S3: cells a minute."""
    import small_models

    from turret.recipe import Recipe
    from turret.workspace import Workspace

    with store_by_url() as (_, _, url), tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        base = small_models.save_base("bert", folder / "bert")
        rows = [
            f"{'great film' if row % 2 else 'dull story'} {row},{'good' if row % 2 else 'bad'}" for row in range(200)
        ]
        (folder / "films.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        recipe = Recipe(name="films", base=str(base), data=str(folder / "films.csv"))
        recipe = recipe.with_overrides({"train.epochs": "10", "data.test": "40", "train.checkpoint_every": "100"})
        log = opened.enter_context((folder / "log").open("w"))
        for place in range(workers):
            command = [sys.executable, "-m", "turret", "worker", "--slots", "1", "--store", f"{url}{place}"]
            _running(opened, command, log)
        workspace = Workspace(url)
        start = time.perf_counter()
        workspace.compare(recipe, methods="lora,head", against="lora", seeds=6, on="workers")
        took = time.perf_counter() - start
        with workspace.store.database().reading() as connection:
            from sqlalchemy import select

            from turret.database import jobs

            ends = sorted(connection.execute(select(jobs.c.ended).where(jobs.c.kind == "cell")).scalars())
        moments = [datetime.fromisoformat(each).timestamp() for each in ends]
        steady = moments[len(moments) // 3 :]  # without the start of the workers and the loading of the base
        rate = 60 * (len(steady) - 1) / max(1e-9, steady[-1] - steady[0])
    return {
        "what": "cells", "workers": workers, "cells": len(moments), "seconds": took, "a_minute": rate,
        "whole": 60 * len(moments) / took, "machine": record.machine(threads=1),
    }  # fmt: skip


# --- real servers beside the simulation -------------------------------------------------------------------------------


def validate(servers: int, costs: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Real servers behind a real HAProxy, asked at a rate, and the simulation of the same."""
    fleet = Fleet(
        replicas=servers, tenants=options.tenants, adapters=options.adapters, slots=options.slots,
        requests=options.rate * servers, promotes=0.1, workers=0, jobs=0.0, quotas=0.5,
        seconds=options.seconds, warm_up=options.seconds / 2, design=options.design, seed=options.seed, prefilled=False,
    )  # fmt: skip
    real = measured(fleet)
    simulated = Simulation(fleet, as_costs(costs), costs["load_ms"], real.pop("answer_ms")).run()
    return {
        "what": "validation", "fleet": asdict(fleet), "real": real, "simulated": simulated,
        "machine": record.machine(threads=1),
    }  # fmt: skip


def measured(fleet: Fleet) -> dict[str, Any]:
    from turret.access import Access
    from turret.workspace import Workspace

    with store_by_url() as (server, database, url), tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        whole = Workspace(url)
        put_one(whole.store, Path(folder), ["first"])
        size = whole.store.resolve("first").bytes
        fill(server, database, fleet.tenants, fleet.adapters)
        secrets = []
        for number in range(fleet.tenants):
            quota = 1_000_000 if number < fleet.quotas * fleet.tenants else None
            secrets.append(whole.with_access(Access(f"t{number}")).tokens.create("t", tokens_per_minute=quota)[1])
        operator = whole.tokens.create("operator", ["admin"])[1]
        ports = [_free_port() for _ in range(fleet.replicas)]
        command = [sys.executable, "-m", "turret", "serve", "--base", BASE, "--dtype", "float32", "--store", url]
        command += ["--memory", str(round(size * (fleet.slots + 0.5))), "--proxy", "127.0.0.1", "--json"]
        log = opened.enter_context(Path(folder, "log").open("w"))
        for port in ports:
            _running(opened, [*command, "--port", str(port)], log)
        addresses = [f"127.0.0.1:{port}" for port in ports]
        for address in addresses:
            _wait_until_ready(f"http://{address}/readyz", Path(folder, "log"))
        proxy = _haproxy(opened, Path(folder), addresses)
        meter = Meter(server)

        def promote(number: int) -> None:
            name = random.Random(f"{fleet.seed} {number}").randrange(fleet.adapters)
            owner = whole.with_access(Access(f"t{name % fleet.tenants}")).store
            owner.promote(f"a{name}@1", f"stage{number}")

        asyncio.run(asked(proxy, fleet, secrets, fleet.warm_up, promote))
        before = figures(addresses, operator)
        with meter.statements() as said:
            waits = asyncio.run(asked(proxy, fleet, secrets, fleet.seconds, promote))
        after = figures(addresses, operator)
        loads = after["loads"] - before["loads"]
        return {
            "statements": said[0] / fleet.seconds, "hit_rate": 1 - loads / max(1, len(waits)),
            "loads": loads / fleet.seconds, "requests": len(waits), "failed": waits.count(-1.0),
            "request_ms": [1000 * each for each in quantiles([each for each in waits if each >= 0])],
            "answer_ms": 1000 * statistics.median(sorted(waits)[: max(3, len(waits) // 4)]),
        }  # fmt: skip


async def asked(
    url: str, fleet: Fleet, secrets: Sequence[str], seconds: float, promote: Callable[[int], None]
) -> list[float]:
    """Requests at random moments, at the rate of the fleet, each for an adapter by its popularity; -1 if one failed."""
    import httpx2

    draw, found = random.Random(f"{fleet.seed} {seconds}"), list[float]()
    weights = list(itertools.accumulate((place + 1) ** -fleet.zipf for place in range(fleet.adapters)))
    popular = list(range(fleet.adapters))
    random.Random(fleet.seed).shuffle(popular)
    loop, start = asyncio.get_running_loop(), time.perf_counter()
    promoting = loop.create_task(_promotes(promote, fleet, seconds))
    async with httpx2.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def one(adapter: int) -> None:
            headers = {"authorization": f"Bearer {secrets[adapter % fleet.tenants]}"}
            at = time.perf_counter()
            got = await client.post(
                "/v1/classify", json={"model": f"a{adapter}", "input": "great film"}, headers=headers
            )
            found.append(time.perf_counter() - at if got.status_code == 200 else -1.0)

        tasks = []
        while time.perf_counter() - start < seconds:
            await asyncio.sleep(draw.expovariate(fleet.requests))
            place = bisect.bisect(weights, draw.random() * weights[-1])
            tasks.append(loop.create_task(one(popular[min(place, fleet.adapters - 1)])))
        await asyncio.gather(*tasks)
    await promoting
    return found


async def _promotes(promote: Callable[[int], None], fleet: Fleet, seconds: float) -> None:
    for _ in range(int(seconds * fleet.promotes)):
        await asyncio.sleep(1 / fleet.promotes)
        await asyncio.to_thread(promote, next(_PROMOTES))


_PROMOTES = itertools.count()


def figures(addresses: Sequence[str], secret: str) -> Counter[str]:
    """Loads of all servers."""
    import httpx2

    found: Counter[str] = Counter()
    for address in addresses:
        headers = {"authorization": f"Bearer {secret}"}
        text = httpx2.get(f"http://{address}/metrics", headers=headers, timeout=60, trust_env=False).text
        for value in re.findall(r"^turret_engine_loads_total\S* (\S+)$", text, re.MULTILINE):
            found["loads"] += round(float(value))
    return found


def _running(opened: ExitStack, command: Sequence[str], log: Any, **environment: str) -> subprocess.Popen[bytes]:
    words = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, env=words, stdout=log, stderr=log)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()

    opened.callback(end)
    return process


def _haproxy(opened: ExitStack, folder: Path, addresses: Sequence[str]) -> str:
    """`deploy/haproxy.cfg`, with as many servers."""
    lines = (Path(__file__).parents[1] / "deploy" / "haproxy.cfg").read_text(encoding="utf-8").splitlines()
    numbers = {name: place for place, name in enumerate(("one", "two", "three"), 1)}
    kept = [
        line for line in lines
        if (found := re.match(r" +server (\w+)", line)) is None or numbers[found[1]] <= len(addresses)
    ]  # fmt: skip
    (folder / "haproxy.cfg").write_text("\n".join(kept) + "\n")
    port, other = _free_port(), _free_port()
    words = {f"TURRET_SERVER_{place}": each for place, each in enumerate(addresses, 1)}
    words |= {"TURRET_LISTEN": f"127.0.0.1:{port}", "TURRET_FIGURES": f"127.0.0.1:{other}"}
    log = opened.enter_context((folder / "haproxy.log").open("w"))
    _running(opened, ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")], log, **words)
    _wait_until_ready(f"http://127.0.0.1:{port}/readyz", folder / "haproxy.log")
    return f"http://127.0.0.1:{port}"


def _wait_until_ready(url: str, log: Path) -> None:
    import httpx2

    for _ in range(1200):
        try:
            if httpx2.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.25)
    raise SystemExit(f"{url} is not ready: {log.read_text()[-500:]}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def as_costs(run: Mapping[str, Any]) -> dict[str, Cost]:
    return {name: Cost(**each) for name, each in run["costs"].items()}


# --- the command ------------------------------------------------------------------------------------------------------


def newest_costs() -> dict[str, Any]:
    found = [run for run in record.load(NAME) if run["what"] == "costs"]
    if not found:
        raise SystemExit("no costs are kept: run --measure first")
    return found[-1]


def answer_ms() -> float:
    """Milliseconds of an engine for a request of the newest kept run of serve_load.py for an encoder."""
    runs = [run for run in record.load("serve_load") if run["settings"]["kind"] == "encoder"]
    return 1000 * float(runs[-1]["took"]) / runs[-1]["requests"]


def main() -> None:
    options = _options()
    if options.measure:
        record.keep(NAME, CLAIM, measure(options))
    if options.validate:
        for servers in options.servers:
            record.keep(NAME, CLAIM, validate(servers, newest_costs(), options))
    if options.simulate:
        costs = newest_costs()
        sizes = [(design, replicas, FACTOR) for design in ("tenant", "log") for replicas in options.replicas]
        for design, replicas, factor in [*sizes, ("log", max(options.replicas), 5 * FACTOR)]:
            share = replicas / 1000
            fleet = Fleet(replicas=replicas, requests=20_000 * share, workers=max(1, round(100 * share)),
                          jobs=2 * share, design=design, factor=factor, seed=options.seed)  # fmt: skip
            done = Simulation(fleet, as_costs(costs), costs["load_ms"], answer_ms()).run()
            run = {"what": "simulation", "fleet": asdict(fleet), **done, "machine": record.machine(threads=1)}
            record.keep(NAME, CLAIM, run)
    if options.jobs:
        record.keep(NAME, CLAIM, claims(options))
        for workers in (1, 2):
            record.keep(NAME, CLAIM, cells(workers))
    print("\n\n".join((simulated(), validated(), jobs_table())))


DESIGNS = {"tenant": "each tenant asked for", "log": "the audit log followed"}


def simulated() -> str:
    """What a fleet of each size asks of its database, in both designs."""
    runs = record.newest([run for run in record.load(NAME) if run["what"] == "simulation"], _size)
    header = ["design", "replicas", "factor", "statements/s", "processors of the database", "the one writer is busy",
              "a write waits, p99 s", "hits in memory", "loads/s", "a promote, ms", "a request, p50 and p99 ms",
              "ready after, s"]  # fmt: skip
    rows = []
    for run in sorted(runs, key=lambda run: (run["fleet"]["design"] != "tenant", *_size(run)[1:])):
        (p50, p99, _), fleet = run["request_ms"], run["fleet"]
        rows.append([
            DESIGNS[fleet["design"]], fleet["replicas"], fleet["factor"], f"{run['statements']:,.0f}",
            f"{run['database_cores']:,.1f}", f"{100 * run['lock_use']:.0f}%", f"{run['lock_wait'][1]:.2f}",
            f"{100 * run['hit_rate']:.1f}%", f"{run['loads']:.0f}", f"{run['promote_ms']:.0f}", f"{p50:.0f}, {p99:.0f}",
            f"{run['ready_after']:,.0f}",
        ])  # fmt: skip
    return record.table(header, rows)


def _size(run: Mapping[str, Any]) -> tuple[Any, ...]:
    fleet = run["fleet"]
    return fleet["design"], fleet["replicas"], fleet["tenants"], fleet["adapters"], fleet["factor"]


def validated() -> str:
    """Real servers beside the simulation of the same, and the difference."""
    runs = record.newest([run for run in record.load(NAME) if run["what"] == "validation"], _size)
    header = ["design", "servers", "tenants", "statements/s, real", "simulated", "hits in memory, real", "simulated"]
    rows = []
    for run in sorted(runs, key=lambda run: (run["fleet"]["design"] != "tenant", run["fleet"]["replicas"])):
        real, ours = run["real"], run["simulated"]
        off, points = ours["statements"] / real["statements"] - 1, 100 * (ours["hit_rate"] - real["hit_rate"])
        rows.append([
            DESIGNS[run["fleet"]["design"]], run["fleet"]["replicas"], run["fleet"]["tenants"],
            f"{real['statements']:.1f}", f"{ours['statements']:.1f} ({100 * off:+.0f}%)",
            f"{100 * real['hit_rate']:.1f}%", f"{100 * ours['hit_rate']:.1f}% ({points:+.1f} points)",
        ])  # fmt: skip
    return record.table(header, rows)


def jobs_table() -> str:
    """Claims with many jobs waiting (the lowest decile, as of all costs), cells a minute, and a row of usage."""
    runs = record.newest([run for run in record.load(NAME) if run["what"] in ("claims", "cells")], _jobs)
    rows: list[list[object]] = []
    for run in runs:
        if run["what"] == "claims":
            for name, times in run["ms"].items():
                rows.append([f"a claim, {name} waiting", f"{statistics.quantiles(times, n=10)[0]:.1f} ms"])
        else:
            rows.append([f"cells a minute, {run['workers']} {'worker' if run['workers'] == 1 else 'workers'}",
                         f"{run['a_minute']:.1f}"])  # fmt: skip
    if costs := [run for run in record.load(NAME) if run["what"] == "costs"]:
        rows.append(["a row of usage", f"{costs[-1]['usage_row_bytes']} bytes"])
    return record.table(["", ""], rows)


def _jobs(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["what"], run.get("workers")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("measure", "validate", "simulate", "jobs", "report"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--tenants", type=int, help="default 1000; 20 with --validate")
    parser.add_argument("--adapters", type=int, help="default 100000; 200 with --validate")
    parser.add_argument("--repeats", type=int, default=100, help="of each transaction (default 100)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 3], help="with --validate (default 1 3)")
    parser.add_argument("--slots", type=int, default=40, help="adapters in memory with --validate (default 40)")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second of a server with --validate")
    parser.add_argument("--seconds", type=float, default=40.0, help="that are measured with --validate")
    parser.add_argument("--design", choices=["tenant", "log"], default="log", help="of the servers of --validate")
    parser.add_argument("--replicas", type=int, nargs="+", default=[3, 30, 100, 1000], help="with --simulate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.tenants = options.tenants or (20 if options.validate else 1000)
    options.adapters = options.adapters or (200 if options.validate else 100_000)
    return options


if __name__ == "__main__":
    main()
