"""`deploy/haproxy.cfg` in a real HAProxy, before three real servers of one store: who answers, and what fails when."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
import small_models
from server.patience import until
from server.test_end_to_end import bundle

from turret.workspace import Workspace

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy")
NAMES = "abdfhimq"  # HAProxy gives each of its servers some of them
CLIENTS = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy: apt-get install haproxy"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Server:
    """`turret serve` in a process of its own, always on one port."""

    command: list[str]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ready(self) -> bool:
        try:
            return httpx2.get(f"http://{self.address}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    def start(self) -> None:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen([*self.command, "--port", str(self.port)], stderr=subprocess.DEVNULL)
        until(lambda: self.ready, 300)

    def signal(self, what: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(what)

    def in_flight(self) -> int:
        """The requests that it is answering, without this one."""
        text = httpx2.get(f"http://{self.address}/metrics", timeout=30, trust_env=False).text
        found = re.search(r"^turret_in_flight\S* (\S+)$", text, re.MULTILINE)
        assert found is not None
        return int(float(found[1])) - 1


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("fleet")
    base, store = small_models.save_base("qwen3", folder / "qwen3"), folder / "store"
    workspace = Workspace(store)
    for seed, name in enumerate(NAMES):
        workspace.store.put(name, bundle(folder / name, base, "qwen3", "generate", seed))
        workspace.promote(f"{name}@1", "production")
    command = [sys.executable, "-m", "turret", "serve", "--store", str(store), "--base", str(base), "--json"]
    made = [Server([*command, "--dtype", "float32", "--proxy", "127.0.0.1"]) for _ in range(3)]
    try:
        yield made
    finally:
        for each in made:
            if each.process is not None:
                each.process.kill()
                each.process.wait()


@dataclass(frozen=True)
class Proxy:
    """A running HAProxy."""

    url: str
    figures: str

    def states(self) -> dict[str, str]:
        """What it thinks of each server: UP or DOWN."""
        text = httpx2.get(f"{self.figures}/metrics", timeout=10, trust_env=False).text
        seen = r'^haproxy_server_status\{proxy="questions",server="(\w+)",state="(UP|DOWN)"\} 1$'
        return dict(re.findall(seen, text, re.MULTILINE))

    def ask(self, model: str, **more: object) -> httpx2.Response:
        body = {"model": model, "prompt": "the market", "max_tokens": 4, **more}
        return httpx2.post(f"{self.url}/v1/completions", json=body, timeout=120, trust_env=False)

    def who(self, model: str, **more: object) -> str:
        """The server that answers."""
        got = self.ask(model, **more)
        assert got.status_code == 200, got.text
        return str(got.json()["id"]).split("-")[1]


@contextmanager
def proxied(servers: list[Server], folder: Path, change: Callable[[str], str] = str) -> Iterator[Proxy]:
    """The shipped configuration, or a changed one, in a HAProxy that sees all servers."""
    for each in servers:
        each.start()
    configuration = folder / "haproxy.cfg"
    text = CONFIGURATION.read_text(encoding="utf-8")
    configuration.write_text(change(text), encoding="utf-8")
    assert change is str or configuration.read_text(encoding="utf-8") != text, "the control changes nothing"
    ports = free_port(), free_port()
    environment = {**os.environ, "TURRET_LISTEN": f"127.0.0.1:{ports[0]}", "TURRET_FIGURES": f"127.0.0.1:{ports[1]}"}
    environment |= {f"TURRET_SERVER_{number}": each.address for number, each in enumerate(servers, 1)}
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [str(HAPROXY), "-db", "-f", str(configuration)], env=environment, stdout=log, stderr=log
        ) as process,
    ):
        try:
            proxy = Proxy(f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}")
            until(lambda: _listens(ports[1]), 20)
            until(lambda: list(proxy.states().values()) == ["UP"] * 3, 30)
            yield proxy
        finally:
            process.terminate()
            process.wait(timeout=20)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@dataclass
class Load:
    """Eight clients that ask without a pause, each its own adapter; what they saw."""

    proxy: Proxy
    again: bool = False  # a client asks once more after a failure
    stream: bool = False
    answered: Counter[str] = field(default_factory=Counter)  # by server
    failures: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._client, args=[name]) for name in NAMES[:CLIENTS]]
        for each in threads:
            each.start()
        try:
            yield
        finally:
            self._end.set()
            for each in threads:
                each.join(timeout=180)
        assert not any(each.is_alive() for each in threads)

    def _client(self, name: str) -> None:
        while not self._end.is_set():
            problem = self._asked(name)
            if problem is not None and self.again:
                problem = self._asked(name)
            if problem is not None:
                self.failures.append(problem)

    def _asked(self, name: str) -> str | None:
        try:
            got = self.proxy.ask(name, max_tokens=60, stream=self.stream, logit_bias={"1": -100})
        except httpx2.TransportError as error:
            return type(error).__name__
        if got.status_code != 200 or (self.stream and not got.text.endswith("data: [DONE]\n\n")):
            return f"{got.status_code}: {got.text[-200:]}"
        found = re.search(r'"id": ?"cmpl-(\w+)-', got.text)
        assert found is not None, got.text
        self.answered[found[1]] += 1
        return None


def killed_under_load(servers: list[Server], proxy: Proxy, load: Load, victim: int | None = None) -> int:
    """Kill a server that is answering; the number of requests that were in flight there, or more.

    Args:
        victim: its place; None: the one that answers most.
    """
    with load.running():
        until(lambda: sum(load.answered.values()) > 3 * CLIENTS, 120)
        until(lambda: max(each.in_flight() for each in servers) > 0, 60)
        busiest = max(servers, key=Server.in_flight) if victim is None else servers[victim]
        before = Counter(load.answered)
        busiest.signal(signal.SIGKILL)
        assert busiest.process is not None
        busiest.process.wait()
        until(lambda: "DOWN" in proxy.states().values(), 60)
        until(lambda: sum((load.answered - before).values()) > 3 * CLIENTS, 120)
        assert sum(each.process.poll() is None for each in servers if each.process) == 2, "another server has ended"
    # Which requests were in flight at the signal cannot be known; each client has one at a time.
    return CLIENTS


def test_the_questions_of_one_adapter_go_to_one_server_however_its_version_is_named(servers, tmp_path) -> None:
    with proxied(servers, tmp_path) as proxy:
        own = {name: proxy.who(name) for name in NAMES}
        assert len(set(own.values())) > 1, "all adapters are at one server"
        for name, server in own.items():
            assert {proxy.who(each) for each in (name, f"{name}@1", f"{name}@production")} == {server}
        long = "x" * 200_000  # an unknown key; the buffer holds a part of the body
        assert {name: proxy.who(name, ignored=long) for name in NAMES} == own
        without = httpx2.post(f"{proxy.url}/v1/completions", json={"prompt": "x"}, trust_env=False)
        assert without.status_code in (400, 422), without.text
        assert httpx2.get(f"{proxy.url}/v1/models", trust_env=False).status_code == 200
        assert httpx2.get(f"{proxy.url}/metrics", trust_env=False).status_code == 404


def asked_at_once(proxy: Proxy, model: str, times: int = 24) -> set[str]:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(proxy.who(model, max_tokens=60))) for _ in range(times)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == times
    return set(found)


def test_an_adapter_that_many_ask_is_answered_by_more_than_one_server(servers, tmp_path) -> None:
    with proxied(servers, tmp_path) as proxy:
        assert len(asked_at_once(proxy, "a")) > 1


def test_control_without_the_bound_one_server_would_answer_alone(servers, tmp_path) -> None:
    with proxied(servers, tmp_path, lambda text: text.replace("hash-balance-factor 200", "")) as proxy:
        assert len(asked_at_once(proxy, "a")) == 1


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["one", "two", "three"])
def test_no_question_fails_when_one_of_three_servers_is_killed_under_eight_clients(servers, tmp_path, victim) -> None:
    with proxied(servers, tmp_path) as proxy:
        load = Load(proxy)
        killed_under_load(servers, proxy, load, victim)
        assert load.failures == []
        assert len(load.answered) == 3


def test_control_with_too_little_room_at_the_others_a_second_try_goes_to_the_dead_server(servers, tmp_path) -> None:
    """`two` is the server at the end of HAProxy's ring, where its search ends if no server has room."""
    tight = lambda text: text.replace("hash-balance-factor 200", "hash-balance-factor 125")
    with proxied(servers, tmp_path, tight) as proxy:
        load = Load(proxy)
        killed_under_load(servers, proxy, load, 1)
        assert any(each.startswith("503") for each in load.failures)


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_without_the_proxys_second_try_only_what_was_in_flight_there_fails(servers, tmp_path, again: bool) -> None:
    once = lambda text: text.replace("retry-on conn-failure empty-response 503", "retry-on conn-failure")
    for _ in range(3):  # it may have answered all at the moment of the signal
        with proxied(servers, tmp_path, once) as proxy:
            load = Load(proxy, again=again)
            most = killed_under_load(servers, proxy, load)
        assert len(load.failures) <= (0 if again else most), load.failures
        if again or load.failures:
            return
    pytest.fail("no request was in flight at the killed server: the control shows nothing")


