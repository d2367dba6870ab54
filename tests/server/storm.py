"""64 clients mixing 50 adapters while two threads promote, roll back, load, unload, store and delete.

It lasts a number of turns for each client, or a number of seconds; then it also floods the server with loads that fail,
and the memory of the process must not grow.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import psutil
import pytest
from server.patience import until

from turret.errors import TurretError
from turret.store import Version
from turret.workspace import Workspace

CLIENTS, ADAPTERS = 64, 50
SOAK_SECONDS = float(os.environ.get("TURRET_SOAK_SECONDS", "180"))
FLOOD = 50  # bad loads in a row
GROWTH = 64 << 20  # bytes by which memory may grow after the first quarter of a soak
TEXTS = [f"text {number}{end}" for number in range(8) for end in ("", "!")]
Put = Callable[[str], Version]
Expected = Callable[[str, str], dict[str, float]]  # digest, text -> probabilities


class Churn(threading.Thread):
    """Promotes, rolls back, loads, unloads, stores and deletes until it is stopped."""

    def __init__(
        self, running: Any, workspace: Workspace, put: Put, known: dict[str, str], seed: int, bad: str | None
    ) -> None:
        super().__init__()
        self.bad, self.refused = bad, 0
        self.running, self.workspace, self.put, self.known = running, workspace, put, known
        self.random = random.Random(seed)
        self.ended = threading.Event()
        self.turns = 0
        self.mistakes: list[BaseException] = []

    def run(self) -> None:
        client = self.running.client()
        while not self.ended.is_set():
            name = f"n{self.random.randrange(ADAPTERS)}"
            try:
                self.turn(client, name)
            except TurretError:
                pass  # both threads changed one name: the store refused the second
            except BaseException as error:
                self.mistakes.append(error)
                return
            self.turns += 1

    def turn(self, client: httpx2.Client, name: str) -> None:
        verbs = ("promote", "rollback", "load", "unload", "replace", "promote over HTTP")
        verb = self.random.choice((*verbs, "flood") if self.bad else verbs)
        if verb == "promote":
            self.workspace.promote(f"{name}@{self.random.choice((1, 2))}", "production")
        elif verb == "rollback":
            self.workspace.rollback(name)
        elif verb == "promote over HTTP":
            client.post(f"/api/adapters/{name}@2/promote", json={"alias": "production"})
        elif verb == "replace":  # a version that takes the alias, loses it, and is deleted
            version = self.put(name)
            self.known[str(version)] = version.digest
            self.workspace.promote(str(version), "production")
            time.sleep(0.02)
            self.workspace.promote(f"{name}@1", "production")
            self.workspace.delete(str(version))
        elif verb == "flood":
            got = [client.post(f"/api/adapters/{self.bad}/load").status_code for _ in range(FLOOD)]
            assert set(got) <= {409, 429}, got
            self.refused += len(got)
        else:
            client.post(f"/api/adapters/{name}@{self.random.choice((1, 2))}/{verb}")


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


class OnlyBugs(io.StringIO):
    """A log that keeps only bugs, because other lines would count as growth of memory."""

    def write(self, text: str) -> int:
        return super().write(text) if '"bug"' in text else len(text)


async def ask(
    url: str, number: int, going: Callable[[int], bool], known: dict[str, str], expected: Expected, answered: list[int]
) -> None:
    """One client: each answer must come from a version that the reference meant, and equal its answer alone."""
    draw = random.Random(number)
    async with httpx2.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        for turn in itertools.takewhile(going, itertools.count()):
            name, text = f"n{int(draw.paretovariate(0.7)) % ADAPTERS}", f"text {(number + turn) % 8}"
            model = draw.choice((name, f"{name}@production", f"{name}@1", f"{name}@2"))
            got = await client.post("/v1/classify", json={"model": model, "input": [text, text + "!"]})
            assert got.status_code == 200, got.text
            version, digest = got.json()["model"], got.headers["turret-digest"]
            assert version.startswith(f"{name}@")
            assert known[version] == digest
            if model[-1].isdigit() and "@" in model:
                assert version == model
            for each, said in zip((text, text + "!"), got.json()["data"], strict=True):
                assert said["probabilities"] == pytest.approx(expected(digest, each), abs=1e-4)
            answered[number] += 1


def storm(
    running: Any,
    workspace: Workspace,
    put: Put,
    known: dict[str, str],
    expected: Expected,
    *,
    turns: int | None = None,
    seconds: float = 0.0,
    bad: str | None = None,
) -> None:
    """All clients at once, for `turns` requests each or for some seconds, while two threads change the store.

    bad: a version that cannot be loaded, for the floods.
    """
    churning = [Churn(running, workspace, put, known, seed, bad) for seed in range(2)]
    memory = Memory()
    for each in (*churning, memory):
        each.start()
    answered = [0] * CLIENTS
    end = time.monotonic() + seconds

    def going(turn: int) -> bool:
        return time.monotonic() < end if turns is None else turn < turns

    async def all_at_once() -> None:
        await asyncio.gather(*(ask(running.url, number, going, known, expected, answered) for number in range(CLIENTS)))

    try:
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
    print(f"{sum(answered)} answers, {sum(each.turns for each in churning)} changes, {refused} bad loads, "
          f"{memory.growth() / 1e6:+.1f} MB on {memory.bytes[0] / 1e6:.0f} MB")  # fmt: skip
    assert min(answered) > 5  # no client starved
    assert refused >= FLOOD
    assert memory.growth() < GROWTH
