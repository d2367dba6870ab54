"""Processes that are killed and started again, and the clients of a tenant that go on meanwhile.

A client remembers what was acknowledged. A request that ended with its server, or with 503 while the database or the
files fail, may have been carried out or not.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from engine.test_constraints import chain_of_rules, chained
from server.echo import probabilities
from store.bundles import tensors, write_bundle

from turret.errors import StoreError
from turret.store import Store, queued_data

CALL_SECONDS = 60.0  # as long as a writer may wait for other writers
GRACE_SECONDS = 10.0  # after a fault, until nobody answers 503 any more on a busy machine
PROMISED_SECONDS = (
    20.0  # until /healthz answers on a busy machine; a stopped server is stopped for less than half of it
)
START_SECONDS = 20.0  # until a process on a busy machine listens to SIGTERM
NAMES = re.compile(r"sha256:[0-9a-f]{64}|\b\d{8}-\d{6}-[0-9a-f]{6}\b")  # of a version or a blob, and of a run
FORM = "application/x-www-form-urlencoded"
REFUSED = range(400, 500)
WORDS = ["a", "great", "film", "with", "a", "dull", "end", "and", "no", "story", "at", "all"]


class Faults:
    """When PostgreSQL or S3 failed, or a process was stopped. Any thread may ask; the test alone writes."""

    def __init__(self) -> None:
        self._windows: list[tuple[str, float, float]] = []  # what, from, until

    def start(self, what: str) -> None:
        self._windows.append((what, time.time(), float("inf")))

    def end(self, what: str) -> None:
        """The end of the newest window of this, which counts for some seconds more."""
        place = max(place for place, each in enumerate(self._windows) if each[0] == what)
        self._windows[place] = (what, self._windows[place][1], time.time() + GRACE_SECONDS)

    def count(self, what: str) -> int:
        return sum(each[0] == what for each in self._windows)

    def between(self, began: float, ended: float, *what: str) -> bool:
        return any(each in what and start <= ended and began <= end for each, start, end in self._windows)

    def before(self, moment: float, seconds: float, *what: str) -> float:
        """The moment so many seconds earlier, of which none lies in a window of these."""
        while True:
            found = [start for each, start, end in self._windows
                     if each in what and start < moment and moment - seconds < end]  # fmt: skip
            if not found:
                return moment - seconds
            moment = min(found)


class Program:
    """A process with several lives. Its files are `NAME-LIFE.out` and `NAME-LIFE.err`.

    Attributes:
        killed: life -> when it was killed.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.name, self._command, self._folder, self._environment = name, command, folder, environment
        self.life, self.killed = 0, dict[int, float]()
        self.start()

    def start(self) -> None:
        life = self.life + 1
        with self._file(life, "out").open("wb") as out, self._file(life, "err").open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *self._command], stdout=out, stderr=err, env=self._environment, cwd="/"
            )
        self.life, self._began = life, time.monotonic()

    def kill(self, *, with_children: bool) -> None:
        """SIGKILL, as a machine without power does to all processes, or to this one alone; and start it again."""
        self.require_alive()
        children = psutil.Process(self._process.pid).children(recursive=True) if with_children else []
        self.killed[self.life] = time.time()
        self._process.kill()
        for each in children:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self._process.wait()
        self.start()

    def require_alive(self) -> None:
        assert self._process.poll() is None, f"{self.name} ended by itself: {self.errors(self.life)}"

    def ended_by_outage_at_start(self) -> bool:
        """Whether a server ended before it had an address, because PostgreSQL did not answer."""
        if self._process.poll() is None or self.address() is not None:
            return False
        return re.search(r"StoreError: .*(cannot be reached|connection was lost)", self.errors(self.life)) is not None

    def pause(self) -> list[psutil.Process]:
        """SIGSTOP to all of its processes, which it returns."""
        process = psutil.Process(self._process.pid)
        found = [process, *process.children(recursive=True)]
        for each in found:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGSTOP)
        return found

    def stop(self) -> int:
        """SIGTERM, once it has started; returns the exit status."""
        time.sleep(max(0.0, START_SECONDS - (time.monotonic() - self._began)))
        self._process.terminate()
        return self._process.wait(timeout=60)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def address(self) -> tuple[int, str] | None:
        """The life of a server and its URL; None until it answers."""
        life = self.life
        line = self._file(life, "out").read_text()
        return (life, line.strip()) if line.endswith("\n") else None

    def errors(self, life: int) -> str:
        return self._file(life, "err").read_text(errors="replace")

    def _file(self, life: int, kind: str) -> Path:
        return self._folder / f"{self.name}-{life}.{kind}"


@dataclass(frozen=True)
class Answer:
    """An answer that a client got."""

    asked: str  # a reference
    version: str  # name@3
    digest: str
    usage: tuple[int, int, int, int]  # as the columns of `turret usage`
    server: Program
    life: int
    began: float
    ended: float