def test_of_streams_only_those_that_had_begun_there_are_cut(servers, tmp_path) -> None:
    with proxied(servers, tmp_path) as proxy:
        load = Load(proxy, stream=True)
        most = killed_under_load(servers, proxy, load)
        assert len(load.failures) <= most, load.failures


def test_a_server_that_ends_in_order_fails_no_question(servers, tmp_path) -> None:
    with proxied(servers, tmp_path) as proxy:
        load = Load(proxy)
        with load.running():
            until(lambda: sum(load.answered.values()) > 3 * CLIENTS, 120)
            servers[0].signal(signal.SIGTERM)
            assert servers[0].process is not None
            assert servers[0].process.wait(timeout=90) == 0
            before = Counter(load.answered)
            until(lambda: sum((load.answered - before).values()) > 3 * CLIENTS, 120)
        assert load.failures == []


def test_a_busy_server_stays_in_and_one_that_hangs_does_not(servers, tmp_path) -> None:
    with proxied(servers, tmp_path) as proxy, ExitStack() as woken:
        load = Load(proxy)
        with load.running():  # every processor of this machine is taken
            end = time.monotonic() + 12
            while time.monotonic() < end:
                assert set(proxy.states().values()) == {"UP"}
                time.sleep(0.5)
        servers[1].signal(signal.SIGSTOP)  # three seconds of nothing, as a long pause of a busy machine
        woken.callback(servers[1].signal, signal.SIGCONT)
        time.sleep(3)
        servers[1].signal(signal.SIGCONT)
        time.sleep(3)
        assert proxy.states()["two"] == "UP"
        servers[1].signal(signal.SIGSTOP)
        until(lambda: proxy.states()["two"] == "DOWN", 40)
        assert {proxy.ask(name).status_code for name in NAMES} == {200}
        servers[1].signal(signal.SIGCONT)
        until(lambda: proxy.states()["two"] == "UP", 30)


def test_clients_that_send_or_read_too_slowly_are_cut(servers, tmp_path) -> None:
    with proxied(servers, tmp_path) as proxy, ExitStack() as opened:
        port = int(proxy.url.rpartition(":")[2])
        connect = lambda: opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        started, header, body, deaf = time.monotonic(), connect(), connect(), connect()
        header.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        body.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{")
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 200)  # far more than all buffers hold
        for each in (header, body):
            assert b" 408 " in each.recv(65536)
            assert 10 < time.monotonic() - started < 30
        time.sleep(max(0.0, started + 45 - time.monotonic()))
        taken = 0
        try:
            while piece := deaf.recv(1 << 20):
                taken += len(piece)
        except ConnectionResetError:
            pass
        whole = len(httpx2.get(f"{proxy.url}/openapi.json", trust_env=False, timeout=60).content) * 200
        assert taken < whole / 2, "the client that did not read was answered to the end"
