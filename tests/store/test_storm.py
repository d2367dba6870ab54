"""Three servers and three workers on one PostgreSQL and S3, five tenants, while everything fails that can.

One of the six processes is killed, or stopped past its lease, again and again. PostgreSQL crashes about once a minute
within its transactions. S3 refuses, delays or cuts all requests for some seconds. Trainings are cancelled, a gc runs
now and then, and some requests are made to end or freeze a server.

TURRET_STORM_SECONDS says for how long; 240 by default. It takes up to twice as long on a machine that is so busy that
too little happens.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import byte_level
import psutil
import pytest
import small_models
from servers import PostgresServer
from sqlalchemy import func, select
from store.bundles import tensors, write_bundle
from store.s3_proxy import Proxy, proxied, through
from store.storm_clients import (
    Answer,
    Asker,
    Client,
    Collector,
    Faults,
    Killer,
    Operator,
    Program,
    Putter,
    Tenant,
    Watcher,
)

from turret import bases
from turret.access import Access
from turret.database import jobs
from turret.ops.cpu import compiled as kernels
from turret.recipe import Recipe
from turret.store import Store, leases, queued_data, usage
from turret.store.jobs import TRIES
from turret.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.fleet]
SECONDS = float(os.environ.get("TURRET_STORM_SECONDS", "240"))
TESTS = Path(__file__).parent.parent
TENANTS = ("amberfox", "cobaltowl", "jadeheron", "rubyotter", "violetmoth")
DRAIN_SECONDS = 300.0  # until every training has ended, after the last kill
SERVERS, WORKERS = ("server-1", "server-2", "server-3"), ("worker-1", "worker-2", "worker-3")
LEASE = 8.0
S3_FAULTS = ("refuse", "do-refuse", "hold", "cut", "do-cut")
MARK = "TURRET_STORM"  # in the environment of every process that the storm starts, and of those that they start
LOST_SECONDS = 2 * usage.SECONDS + 1  # usage that a killed server had not written, or was writing
FOLLOW_SECONDS = 10.0  # until a server on a busy machine has followed an alias; it looks four times a second
ENDED = {"finished", "failed", "cancelled"}


def made(word: str, place: int, url: str, base: dict[str, str], folder: Path) -> Tenant:
    """A tenant with tokens and versions: three of `news`, which all tenants have, and two of a name of its own."""
    workspace = Workspace(url, word)
    for name, count in (("news", 3), (f"{word}-own", 2)):
        for number in range(count):
            said = {"base": base, "task": {"kind": "classify"}}
            bundle = write_bundle(folder, tensors(10 * place + number + 5 * (name == "news")), said=said)
            workspace.store.put(name, bundle)
        workspace.promote(f"{name}@1", "production")
    secret = workspace.tokens.create(f"{word}-all", ["infer", "admin"])[1]
    limited = workspace.tokens.create(f"{word}-asks", ["infer"], adapters=["news", f"{word}-*"])[1]
    settings = {"train.epochs": "1", "train.max_steps": "3", "train.checkpoint_every": "1", "data.test": "20"}
    recipe = Recipe(name=f"{word}-trained", base="bert", data=f"{word}.csv")
    recipe = recipe.with_overrides(settings | {"seed": "98765"})
    texts = (("a dull story", "bad"), ("a great film", "good"))
    rows = [f"{texts[row % 2][0]} {row},{texts[row % 2][1]}" for row in range(60)]
    table = "\n".join(["text,label", *rows]) + "\n"
    return Tenant(word, secret, limited, table, recipe.to_toml().replace("98765", f"{place}SEED"))


@dataclass
class Storm:
    """Everything that a storm has. deeds: how often each was done."""

    store: Store
    tenants: list[Tenant]
    programs: list[Program]
    clients: list[Client]
    proxy: Proxy
    database: PostgresServer
    faults: Faults
    mark: str
    draw: random.Random = field(default_factory=lambda: random.Random(27))
    deeds: Counter[str] = field(default_factory=Counter)
    asleep: dict[Program, list[psutil.Process]] = field(default_factory=dict)
    windows_end: float = 0.0  # of S3
    next_window: float = 0.0
    next_crash: float = 0.0
    ended: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # run -> state, result, error at its end

    @property
    def servers(self) -> list[Program]:
        return self.programs[: len(SERVERS)]

    @property
    def killed(self) -> int:
        return self.deeds["kill"]

    def summary(self) -> str:
        done = {name: [len(getattr(each, name)) for each in self.tenants] for name in ("answers", "moves", "stored")}
        counts = sum((each.counts for each in self.tenants), Counter())
        return (
            f"{dict(self.deeds)}, {done}, {dict(counts)}, trainings {dict(Counter(e[0] for e in self.ended.values()))}"
        )

    def turn(self) -> None:
        """One deed, and what is due."""
        now = time.monotonic()
        self.require_alive()
        self.s3(now)
        if now > self.next_crash:
            self.crash()
            self.next_crash = time.monotonic() + self.draw.uniform(45, 75)
            self.require_alive()
        awake = [each for each in self.programs if each not in self.asleep]
        weights = [5 if each in self.servers else 1 for each in awake]
        program = self.draw.choices(awake, weights)[0]
        if program in self.servers and program.address() is None:
            return  # it starts
        if self.draw.random() < 0.25:
            self.stop(program)
        else:
            program.kill(with_children=self.draw.random() < 0.5)
            self.deeds["kill"] += 1

    def require_alive(self) -> None:
        """Nothing ends by itself. A server that PostgreSQL left alone at its start is started again, as in a fleet."""
        for each in self.programs:
            if each in self.servers and each.ended_by_outage_at_start():
                each.start()
                self.deeds["start again"] += 1
            each.require_alive()

    def all_answer(self) -> bool:
        self.require_alive()
        return all(server.address() for server in self.servers)

    def stop(self, program: Program) -> None:
        """Stop a worker for longer than its lease, and a server for some seconds."""
        seconds = self.draw.uniform(2, 8) if program in self.servers else self.draw.uniform(1.2, 2.5) * LEASE
        self.faults.start(program.name)
        self.asleep[program] = program.pause()
        threading.Timer(seconds, self.wake, [program]).start()  # its thread waits for no lock of a stopped process
        self.deeds["stop"] += 1

    def wake(self, program: Program) -> None:
        for process in self.asleep[program]:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self.faults.end(program.name)
        del self.asleep[program]

    def s3(self, now: float) -> None:
        """Begin or end a window in which S3 fails."""
        if self.windows_end and now > self.windows_end:
            self.proxy.release()
            self.faults.end("s3")
            self.windows_end, self.next_window = 0.0, now + self.draw.uniform(15, 40)
        elif not self.windows_end and now > self.next_window:
            deed = self.draw.choice(S3_FAULTS)
            self.faults.start("s3")
            self.proxy.rule(deed, times=1 << 40)
            self.windows_end = now + self.draw.uniform(2, 8)
            self.deeds[f"s3 {deed}"] += 1

    def crash(self) -> None:
        """PostgreSQL ends within its transactions, and comes back."""
        self.faults.start("postgresql")
        self.database.restart()
        self.faults.end("postgresql")
        self.deeds["postgresql"] += 1

    def calm(self) -> None:
        wait_for(lambda: not self.asleep, 60, "a stopped process was not woken")
        self.windows_end = self.windows_end and 1e-9
        self.s3(time.monotonic())

    def look(self) -> None:
        """A run that has ended stays as it is."""
        with self.store.database().reading() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.state, jobs.c.result, jobs.c.error)).all()
        for row in rows:
            if row.state in ENDED:
                found = (str(row.state), str(row.result), str(row.error))
                assert self.ended.setdefault(row.id, found) == found, row.id

    def processes(self) -> list[str]:
        """What runs of all that it started."""
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error):
                if each.environ().get(MARK) == self.mark and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{each.pid}, child of {each.ppid()}: {' '.join(each.cmdline())[:200]}")
        return found


@pytest.fixture
def storm(
    new_url: Callable[..., str], postgres_server: PostgresServer, s3_server: str, tmp_path: Path
) -> Iterator[Storm]:
    """The processes, each with a folder of its own, and their tenants. Their S3 is behind a proxy that makes faults."""
    url, folder = new_url(), tmp_path / "bert"
    small_models.save_base("bert", folder)
    kernels.library()  # compiled before the processes start, which would each compile them
    base = {"id": str(folder), "fingerprint": bases.load(str(folder), task="classify", num_labels=2).fingerprint}
    tenants = [made(word, place + 1, url, base, tmp_path / "bundles") for place, word in enumerate(TENANTS)]
    (tmp_path / "tokenizer.json").write_text(byte_level.tokenizer().backend_tokenizer.to_str())
    mark, faults = uuid.uuid4().hex, Faults()

    def on(machine: str) -> str:
        return url.replace(str(tmp_path / "local"), str(tmp_path / machine))

    with ExitStack() as started:
        proxy, address = started.enter_context(proxied(s3_server))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "ECHO_TOKENIZER": str(tmp_path / "tokenizer.json"),
            "AWS_ENDPOINT_URL": address,
            leases.VARIABLE: str(LEASE),
            MARK: mark,
        }
        echo = str(TESTS / "server" / "echo_server.py")
        commands = {name: [echo, on(name), "0", *base.values()] for name in SERVERS}
        commands |= {name: ["-m", "turret", "worker", "--store", on(name)] for name in WORKERS}
        programs = []
        for name, command in commands.items():
            programs.append(Program(name, command, tmp_path, environment))
            started.callback(programs[-1].end)
        servers, clients = programs[: len(SERVERS)], list[Client]()
        for seed, tenant in enumerate(tenants):
            words = (tenant, [each for each in tenants if each is not tenant], servers, faults, seed)
            clients += [kind(*words) for kind in (Asker, Operator, *([Killer] if seed < 2 else []))]
            if seed in (1, 2):
                store = through(address, on(f"putter-{seed}")).with_access(Access(tenant.word))
                clients.append(Putter(store, base, tmp_path / "bundles", *words))
        clients += [Collector(Store(url), *words), Watcher(*words)]
        yield Storm(Store(url), tenants, programs, clients, proxy, postgres_server, faults, mark)


def test_nothing_is_lost_and_nobody_sees_anybody_while_everything_fails(storm) -> None:
    store, tenants, programs, clients = storm.store, storm.tenants, storm.programs, storm.clients
    wait_for(storm.all_answer, 180, "the servers did not start")
    for each in clients:
        each.start()
    begun, said = time.monotonic(), 0.0
    storm.next_window, storm.next_crash = begun + 10, begun + 30
    while (passed := time.monotonic() - begun) < SECONDS or (passed < 2 * SECONDS and missing(storm)):
        time.sleep(storm.draw.uniform(2, 6))
        require_well(clients)
        for each in clients:
            each.trains = passed < 0.75 * SECONDS or finished(store) < SECONDS / 120
        storm.turn()
        storm.look()
        if passed > said + 60:
            said = passed
            print(f"{passed:.0f} s: {storm.summary()}", flush=True)
    storm.calm()
    for each in clients:
        each.ended.set()
    for each in clients:
        each.join(timeout=120)
    require_well(clients)
    asked = time.monotonic() - begun
    wait_for(lambda: not states(store) - ENDED, DRAIN_SECONDS, lambda: f"the queue is not empty: {states(store)}")
    print(f"{storm.summary()} in {asked:.0f} s; the queue was empty {time.monotonic() - begun - asked:.0f} s later")
    print(f"/healthz answered within {clients[-1].longest:.1f} s, {tenants[-1].counts['healthz']} times")
    wait_for(storm.all_answer, 60, "the servers did not start")
    assert [each.stop() for each in programs] == [0] * len(programs)
    wait_for(lambda: not storm.processes(), 60, lambda: f"left running: {storm.processes()}")
    storm.look()
    assert sum(check(storm, tenant) for tenant in tenants) == finished(store)
    collector = next(each for each in clients if isinstance(each, Collector))
    collector.turn()
    assert store.artifacts.list_files(f"{queued_data.FOLDER}/") == []
    verify(store)
    assert collector.freed > 0
    errors = [server.errors(life) for server in storm.servers for life in range(1, server.life + 1)]
    assert [line for text in errors for line in text.splitlines() if '"bug"' in line] == []
    assert missing(storm) == []


def missing(storm: Storm) -> list[str]:
    """What has happened too rarely for the storm to say something."""
    tenants = storm.tenants
    killers = sum(count for tenant in tenants for what, count in tenant.counts.items() if "killers" in what)
    least = {
        "kills": storm.killed - SECONDS / 15,
        "stops": storm.deeds["stop"] - SECONDS / 60,
        "crashes of PostgreSQL": storm.deeds["postgresql"] - SECONDS / 120,
        "windows of S3": storm.faults.count("s3") - SECONDS / 90,
        "finished trainings": finished(storm.store) - SECONDS / 120,
        "answers": min(len(tenant.answers) for tenant in tenants) - SECONDS / 4 - 1,
        "moves": min(len(tenant.moves) for tenant in tenants) - SECONDS / 60 - 1,
        "versions": sum(len(tenant.stored) for tenant in tenants) - SECONDS / 10,
        "requests that have killed": killers - SECONDS / 10,
        "asks for what is another's": min(tenant.counts["foreign"] for tenant in tenants) - SECONDS / 60 - 1,
    }
    return [what for what, more in least.items() if more < 0]


def require_well(clients: Sequence[Client]) -> None:
    for each in clients:
        if each.wrong is not None:
            raise AssertionError(f"a client of {each.tenant.word}: {each.wrong}") from each.wrong


def wait_for(check: Callable[[], object], seconds: float, problem: str | Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, problem if isinstance(problem, str) else problem()
        time.sleep(0.2)


def finished(store: Store) -> int:
    """How many trainings of all tenants are finished."""
    with store.database().reading() as connection:
        return int(connection.execute(select(func.count()).where(jobs.c.state == "finished")).scalar_one())


def states(store: Store) -> set[str]:
    """The states of the runs of all tenants, as the table has them."""
    with store.database().reading() as connection:
        return set(connection.execute(select(jobs.c.state)).scalars())


# --- what must be true at the end -------------------------------------------------------------------------------------


def check(storm: Storm, tenant: Tenant) -> int:
    """Everything of one tenant. Returns the number of its finished trainings."""
    workspace = Workspace(storm.store.location, tenant.word)
    digests = {str(version): version.digest for version in workspace.list()}
    names = {reference.rpartition("@")[0] for reference in digests}
    histories = {name: workspace.show(f"{name}@1")["alias_history"] for name in names}
    ended = trainings(workspace, tenant)
    for answer in tenant.answers:
        assert digests[answer.version] == answer.digest
        if "@" not in answer.asked:
            assert in_force(histories[answer.asked], answer, storm.faults), answer
    for version, digest in tenant.stored.items():
        assert digests[version] == digest
    moved(histories, tenant)
    used(workspace, tenant, storm.faults)
    for other in storm.tenants:
        if other is not tenant:
            assert not other.names & ({*digests.values()} | {run["id"] for run in workspace.runs()})
    counts = f"{len(tenant.answers)} answers, {len(tenant.moves)} moves, {len(tenant.stored)} versions stored"
    print(f"{tenant.word}: {counts}, trainings {ended}, {dict(tenant.counts)}")
    return ended.get("finished", 0)


def trainings(workspace: Workspace, tenant: Tenant) -> dict[str, int]:
    """Every acknowledged training has ended, with one version and a log if it is finished. Returns state -> number."""
    found = {str(run["id"]): run for run in workspace.runs()}
    assert set(tenant.runs) <= found.keys()
    versions: dict[str, list[str]] = defaultdict(list)
    for version in workspace.list(tenant.trained):
        versions[str(version.run)].append(str(version))
    assert versions.keys() <= found.keys()
    counts: dict[str, int] = defaultdict(int)
    for run in found.values():
        tries, log = run["queue"]["tries"], workspace.queue.log(str(run["id"]))
        if run["state"] == "finished":
            assert versions[run["id"]] == [run["result"]["version"]]
            assert log
            assert 1 <= tries <= TRIES
        else:
            assert run["state"] == "cancelled" or (run["state"], tries) == ("failed", TRIES), run
            assert run["error"]
            assert versions[run["id"]] == []
        counts[str(run["state"])] += 1
    assert {found[run]["state"] for run in tenant.cancelled} <= {"cancelled"}
    return dict(counts)


def in_force(history: list[dict[str, object]], answer: Answer, faults: Faults) -> bool:
    """Whether production named the version while the request was on its way, or up to FOLLOW_SECONDS before.

    A server follows no alias while PostgreSQL is away, or while it is stopped.
    """
    moves = [each for each in history if each["alias"] == "production"]
    starts = [datetime.fromisoformat(str(each["moved"])).timestamp() for each in moves]
    number = int(answer.version.rpartition("@")[2])
    oldest = faults.before(answer.began, FOLLOW_SECONDS, "postgresql", answer.server.name)
    return any(
        move["version"] == number and start <= answer.ended + 0.1 and end >= oldest
        for move, start, end in zip(moves, starts, [*starts[1:], float("inf")], strict=True)
    )


def moved(histories: dict[str, list[dict[str, object]]], tenant: Tenant) -> None:
    """The history has every acknowledged move in its order; the others of it are moves whose server was killed."""
    count = 0
    for name, history in histories.items():
        rows = [each for each in history if each["who"] == f"token {tenant.word}/{tenant.word}-all"]
        count += len(rows)
        for alias in ("production", "candidate"):
            found = iter([(each["verb"], each["version"]) for each in rows if each["alias"] == alias])
            for move in tenant.moves:
                if move[:2] == (name, alias):
                    assert move[2:] in found, f"{move} is not in the history, or not in its place"
    assert len(tenant.moves) <= count <= len(tenant.moves) + tenant.unknown_moves


def used(workspace: Workspace, tenant: Tenant, faults: Faults) -> None:
    """The usage of each adapter is that of the answers, but for the last seconds of a killed server.

    A server cannot write what it added up while PostgreSQL is away, or while it is stopped.
    """
    least, most = defaultdict(lambda: [0] * 4), defaultdict(lambda: [0] * 4)
    for answer in tenant.answers:
        name, end = answer.version.rpartition("@")[0], answer.server.killed.get(answer.life, float("inf"))
        add(most[name], answer.usage)
        if answer.ended < faults.before(end, LOST_SECONDS, "postgresql", answer.server.name):
            add(least[name], answer.usage)
    for name, usage_ in tenant.unknown:
        add(most[name], usage_)
    sums = defaultdict(lambda: [0] * 4)
    for each in usage.read_usage(workspace.store.database()):
        assert each.tenant == tenant.word
        add(sums[each.adapter], (each.requests, each.answers, each.prompt_tokens, each.completion_tokens))
    assert sums.keys() <= most.keys()
    for name in most:
        within = zip(least[name], sums[name], most[name], strict=True)
        assert all(low <= found <= high for low, found, high in within), (name, least[name], sums[name], most[name])


def add(sums: list[int], more: Sequence[int]) -> None:
    sums[:] = [a + b for a, b in zip(sums, more, strict=True)]


def verify(store: Store) -> None:
    command = [sys.executable, "-m", "turret", "verify", "--store", str(store.location.given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problem" in done.stdout
    print(done.stdout.strip())