@dataclass
class Tenant:
    """What the clients of one tenant sent and got."""

    word: str  # in every name of this tenant and of no other
    secret: str  # of a token for everything
    limited: str  # of a token that asks its adapters
    table: str  # CSV
    recipe: str  # TOML; the word SEED stands where the seed goes
    answers: list[Answer] = field(default_factory=list)
    unknown: list[tuple[str, tuple[int, int, int, int]]] = field(default_factory=list)  # adapter, and the most usage
    moves: list[tuple[str, str, str, int]] = field(default_factory=list)  # name, alias, verb, number: acknowledged
    unknown_moves: int = 0
    runs: list[str] = field(default_factory=list)  # acknowledged
    cancelled: set[str] = field(default_factory=set)  # runs whose end was acknowledged
    stored: dict[str, str] = field(default_factory=dict)  # version -> digest: acknowledged by a store
    names: set[str] = field(default_factory=set)  # every digest and run that an answer named
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def own(self) -> str:
        return f"{self.word}-own"

    @property
    def trained(self) -> str:
        return f"{self.word}-trained"


class Client(threading.Thread):
    """One client of a tenant: a turn, a pause, until it is told to end or something is wrong."""

    def __init__(
        self, tenant: Tenant, others: Sequence[Tenant], servers: Sequence[Program], faults: Faults, seed: int
    ) -> None:
        super().__init__(daemon=True)
        self.tenant, self.others, self.servers, self.faults = tenant, others, servers, faults
        self.draw, self.ended = random.Random(seed), threading.Event()
        self.wrong: BaseException | None = None
        self.pause, self.trains = (0.02, 0.3), True

    def run(self) -> None:
        with httpx2.Client(timeout=CALL_SECONDS, trust_env=False) as self.client:
            while not self.ended.wait(self.draw.uniform(*self.pause)):
                try:
                    self.turn()
                except BaseException as error:
                    self.wrong = error
                    return

    def turn(self) -> None:
        raise NotImplementedError

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        secret: str = "",
        expected: Sequence[int] = (200,),
        server: Program | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Sent | None:
        """Send to one of the servers. Returns None if none is there yet."""
        server = server or self.draw.choice(self.servers)
        if (address := server.address()) is None:
            return None
        life, url = address
        said = {"authorization": f"Bearer {secret or self.tenant.secret}", **(headers or {})}
        if content is not None:
            said["origin"] = url  # as a browser says, for the forms of pages
        began = time.time()
        try:
            got = self.client.request(method, url + path, json=body, content=content, headers=said)
        except httpx2.TransportError as error:
            if life not in server.killed:
                raise AssertionError(f"{method} {path} at {server.name}, which lives: {error!r}") from error
            self.tenant.counts["cut"] += 1
            return Sent(None, server, life, began)
        self._look(got, f"{path} {body}")
        if got.status_code == 503 and self.faults.between(began, time.time(), "postgresql", "s3"):
            self.tenant.counts["refused"] += 1
            return Sent(None, server, life, began)
        what = f"{method} {path} at {server.name} life {life}"
        assert got.status_code in expected, f"{what}: {got.status_code} {got.text[:300]}"
        return Sent(got, server, life, began)

    def _look(self, got: httpx2.Response, sent: str) -> None:
        """Nothing in it is of another tenant, but for what the request named."""
        text = f"{got.headers} {got.text}"
        for other in self.others:
            assert other.word not in text or other.word in sent, f"{other.word} in the answer to {sent[:100]}: {text}"
        self.tenant.names |= {found for found in NAMES.findall(text) if found not in sent}


@dataclass(frozen=True)
class Sent:
    """A request, and its answer; without one, it may have been carried out or not."""

    got: httpx2.Response | None
    server: Program
    life: int
    began: float


