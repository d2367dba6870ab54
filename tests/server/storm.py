"""64 clients mixing 50 adapters while threads promote, roll back, load, unload, store and delete.

It lasts a number of turns for each client, or TURRET_SOAK_SECONDS; then it also floods the server with loads that fail,
and the memory of the process must not grow. What a client asks, and what must be true of the answer, is the caller's.
"""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import psutil
import pytest
from server.patience import until

from turret.errors import TurretError
from turret.store import Version
from turret.workspace import Workspace

CLIENTS, ADAPTERS = 64, 50
SOAK_SECONDS = float(os.environ.get("TURRET_SOAK_SECONDS", "120"))
FLOOD = 50  # bad loads in a row
GROWTH = 64 << 20  # bytes by which memory may grow after the first quarter of a soak
TEXTS = [f"text {number}{end}" for number in range(8) for end in ("", "!")]
Put = Callable[[str], Version]
Expected = Callable[[str, str], dict[str, float]]  # digest, text -> probabilities


@dataclass
class Tenant:
    """A tenant with two versions of each of its names.

    Attributes:
        put: Stores a third version of a name.
        known: version -> digest.
        token: None on a server without tokens.
        replaced: The names of which third versions come and go.
        bad: A version that cannot be loaded, for the floods.
        counts: What its clients were told.
    """

    workspace: Workspace
    names: Sequence[str]
    put: Put
    known: dict[str, str]
    token: str | None = None
    replaced: Sequence[str] = ()
    bad: str | None = None
    counts: Counter[str] = field(default_factory=Counter)


# One request of a client of a tenant, with its checks. The number is the client's, plus one for each turn.
Ask = Callable[[httpx2.AsyncClient, Tenant, random.Random, int], Awaitable[None]]


class Churn(threading.Thread):
    """Promotes, rolls back, loads, unloads, stores and deletes for its tenants until it is stopped."""

    def __init__(self, running: Any, tenants: Sequence[Tenant], seed: int) -> None:
        super().__init__()
        self.tenants = [(each, running.client(each.token)) for each in tenants]
        self.random = random.Random(seed)
        self.ended = threading.Event()
        self.turns, self.refused = 0, 0
        self.mistakes: list[BaseException] = []

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.turn(*self.random.choice(self.tenants))
            except TurretError:
                pass  # both threads changed one name: the store refused the second
            except BaseException as error:
                self.mistakes.append(error)
                return
            self.turns += 1

    def turn(self, tenant: Tenant, client: httpx2.Client) -> None:
        verbs = ("promote", "rollback", "load", "unload", "replace", "promote over HTTP")
        verb = self.random.choice((*verbs, "flood") if tenant.bad else verbs)
        name = self.random.choice(tenant.replaced if verb == "replace" else tenant.names)
        if verb == "promote":
            tenant.workspace.promote(f"{name}@{self.random.choice((1, 2))}", "production")
        elif verb == "rollback":
            tenant.workspace.rollback(name)
        elif verb == "promote over HTTP":
            got = client.post(f"/api/adapters/{name}@2/promote", json={"alias": "production"})
            assert got.status_code != 500, got.text
        elif verb == "replace":  # a version that takes the alias, loses it, and is deleted
            version = tenant.put(name)
            tenant.known[str(version)] = version.digest
            tenant.workspace.promote(str(version), "production")
            time.sleep(0.02)
            tenant.workspace.promote(f"{name}@1", "production")
            tenant.workspace.delete(str(version))
        elif verb == "flood":
            got = [client.post(f"/api/adapters/{tenant.bad}/load").status_code for _ in range(FLOOD)]
            assert set(got) <= {409, 429}, got
            self.refused += len(got)
        else:
            got = client.post(f"/api/adapters/{name}@{self.random.choice((1, 2))}/{verb}")
            assert got.status_code != 500, got.text


