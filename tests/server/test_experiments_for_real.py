"""Experiments over real server processes: one of two trainings is worse, and a guard rolls it back.

Every process is `turret serve` on a small base, and everything goes over HTTP.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import small_models
from server.patience import until
from tiny_training import labelled

from turret.recipe import Recipe
from turret.workspace import Workspace

TESTS = Path(__file__).parents[1]
UNITS = [f"user {number}" for number in range(60)]


def trained(workspace: Workspace, folder: Path, base: Path, name: str, *, spoiled: bool) -> str:
    """A version trained on the labels or on swapped labels; both are tested on the right ones."""
    folder.mkdir()
    for split, rows in (("train", labelled(48)), ("test", labelled(16, 48))):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for row in rows:
                turned = {"good": "bad", "bad": "good"}[row.label]
                table.writerow([row.text, turned if spoiled and split == "train" else row.label])
    training = {"epochs": 8, "lr": 5e-3}
    return str(workspace.train(Recipe(name=name, base=str(base), data=str(folder), train=training)).version)


@contextmanager
def serving(store: Path, *command: str) -> Iterator[tuple[httpx2.Client, subprocess.Popen[str]]]:
    """A server process that is ready. SIGTERM ends it, with status 0."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline().strip()
            url = json.loads(line)["url"] if line.startswith("{") else line
            with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
                until(lambda: client.get("/readyz").status_code == 200, 60)
                yield client, process
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def real(store: Path, base: Path) -> tuple[str, ...]:
    return ("-m", "turret", "serve", "--store", str(store), "--base", str(base), "--port", "0", "--json")


@dataclass(frozen=True)
class Answered:
    """What a client keeps of an answer."""

    unit: str
    receipt: str
    version: str
    digest: str
    arm: str | None
    right: bool


def ask(client: httpx2.Client, unit: str, number: int) -> Answered:
    example = labelled(1, number)[0]
    got = client.post("/v1/classify", json={"model": "news", "input": example.text, "user": unit})
    assert got.status_code == 200, got.text
    said = got.headers
    version = f"{said['turret-adapter']}@{said['turret-version']}"
    right = got.json()["data"][0]["label"] == example.label
    return Answered(unit, said["turret-receipt"], version, said["turret-digest"], said.get("turret-arm"), right)


@pytest.mark.slow
def test_a_candidate_that_is_really_worse_is_rolled_back_by_a_real_server_and_receipts_prove_it(tmp_path) -> None:
    base, store = small_models.save_base("bert", tmp_path / "bert"), tmp_path / "store"
    workspace = Workspace(store)
    good = trained(workspace, tmp_path / "good", base, "news", spoiled=False)
    worse = trained(workspace, tmp_path / "spoiled", base, "news", spoiled=True)
    workspace.promote(good, "production")
    digests = {version: workspace.resolve(version).digest for version in (good, worse)}
    with serving(store, *real(store, base)) as (client, _):
        begun = client.post("/api/experiments/news/start", json={"candidates": [worse], "share": 0.5})
        assert begun.status_code == 200, begun.text
        before = [ask(client, unit, number) for number, unit in enumerate(UNITS)]
        assert {each.version for each in before} == {good, worse}
        assert all(each.version == {"control": good, "candidate": worse}[each.arm] for each in before)
        told = [{"receipt": each.receipt, "value": each.right} for each in before]
        assert client.post("/api/outcomes", json=told).json()["counts"] == {"counted": len(UNITS)}
        until(lambda: not client.get("/api/experiments/news").json()["serving"]["in_force"], 30)
        after = [ask(client, unit, number) for number, unit in enumerate(UNITS)]
        ended = client.get("/api/experiments/news").json()
    assert ended["verdict"]["how"] == "rollback"
    assert ended["alias_names"] == good
    assert {(each.version, each.arm) for each in after} == {(good, None)}
    assert all(each.digest == digests[each.version] for each in [*before, *after])
    assert sum(each.right for each in after) > sum(each.right for each in before) + 10
    with sqlite3.connect(store / "turret.db") as database:
        kept = dict(database.execute("SELECT receipt, arm FROM assignments"))
        assert kept == {each.receipt: each.arm for each in before}


@pytest.mark.slow
def test_a_unit_sees_its_arm_in_two_server_processes_on_one_store_and_after_they_start_again(put, workspace) -> None:
    for name in ("news", "news"):
        put(name)
    workspace.promote("news@1", "production")
    workspace.experiment("news").start("news@2", share=0.4)
    store = workspace.store.root
    echo = (str(TESTS / "server" / "echo_server.py"), str(store), "0")

    def seen(client: httpx2.Client) -> dict[str, tuple[str, str]]:
        found = [ask(client, unit, 0) for unit in UNITS]
        return {each.unit: (each.version, str(each.arm)) for each in found}

    with ExitStack() as both:
        clients = [both.enter_context(serving(store, *echo))[0] for _ in range(2)]
        first, second = map(seen, clients)
        receipt = ask(clients[0], UNITS[0], 0).receipt
    assert first == second
    assert {arm for _, arm in first.values()} == {"control", "candidate"}
    with serving(store, *echo) as (client, _):
        assert seen(client) == first
        told = {"value": 1, "receipt": receipt}  # of a server that has ended: it wrote its whole log
        assert client.post("/api/outcomes", json=told).json()["outcomes"][0]["status"] == "counted"