class Asker(Client):
    """Asks adapters of its tenant, by every kind of reference, and those of others, which do not exist for it."""

    def turn(self) -> None:
        tenant = self.tenant
        secret, number = self.draw.choice((tenant.secret, tenant.limited)), self.draw.randrange(20)
        if number == 0:
            name = self.draw.choice(self.others).own
            self.send("POST", "/v1/classify", {"model": name, "input": "x"}, secret=secret, expected=(404,))
            tenant.counts["foreign"] += 1
            return
        names = ["news", "news@1", "news@2", "news@3", tenant.own, f"{tenant.own}@1"]
        names += [tenant.trained] if any(move[:2] == (tenant.trained, "production") for move in tenant.moves) else []
        asked = self.draw.choice(names)
        text = " ".join(self.draw.choice(WORDS) for _ in range(self.draw.randrange(1, 8)))
        kind = self.draw.choice(("classify", "completions"))
        body = {"model": asked, "input" if kind == "classify" else "prompt": text}
        sent = self.send("POST", f"/v1/{kind}", body, secret=secret)
        count = len(text.split())
        if sent is None:
            return
        if sent.got is None:
            tenant.unknown.append((asked.partition("@")[0], (1, 1, count, 16)))
            return
        said, headers = sent.got.json(), sent.got.headers
        version, digest = said["model"], headers["turret-digest"]
        assert f"{headers['turret-adapter']}@{headers['turret-version']}" == version
        assert version == asked or ("@" not in asked and version.startswith(f"{asked}@")), (asked, version)
        if kind == "classify":
            assert said["data"][0]["probabilities"] == pytest.approx(probabilities(digest, text))
        else:
            assert said["choices"][0]["text"] == " ".join([f"<{digest[-8:]}>", *text.split()])
        used = (1, 1, said["usage"]["prompt_tokens"], said["usage"].get("completion_tokens") or 0)
        assert used[2] == count
        ended = time.time()
        tenant.answers.append(Answer(asked, version, digest, used, sent.server, sent.life, sent.began, ended))


class Operator(Client):
    """Promotes, rolls back, lists, queues trainings of its tenant, one after another, and looks for those of others."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pause, self._seeds = (0.1, 0.9), 0

    def turn(self) -> None:
        acts = (self.promote, self.promote, self.rollback, self.read, self.read, self.train, self.train, self.pry)
        self.draw.choice(acts)()

    def promote(self) -> None:
        name = self.draw.choice(("news", self.tenant.own, self.tenant.trained))
        listed = self.json("GET", f"/api/adapters?name={name}")
        if listed is None or not listed["adapters"]:
            return
        version = self.draw.choice(listed["adapters"])["version"]
        path, alias = f"/api/adapters/{version}/promote", self.draw.choice(("production", "production", "candidate"))
        self._moved("promote", self.send("POST", path, {"alias": alias}))

    def rollback(self) -> None:
        name = self.draw.choice(("news", self.tenant.own))
        path = f"/api/aliases/{name}/production/rollback"
        self._moved("rollback", self.send("POST", path, expected=(200, 404)))  # 404: nothing to roll back to

    def _moved(self, verb: str, sent: Sent | None) -> None:
        if sent is None:
            return
        if sent.got is None:
            self.tenant.unknown_moves += 1
        elif sent.got.status_code == 200 and (said := sent.got.json())["changed"]:
            number = int(said["version"].rpartition("@")[2])
            self.tenant.moves.append((said["name"], said["alias"], verb, number))

    def read(self) -> None:
        path = self.draw.choice(
            ("/v1/models", "/api/adapters", "/api/aliases", "/api/usage", "/api/audit", "/api/runs", "/api/loaded",
             "/api/status", "/metrics", "/api/adapters/news@1")
        )  # fmt: skip
        self.send("GET", path)
        self.tenant.counts["read"] += 1

    def train(self) -> None:
        """Queue one more if none is open, so that the queue can be emptied at the end."""
        listed = self.json("GET", "/api/runs")
        if not self.trains or listed is None:
            return
        if any(each["state"] in ("waiting", "running") for each in listed["runs"]):
            run = listed["runs"][0]["id"]
            if self.draw.random() < 0.03:
                said = self.json("POST", f"/api/runs/{run}/cancel", expected=(200, 409))
                if said is not None and said.get("state") == "cancelled":
                    self.tenant.cancelled.add(run)
            else:
                self.send("GET", f"/api/runs/{run}")
            return
        self._seeds += 1
        files = {f"{self.tenant.word}.csv": self.tenant.table}
        body = {"recipe": self.tenant.recipe.replace("SEED", str(self._seeds)), "files": files}
        if said := self.json("POST", "/api/runs", body):
            assert said["state"] == "waiting"
            self.tenant.runs.append(said["id"])

    def pry(self) -> None:
        """What belongs to another is not there."""
        other = self.draw.choice(self.others)
        asks = [("GET", f"/api/adapters/{other.own}@1"), ("POST", f"/api/aliases/{other.own}/production/rollback")]
        asks += [(verb, f"/api/runs/{run}{more}") for run in other.runs[-1:]
                 for verb, more in (("GET", ""), ("POST", "/cancel"))]  # fmt: skip
        self.send(*self.draw.choice(asks), expected=(404,))
        self.tenant.counts["foreign"] += 1

    def json(self, method: str, path: str, body: object = None, expected: Sequence[int] = (200,)) -> Any:
        sent = self.send(method, path, body, expected=expected)
        return None if sent is None or sent.got is None else sent.got.json()


class Killer(Client):
    """Sends what has ended or frozen servers, by tokens of its tenant and without one, each time a little different."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pause = (0.5, 3.0)
        self.questions: Sequence[Callable[[], dict[str, Any]]] = (
            lambda: {"response_format": self._format(39, "bare")},
            lambda: {"response_format": self._format(20, "anyOf")},
            lambda: {"guided_json": chained(self._some(30, 50), 95, "bare")},
            lambda: {"structured_outputs": {"grammar": chain_of_rules(self._some(2900, 3300))}},
            lambda: {"structured_outputs": {"grammar": chain_of_rules(self._some(2900, 3300), "R")}},
            lambda: {"structured_outputs": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}},
            self._hidden,
            self._hidden,
        )
        self._plain: Sequence[tuple[str, str, str, str, bytes | None]] = (
            ("GET", "/sign-in", "cookie", 'a="' + "\\" * 12_000, b""),
            ("GET", "/sign-in", "cookie", '\\"' * 6_000, b""),
            ("POST", "/sign-in", "content-type", FORM, b"token=" + b"%" * 8_000),
            ("POST", "/sign-in", "content-type", FORM, b"%" * 4_000_000),
            ("POST", "/adapters/news/move/promote", "content-type", FORM, b"version=1&alias=" + b"%" * 900_000),
            ("POST", "/v1/classify", "content-type", "application/json", b"[" * 900_000),
            ("POST", "/v1/completions", "content-type", "application/json", b'{"a":' * 200_000),
        )

    def turn(self) -> None:
        kind = self.draw.randrange(3)
        if kind == 0:
            body = {"model": self.tenant.own, "prompt": "x", "max_tokens": 4, **self.draw.choice(self.questions)()}
            sent = self.send("POST", "/v1/completions", body, secret=self.tenant.limited, expected=REFUSED)
        elif kind == 1:
            method, path, name, value, content = self.draw.choice(self._plain)
            sent = self.send(
                method,
                path,
                secret=self.tenant.limited,
                headers={name: value},
                content=content,
                expected=(200, 303, *REFUSED),
            )
        else:
            recipe = self.draw.choice(("a." * 30_000 + "b = 1", "[" + "a." * 30_000 + "a]", "x = " + "[" * 50_000))
            sent = self.send("POST", "/api/runs", {"recipe": recipe, "files": {}}, expected=REFUSED)
        if sent is not None and sent.got is not None:
            self.tenant.counts[f"killers answered {sent.got.status_code}"] += 1

    def _some(self, low: int, high: int) -> int:
        return self.draw.randrange(low, high)

    def _format(self, definitions: int, kind: str) -> dict[str, Any]:
        schema = chained(definitions, self._some(70, 100), kind)
        return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}

    def _hidden(self) -> dict[str, Any]:
        """A schema within a grammar, which only the helper process finds too deep."""
        schema = json.dumps(chained(self._some(45, 56), self._some(85, 96), "bare"))
        return {"structured_outputs": {"grammar": f"start: found\nfound: %json {schema}"}}