class Memory(threading.Thread):
    """The resident bytes of this process, which holds server, engine and clients, twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.bytes: list[int] = []

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.bytes.append(psutil.Process().memory_info().rss)

    def growth(self) -> float:
        """Growth from the second quarter of the time to the last; the first one fills slots and caches."""
        quarter = len(self.bytes) // 4
        return statistics.median(self.bytes[-quarter:]) - statistics.median(self.bytes[quarter : 2 * quarter])


@contextmanager
def usual_collections() -> Iterator[None]:
    """Look for garbage as often as a server does: other tests look seldom, and memory would grow by what lies about."""
    seldom = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's defaults
    try:
        yield
    finally:
        gc.set_threshold(*seldom)


class OnlyBugs(io.StringIO):
    """A log that keeps only bugs, because other lines would count as growth of memory."""

    def write(self, text: str) -> int:
        return super().write(text) if '"bug"' in text else len(text)


def classifies(expected: Expected) -> Ask:
    """A request with two texts: each answer must come from a version that the reference meant, and equal its own."""

    async def ask(client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, number: int) -> None:
        text = f"text {number % 8}"
        name = tenant.names[int(draw.paretovariate(0.7)) % len(tenant.names)]
        model = draw.choice((name, f"{name}@production", f"{name}@1", f"{name}@2"))
        got = await client.post("/v1/classify", json={"model": model, "input": [text, text + "!"]})
        assert got.status_code == 200, got.text
        digest = from_its_version(tenant, model, got.headers["turret-digest"], got.json()["model"])
        for each, said in zip((text, text + "!"), got.json()["data"], strict=True):
            assert said["probabilities"] == pytest.approx(expected(digest, each), abs=1e-4)

    return ask


def from_its_version(tenant: Tenant, model: str, digest: str, version: str) -> str:
    """Check that a version that the model names has answered. Returns its digest."""
    assert version.startswith(f"{model.partition('@')[0]}@")
    assert tenant.known[version] == digest
    if model[-1].isdigit() and "@" in model:
        assert version == model
    return digest


async def talk(
    url: str, number: int, going: Callable[[int], bool], tenant: Tenant, ask: Ask, answered: list[int]
) -> None:
    """One client, until it may stop or something is wrong."""
    draw = random.Random(number)
    headers = {} if tenant.token is None else {"authorization": f"Bearer {tenant.token}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=300, trust_env=False) as client:
        for turn in itertools.takewhile(going, itertools.count()):
            await ask(client, tenant, draw, number + turn)
            answered[number] += 1


def storm(running: Any, tenants: Sequence[Tenant], ask: Ask, *, turns: int | None = None, seconds: float = 0.0) -> None:
    """All clients at once, for `turns` requests each or for some seconds, while two threads change the store."""
    churning = [Churn(running, tenants, seed) for seed in range(2)]
    memory = Memory()
    for each in (*churning, memory):
        each.start()
    answered = [0] * CLIENTS
    end = time.monotonic() + seconds

    def going(turn: int) -> bool:
        return time.monotonic() < end if turns is None else turn < turns

    async def all_at_once() -> None:
        numbered = [(number, tenants[number % len(tenants)]) for number in range(CLIENTS)]
        await asyncio.gather(*(talk(running.url, number, going, each, ask, answered) for number, each in numbered))

    try:
        with usual_collections():
            asyncio.run(all_at_once())
    finally:
        for each in (*churning, memory):
            each.ended.set()
        for each in (*churning, memory):
            each.join(timeout=20)
    assert [each.mistakes for each in churning] == [[], []]
    assert sum(each.turns for each in churning) > 5
    until(lambda: running.served.load.requests == 0)  # an answer is sent before its request ends
    assert running.served.load.requests == 0
    assert not [line for line in running.log() if line["event"] == "bug"]
    if turns is not None:
        assert answered == [turns] * CLIENTS
        return
    refused = sum(each.refused for each in churning)
    print(f"{sum(answered)} requests, {sum(each.turns for each in churning)} changes, {refused} bad loads, "
          f"{memory.growth() / 1e6:+.1f} MB on {memory.bytes[0] / 1e6:.0f} MB")  # fmt: skip
    assert min(answered) > 5  # no client starved
    assert refused >= FLOOD
    assert memory.growth() < GROWTH
