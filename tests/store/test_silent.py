"""If a server accepts connections and does not answer, every command ends in one line in time, and blocks no other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store.bundles import tensors, write_bundle
from store.s3_proxy import Proxy, proxied, through

from turret import postgres
from turret.errors import StoreError
from turret.store import Store, s3

Act = Callable[[Store, Path], object]


@pytest.fixture
def proxy(s3_server) -> Iterator[tuple[Proxy, str]]:
    with proxied(s3_server) as made:
        yield made


def ended(act: Callable[[], object], within: float) -> str:
    """The one line with which the command fails, in time."""
    began = time.monotonic()
    with pytest.raises(StoreError) as said:
        act()
    assert time.monotonic() - began < within
    assert "\n" not in str(said.value)
    return str(said.value)


# --- an object store ------------------------------------------------------------------------------------------------

OF_FILES: dict[str, Act] = {
    "put": lambda store, folder: store.put("a", write_bundle(folder, tensors(9))),
    "gc": lambda store, _: store.gc(),
    "verify": lambda store, _: store.verify(),
    "materialize": lambda store, folder: store.materialize("a@1", folder / "out"),
    "files": lambda store, _: store.files("a@1"),
    "problems": lambda store, _: store.problems(),
    "promote": lambda store, _: store.promote("a@1", "candidate"),
    "rollback": lambda store, _: store.rollback("a"),
}


def kept(url: str, folder: Path) -> Store:
    """A store with two versions, an alias that can roll back, and files for gc to remove."""
    store = Store(url)
    for seed in range(3):
        store.put("a", write_bundle(folder, tensors(seed)))
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    store.delete("a@3")
    return store


def of_a_silent_s3(store: Store, proxy: Proxy, act: Callable[[], object], other: Callable[[], object]) -> str:
    """The error of the command, while a command of another process continued."""
    proxy.rule("silent", times=1000)
    beside: list[object] = []
    thread = threading.Thread(target=lambda: beside.append(other()))
    thread.start()
    try:
        return ended(act, within=30)
    finally:
        thread.join(timeout=120)
        assert len(beside) == 1


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["gc", *OF_FILES])
def test_a_silent_s3_ends_a_verb_and_holds_up_no_other_writer(new_url, proxy, tmp_path, monkeypatch, verb) -> None:
    monkeypatch.setattr(s3, "TRY_SECONDS", 1.0)
    url = new_url()
    other = kept(url, tmp_path)
    store = through(proxy[1], url)
    more = write_bundle(tmp_path, tensors(7))
    said = of_a_silent_s3(store, proxy[0], lambda: OF_FILES[verb](store, tmp_path), lambda: other.put("b", more))
    assert "does not answer" in said
    assert "check the network and AWS_ENDPOINT_URL, and try again" in said
    proxy[0].rule("none", "none")
    OF_FILES[verb](store, tmp_path / "again")
    other.gc()
    assert other.verify().problems == ()


@pytest.mark.slow
def test_a_silent_s3_ends_a_verb_within_the_stated_time(new_url, proxy, tmp_path) -> None:
    url = new_url()
    kept(url, tmp_path)
    store = through(proxy[1], url)
    proxy[0].rule("silent", times=1000)
    ended(store.verify, within=s3.REQUEST_SECONDS + 10)


@pytest.mark.slow
def test_an_s3_that_takes_no_bytes_ends_a_request_too(new_url, proxy, tmp_path, monkeypatch) -> None:
    """No try ends because of silence: the server is not yet asked for an answer."""
    url = new_url()
    kept(url, tmp_path)
    store = through(proxy[1], url)
    proxy[0].rule("silent", times=1000)
    monkeypatch.setattr(s3, "REQUEST_SECONDS", 1.0)
    assert re.search("does not answer .no answer to [a-z_]+ in 1 s", ended(store.verify, within=20))


# --- PostgreSQL -----------------------------------------------------------------------------------------------------

OF_THE_CATALOG: dict[str, Act] = {
    "list": lambda store, _: store.list(),
    "show": lambda store, _: store.show("a"),
    "last_move": lambda store, _: store.last_move(),
    "put": lambda store, folder: store.put("b", write_bundle(folder, tensors(9))),
    "promote": lambda store, _: store.promote("a@1", "candidate"),
    "rollback": lambda store, _: store.rollback("a"),
    "delete": lambda store, _: store.delete("a@2", force=True),
    "gc": lambda store, _: store.gc(),
    "verify": lambda store, _: store.verify(),
    "materialize": lambda store, folder: store.materialize("a@1", folder / "out"),
}


@contextmanager
def stopped(folder: Path) -> Iterator[None]:
    """The server and all its processes are stopped: its kernel accepts connections, and there is no answer."""
    import psutil

    server = psutil.Process(int((folder / "data" / "postmaster.pid").read_text().splitlines()[0]))
    processes = [server.pid, *(child.pid for child in server.children(recursive=True))]
    try:
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize("verb", OF_THE_CATALOG)
def test_a_silent_postgresql_ends_a_verb(new_url, postgres_server, tmp_path, monkeypatch, verb) -> None:
    monkeypatch.setattr(postgres, "ANSWER_SECONDS", 1.0)
    url = new_url(str(tmp_path / "files")) + "&connect_timeout=2"
    store = kept(url, tmp_path)
    with stopped(postgres_server.folder):
        said = ended(lambda: OF_THE_CATALOG[verb](store, tmp_path), within=30)
        assert "silent" in said or "cannot be reached" in said
    OF_THE_CATALOG[verb](store, tmp_path / "again")
    store.gc()
    assert store.verify().problems == ()


@pytest.mark.slow
def test_a_silent_postgresql_ends_a_verb_within_the_stated_time(new_url, postgres_server, tmp_path) -> None:
    store = kept(new_url(str(tmp_path / "files")), tmp_path)
    with stopped(postgres_server.folder):
        ended(store.list, within=postgres.ANSWER_SECONDS + postgres.CONNECT_SECONDS + 10)


@pytest.mark.slow
def test_a_postgresql_that_falls_silent_in_a_transaction_ends_it(
    new_url, postgres_server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(postgres, "ANSWER_SECONDS", 1.0)
    store = kept(new_url(str(tmp_path / "files")), tmp_path)

    def write() -> None:
        with store.database().writing() as connection, stopped(postgres_server.folder):
            connection.exec_driver_sql("SELECT 1")

    said = ended(write, within=20)
    assert "the server is silent for 1 seconds: check the server, the network, and whether the change was made" in said
    assert store.promote("a@1", "candidate").changed


@pytest.mark.slow
def test_a_writer_that_says_nothing_more_holds_up_others_for_the_stated_time(new_url, tmp_path, monkeypatch) -> None:
    """A client that was stopped, or lost its network: the server ends it before the next writer gives up."""
    assert postgres.IDLE_SECONDS < postgres.BUSY_SECONDS
    monkeypatch.setattr(postgres, "IDLE_SECONDS", 2)
    url = new_url(str(tmp_path / "files"))
    store = kept(url, tmp_path)

    def write() -> None:
        with store.database().writing() as connection:
            assert Store(url).promote("a@1", "candidate").changed
            connection.exec_driver_sql("SELECT 1")

    assert "the connection was lost" in ended(write, within=30)


PROMOTES = """
import sys
from turret.store import Store
store = Store(sys.argv[1])
with store.database().reading():
    print("ready", flush=True)
    sys.stdin.readline()
store.promote("a@1", "candidate")
"""


@pytest.mark.slow
def test_a_writer_that_was_stopped_while_it_waited_holds_up_others_for_seconds(new_url, tmp_path) -> None:
    url = new_url(str(tmp_path / "files"))
    store = kept(url, tmp_path)
    command = [sys.executable, "-c", PROMOTES, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as waiting:
        assert (waiting.stdin, waiting.stdout) != (None, None)
        assert waiting.stdout.readline() == "ready\n"
        with store.database().writing() as connection:
            waiting.stdin.write("\n")
            waiting.stdin.flush()
            until = time.monotonic() + 60
            while not connection.exec_driver_sql("SELECT 1 FROM pg_locks WHERE NOT granted").all():
                assert time.monotonic() < until
                time.sleep(0.1)
            os.kill(waiting.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert store.promote("a@2", "candidate").changed
            took = time.monotonic() - began
        finally:
            os.kill(waiting.pid, signal.SIGKILL)
    assert postgres.TAKE_SECONDS / 2 < took < postgres.IDLE_SECONDS / 2, "at once, if it was not in the queue"
