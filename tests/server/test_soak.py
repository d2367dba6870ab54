"""64 clients mixing 50 adapters while others load, promote, roll back and delete: nothing is lost, nothing is mixed."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import suppress

import httpx2
import pytest
from server.echo import Echo, probabilities

from turret.errors import TurretError

CLIENTS, ADAPTERS = 64, 50


class Churn(threading.Thread):
    """Moves everything that can be moved until it is told to stop."""

    def __init__(self, running, workspace, put, known: dict[str, str], seed: int) -> None:
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


async def ask(url: str, number: int, turns: int, known: dict[str, str], answered: list[str]) -> None:
    draw = random.Random(number)
    async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        for turn in range(turns):
            name, text = f"n{int(draw.paretovariate(0.7)) % ADAPTERS}", f"text {number} {turn}"
            model = draw.choice((name, f"{name}@production", f"{name}@1", f"{name}@2"))
            got = await client.post("/v1/classify", json={"model": model, "input": [text, text + "!"]})
            assert got.status_code == 200, got.text
            version, digest = got.json()["model"], got.headers["turret-digest"]
            assert version.startswith(f"{name}@")
            assert known[version] == digest
            if model[-1].isdigit() and "@" in model:
                assert version == model
            for each, said in zip((text, text + "!"), got.json()["data"], strict=True):
                assert said["probabilities"] == probabilities(digest, each)
            answered.append(version)


@pytest.mark.parametrize("turns", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_every_answer_is_its_adapters_own_and_none_is_lost_while_everything_moves(serve, put, workspace, turns) -> None:
    known: dict[str, str] = {}
    for number in range(ADAPTERS):
        for _ in range(2):
            version = put(f"n{number}")
            known[str(version)] = version.digest
        workspace.promote(f"n{number}@1", "production")
    running = serve(Echo(workspace.store, slots=20, load_seconds=0.002))
    churning = [Churn(running, workspace, put, known, seed) for seed in range(2)]
    for each in churning:
        each.start()
    answered: list[str] = []

    async def all_at_once() -> None:
        await asyncio.gather(*(ask(running.url, number, turns, known, answered) for number in range(CLIENTS)))

    try:
        asyncio.run(all_at_once())
    finally:
        for each in churning:
            each.ended.set()
        for each in churning:
            with suppress(RuntimeError):
                each.join(timeout=20)
    assert len(answered) == CLIENTS * turns
    assert [each.mistakes for each in churning] == [[], []]
    assert sum(each.turns for each in churning) > 5
    assert running.served.load.requests == 0
    assert not [line for line in running.log() if line["event"] == "bug"]
    assert len(running.engine.loaded()) <= 20
