"""A real server on a loopback port, in a thread, over a real store and the echo engine."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn.server
from server import patience
from server.echo import FINGERPRINT, LABELS, Echo, SamplingParams
from store.bundles import tensors, write_bundle

from turret.access import OPERATOR
from turret.server.app import Server, bind, url_of
from turret.server.engines import Engines
from turret.server.logs import Log
from turret.server.services import ServerSettings, Services, View
from turret.store import Version
from turret.workspace import Workspace

SEEDS = itertools.count()


class _ShortSleeps:
    """Stands for asyncio in uvicorn, which sleeps 0.1 s between two looks at whether to end, and again at the end."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.005))


@pytest.fixture(scope="session", autouse=True)
def short_sleeps() -> Iterator[None]:
    """A server ends as soon as it is told. Else that is a third of the time of many tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", _ShortSleeps())
        yield


class Running:
    """A running server, with its clients and its log. engine: one, or a list of those of several bases."""

    def __init__(
        self,
        workspace: Workspace,
        engine: Any,
        settings: ServerSettings,
        options: Any = SamplingParams,
        lines: io.StringIO | None = None,
    ) -> None:
        self.workspace, self.engine = workspace, engine
        self.lines = lines or io.StringIO()
        engines = Engines(*engine) if isinstance(engine, list) else Engines(engine)
        self.served = Services(workspace, engines, options, settings, log=Log(self.lines))
        self.server = Server(self.served)
        self._socket = bind("127.0.0.1", 0)
        self.url = url_of(self._socket)
        self.port = int(self.url.rpartition(":")[2])
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._opened: list[Any] = []

    def start(self) -> Running:
        self.view.refresh()
        self.served.start()
        self._thread.start()
        until = time.monotonic() + 10
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.002)
        return self

    def stop(self) -> None:
        for each in self._opened:
            each.close()
        self.server.drain()
        self.server.should_exit = True
        self._thread.join(timeout=10)
        self.served.stop()
        self._socket.close()
        for each in self.engine if isinstance(self.engine, list) else [self.engine]:
            each.close()

    @property
    def view(self) -> View:
        """The server as the tenant `default` sees it."""
        return self.served.view(OPERATOR)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def client(self, token: str | None = None, **settings: Any) -> httpx2.Client:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        how = {"verify": False} | settings  # over http: certificates would be read in vain
        made = httpx2.Client(base_url=self.url, headers=headers, timeout=20, trust_env=False, **how)
        self._opened.append(made)
        return made

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "store")


@pytest.fixture
def put(workspace: Workspace, tmp_path: Path) -> Callable[..., Version]:
    """Stores one more version of a name, by default on the echo's base."""

    def put(
        name: str = "a", base: str = FINGERPRINT, comparison: str | None = None, labels: Any = LABELS, **test: Any
    ) -> Version:
        task = {"kind": "classify", "labels": list(labels)}
        said = {"base": {"id": "echo", "fingerprint": base}, "task": task}
        bundle = write_bundle(tmp_path / "bundles", tensors(next(SEEDS)), said=said)
        return workspace.store.put(name, bundle, metrics={"test": test} if test else {}, comparison=comparison)

    return put


@pytest.fixture
def serve(workspace: Workspace) -> Iterator[Callable[..., Running]]:
    """`serve(pace=0.01, limits=RequestLimits(...))`: a server with settings of the echo and of the server."""
    running: list[Running] = []

    def serve(engine: Echo | list[Echo] | None = None, **settings: Any) -> Running:
        ours = {key: settings.pop(key) for key in list(settings) if key in ServerSettings.__dataclass_fields__}
        made = Running(workspace, engine or Echo(workspace.store, **settings), ServerSettings(**ours))
        running.append(made.start())
        return made

    yield serve
    for each in running:
        each.stop()


@pytest.fixture
def begin(serve, put, workspace) -> Callable[..., Running]:
    """`begin(share=0.5)`: a server with a running experiment on `a`, a@1 against a@2."""

    def begin(candidates: str | tuple[str, ...] = "a@2", engine: dict | None = None, **settings) -> Running:
        for _ in range(3):
            put()
        workspace.promote("a@1", "production")
        running = serve(**(engine or {}))
        workspace.experiment("a").start(candidates, **settings)
        running.view.refresh()
        return running

    return begin


@pytest.fixture
def until() -> Callable[..., None]:
    return patience.until


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server with an adapter `a`, for all tests of a module that change nothing."""
    folder = tmp_path_factory.mktemp("shared")
    workspace = Workspace(folder / "store")
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify"}}
    workspace.store.put("a", write_bundle(folder, tensors(next(SEEDS)), said=said))
    running = Running(workspace, Echo(workspace.store), ServerSettings())
    yield running.start()
    running.stop()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One open server for the tests that read tables: its helper process starts once."""
    workspace = Workspace(tmp_path_factory.mktemp("tables") / "store")
    made = Running(workspace, Echo(workspace.store), ServerSettings())
    yield made.start()
    made.stop()


@pytest.fixture
def client(running: Running) -> Any:
    return patience.patient(running.client())