class Watcher(Client):
    """Asks `/healthz` of every server that has started."""

    longest = 0.0

    def turn(self) -> None:
        for server in self.servers:
            sent = self.send("GET", "/healthz", server=server)
            if sent is not None and sent.got is not None:
                self.longest = max(self.longest, time.time() - sent.began)
                assert self.longest < PROMISED_SECONDS, f"{server.name} answered after {self.longest:.1f} s"
                self.tenant.counts["healthz"] += 1


class Putter(Client):
    """Stores versions, without a server."""

    def __init__(self, store: Store, base: Mapping[str, str], folder: Path, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.store, self.base, self.folder, self.pause = store, base, folder, (0.5, 3.0)
        self._seeds = self.draw.randrange(10_000, 1 << 30)  # no other tenant has such tensors

    def turn(self) -> None:
        self._seeds += 1
        said = {"base": self.base, "task": {"kind": "classify"}}
        bundle, began = write_bundle(self.folder, tensors(self._seeds), said=said), time.time()
        try:
            version = self.store.put(f"{self.tenant.word}-put", bundle)
        except StoreError as error:
            longest = 300 + len(self.store.location.given)  # the message names the store, whose URL is long here
            if (
                "\n" in str(error)
                or len(str(error)) > longest
                or not self.faults.between(began, time.time(), "postgresql", "s3")
            ):
                raise
            self.tenant.counts["refused"] += 1
        else:
            self.tenant.stored[str(version)] = version.digest


class Collector(Client):
    """Removes what nobody needs from the whole store. freed: data of trainings that have ended."""

    def __init__(self, store: Store, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.store, self.freed, self.pause = store, 0, (2.0, 20.0)

    def turn(self) -> None:
        began = time.time()
        try:
            self.freed += sum(each.why == queued_data.WHY for each in self.store.gc().removed)
        except StoreError:
            if not self.faults.between(began, time.time(), "postgresql"):
                raise
