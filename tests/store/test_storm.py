"""Two servers and two workers on one PostgreSQL and S3, five tenants; one of the four is killed again and again.

A gc runs now and then.

TURRET_STORM_SECONDS says for how long; 600 by default. It takes up to twice as long on a machine that is so busy that
too little happens.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest
import small_models
from sqlalchemy import func, select
from store.bundles import tensors, write_bundle
from store.storm_clients import Answer, Asker, Client, Operator, Program, Tenant

from turret import bases, kernels
from turret.database import runs
from turret.recipe import Recipe
from turret.store import Store, queued_data, usage
from turret.store.queue import TRIES
from turret.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.fleet]
SECONDS = float(os.environ.get("TURRET_STORM_SECONDS", "600"))
TESTS = Path(__file__).parent.parent
TENANTS = ("amberfox", "cobaltowl", "jadeheron", "rubyotter", "violetmoth")
DRAIN_SECONDS = 300.0  # until every training has ended, after the last kill
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


@pytest.fixture
def storm(new_url: Callable[..., str], tmp_path: Path) -> Iterator[tuple[Store, list[Tenant], list[Program]]]:
    """The store, the tenants, and the processes: two servers, then two workers, each with a folder of its own."""
    url, folder = new_url(), tmp_path / "bert"
    small_models.save_base("bert", folder)
    kernels.library()  # compiled before the processes start, which would each compile them
    base = {"id": str(folder), "fingerprint": bases.load(str(folder), task="classify", num_labels=2).fingerprint}
    tenants = [made(word, place + 1, url, base, tmp_path / "bundles") for place, word in enumerate(TENANTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}

    def on(machine: str) -> str:
        return url.replace(str(tmp_path / "local"), str(tmp_path / machine))

    echo = str(TESTS / "server" / "echo_server.py")
    commands = {name: [echo, on(name), "0", *base.values()] for name in ("server-1", "server-2")}
    commands |= {name: ["-m", "turret", "worker", "--store", on(name)] for name in ("worker-1", "worker-2")}
    with ExitStack() as started:
        programs = []
        for name, command in commands.items():
            programs.append(Program(name, command, tmp_path, environment))
            started.callback(programs[-1].end)
        yield Store(url), tenants, programs


def test_nothing_is_lost_and_nobody_sees_anybody_while_servers_and_workers_are_killed(storm) -> None:
    store, tenants, programs = storm
    servers, draw = programs[:2], random.Random(27)
    wait_for(lambda: all(server.address() for server in servers), 120, "the servers did not start")
    clients = [
        kind(tenant, [each for each in tenants if each is not tenant], servers, seed)
        for seed, tenant in enumerate(tenants)
        for kind in (Asker, Operator)
    ]
    for each in clients:
        each.start()
    begun, kills, freed = time.monotonic(), 0, 0
    while (passed := time.monotonic() - begun) < SECONDS or (passed < 2 * SECONDS and missing(store, tenants, kills)):
        time.sleep(draw.uniform(2, 6))
        require_well(clients)
        for each in clients:
            each.trains = passed < 0.75 * SECONDS or finished(store) < SECONDS / 100
        kills += kill_one(programs, draw)
        if draw.random() < 0.3:
            freed += sum(each.why == queued_data.WHY for each in store.gc().removed)
    for each in clients:
        each.ended.set()
    for each in clients:
        each.join(timeout=120)
    require_well(clients)
    asked = time.monotonic() - begun
    wait_for(lambda: not states(store) - ENDED, DRAIN_SECONDS, lambda: f"the queue is not empty: {states(store)}")
    print(f"{kills} kills in {asked:.0f} s; the queue was empty {time.monotonic() - begun - asked:.0f} s later")
    wait_for(lambda: all(server.address() for server in servers), 60, "the servers did not start")
    assert [each.stop() for each in programs] == [0] * 4
    for server in servers:
        for life in range(1, server.life + 1):
            assert '"bug"' not in server.errors(life)
    assert sum(check(store, tenant, tenants) for tenant in tenants) == finished(store)
    freed += sum(each.why == queued_data.WHY for each in store.gc().removed)
    assert store.artifacts.listed(f"{queued_data.FOLDER}/") == []
    verify(store)
    assert freed > 0
    assert missing(store, tenants, kills) == []


def missing(store: Store, tenants: Sequence[Tenant], kills: int) -> list[str]:
    """What has happened too rarely for the storm to say something."""
    least = {
        "kills": kills - SECONDS / 10,
        "finished trainings": finished(store) - SECONDS / 100,
        "answers": min(len(tenant.answers) for tenant in tenants) - SECONDS / 4 - 1,
        "moves": min(len(tenant.moves) for tenant in tenants) - SECONDS / 60 - 1,
        "asks for what is another's": min(tenant.counts["foreign"] for tenant in tenants) - SECONDS / 60 - 1,
    }
    return [what for what, more in least.items() if more < 0]


def kill_one(programs: Sequence[Program], draw: random.Random) -> int:
    """Kill a server three times as often as a worker, which needs longer to do something. Returns how many."""
    program = draw.choices(programs, [3, 3, 1, 1])[0]
    if program in programs[:2] and program.address() is None:
        return 0  # it starts
    program.kill(with_children=draw.random() < 0.5)
    return 1


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
        return int(connection.execute(select(func.count()).where(runs.c.state == "finished")).scalar_one())


def states(store: Store) -> set[str]:
    """The states of the runs of all tenants, as the table has them."""
    with store.database().reading() as connection:
        return set(connection.execute(select(runs.c.state)).scalars())


# --- what must be true at the end -------------------------------------------------------------------------------------


def check(store: Store, tenant: Tenant, tenants: Sequence[Tenant]) -> int:
    """Everything of one tenant. Returns the number of its finished trainings."""
    workspace = Workspace(store.location, tenant.word)
    digests = {str(version): version.digest for version in workspace.list()}
    names = {reference.rpartition("@")[0] for reference in digests}
    histories = {name: workspace.show(f"{name}@1")["alias_history"] for name in names}
    ended = trainings(workspace, tenant)
    for answer in tenant.answers:
        assert digests[answer.version] == answer.digest
        if "@" not in answer.asked:
            assert in_force(histories[answer.asked], answer), answer
    moved(histories, tenant)
    used(workspace, tenant)
    for other in tenants:
        if other is not tenant:
            assert not other.names & ({*digests.values()} | {run["id"] for run in workspace.runs()})
    counts = f"{len(tenant.answers)} answers, {tenant.counts['cut']} requests cut, {len(tenant.moves)} moves"
    print(f"{tenant.word}: {counts}, trainings {ended}, {tenant.counts['foreign']} asks for what is another's")
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
            assert (run["state"], tries) == ("failed", TRIES), run
            assert run["error"]
            assert len(versions[run["id"]]) <= 1
        counts[str(run["state"])] += 1
    return dict(counts)


def in_force(history: list[dict[str, object]], answer: Answer) -> bool:
    """Whether production named the version while the request was on its way, or up to FOLLOW_SECONDS before."""
    moves = [each for each in history if each["alias"] == "production"]
    starts = [datetime.fromisoformat(str(each["moved"])).timestamp() for each in moves]
    number = int(answer.version.rpartition("@")[2])
    return any(
        move["version"] == number and start <= answer.ended + 0.1 and end + FOLLOW_SECONDS >= answer.began
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


def used(workspace: Workspace, tenant: Tenant) -> None:
    """The usage of each adapter is that of the answers, but for the last seconds of a killed server."""
    least, most = defaultdict(lambda: [0] * 4), defaultdict(lambda: [0] * 4)
    for answer in tenant.answers:
        name, end = answer.version.rpartition("@")[0], answer.server.killed.get(answer.life, float("inf"))
        add(most[name], answer.usage)
        if answer.ended < end - LOST_SECONDS:
            add(least[name], answer.usage)
    for name, usage_ in tenant.unknown:
        add(most[name], usage_)
    sums = defaultdict(lambda: [0] * 4)
    for each in usage.read(workspace.store.database()):
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
