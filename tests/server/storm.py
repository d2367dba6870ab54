"""64 clients mixing 50 adapters while two threads promote, roll back, load, unload, store and delete."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from turret.errors import TurretError
from turret.store import Version
from turret.workspace import Workspace

CLIENTS, ADAPTERS = 64, 50
TEXTS = [f"text {number}{end}" for number in range(8) for end in ("", "!")]
Put = Callable[[str], Version]
Expected = Callable[[str, str], dict[str, float]]  # digest, text -> probabilities


class Churn(threading.Thread):
    """Moves everything that can be moved until it is told to stop."""

    def __init__(self, running: Any, workspace: Workspace, put: Put, known: dict[str, str], seed: int) -> None:
        super().__init__()
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
                pass  # two of us at one name: the store said no to the second
            except BaseException as error:
                self.mistakes.append(error)
                return
            self.turns += 1

    def turn(self, client: httpx2.Client, name: str) -> None:
        verb = self.random.choice(("promote", "rollback", "load", "unload", "replace", "promote over HTTP"))
        if verb == "promote":
            self.workspace.promote(f"{name}@{self.random.choice((1, 2))}", "production")
        elif verb == "rollback":
            self.workspace.rollback(name)
        elif verb == "promote over HTTP":
            client.post(f"/api/adapters/{name}@2/promote", json={"alias": "production"})
        elif verb == "replace":  # a version that takes the alias, then loses it, then goes
            version = self.put(name)
            self.known[str(version)] = version.digest
            self.workspace.promote(str(version), "production")
            time.sleep(0.02)
            self.workspace.promote(f"{name}@1", "production")
            self.workspace.delete(str(version))
        else:
            client.post(f"/api/adapters/{name}@{self.random.choice((1, 2))}/{verb}")


async def ask(
    url: str, number: int, turns: int, known: dict[str, str], expected: Expected, answered: list[str]
) -> None:
    """One client: each answer must be of a version that was meant, and be what that version answers alone."""
    draw = random.Random(number)
    async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        for turn in range(turns):
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
            answered.append(version)


def storm(running: Any, workspace: Workspace, put: Put, known: dict[str, str], expected: Expected, turns: int) -> None:
    """All clients at once, `turns` requests each, while two threads move everything."""
    churning = [Churn(running, workspace, put, known, seed) for seed in range(2)]
    for each in churning:
        each.start()
    answered: list[str] = []

    async def all_at_once() -> None:
        await asyncio.gather(*(ask(running.url, number, turns, known, expected, answered) for number in range(CLIENTS)))

    try:
        asyncio.run(all_at_once())
    finally:
        for each in churning:
            each.ended.set()
        for each in churning:
            each.join(timeout=20)
    assert len(answered) == CLIENTS * turns
    assert [each.mistakes for each in churning] == [[], []]
    assert sum(each.turns for each in churning) > 5
    assert running.served.load.requests == 0
    assert not [line for line in running.log() if line["event"] == "bug"]
