"""Serve the application on a socket until SIGTERM or Ctrl-C.

The first signal drains the server: it still accepts connections, answers new questions with 503, and ends after the
last answer or at the time limit. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from turret.errors import ServeRefused
from turret.server.app import create, routes
from turret.server.batch_runner import BatchRunner
from turret.server.http_protocol import protocol
from turret.server.logs import LibraryHandler, Log, LogMiddleware
from turret.server.state import ServerState

LIBRARIES = ("uvicorn", "asyncio", "turret.serving")


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address that does not listen yet. Port 0 takes a free port. Raises ServeRefused."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)  # asyncio sets TCP_NODELAY only if the protocol is given
    except OSError as error:
        raise ServeRefused(f"serve on {host}: {error.strerror or error}: give an address of this machine") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ServeRefused(f"serve on {host} port {port}: {error.strerror}: give another --port or --host") from None
    return bound


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with an end that drains. announce: called once the socket listens."""

    def __init__(self, state: ServerState, announce: Callable[[], None] = lambda: None) -> None:
        limits, application = state.limits, routes(state)
        super().__init__(
            uvicorn.Config(
                create(state, application),
                http=protocol(limits, state.clients),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            )
        )
        self.state = state
        logged = LogMiddleware(application, state.log, state.metrics.request, state.clock)
        self._runner = BatchRunner(state, logged)
        self._announce = announce
        self._until = float("inf")

    def drain(self) -> None:
        """Accept no new requests, and end once the running ones are answered."""
        state = self.state
        if not state.load.draining:
            state.load.draining = True
            self._until = state.clock() + state.limits.drain_seconds
            state.log.write("draining", in_flight=state.load.requests)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.state.load.draining:
            self.should_exit = self.force_exit = True
        self.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._batches = asyncio.create_task(self._runner.run())
        self._announce()

    async def on_tick(self, counter: int) -> bool:
        load = self.state.load
        answered = not load.requests and not self._runner.working
        drained = load.draining and (answered or self.state.clock() >= self._until)
        return await super().on_tick(counter) or drained


def run(state: ServerState, listening: socket.socket, announce: Callable[[str], None] = lambda url: None) -> None:
    """Serve until a signal. Closes everything but the engine. announce: called with the URL once it answers."""
    url = url_of(listening)

    def serving() -> None:
        names = ", ".join(each.name for each in state.engines.bases)
        state.log.write("serving", url=url, base=names, guarded=not state.guard.open)
        announce(url)

    with _library_logs(state.log):
        state.start()
        try:
            Server(state, serving).run(sockets=[listening])
        finally:
            state.load.draining = True
            state.stop()
            listening.close()
            state.log.write("ended", in_flight=state.load.requests)


@contextmanager
def _library_logs(log: Log) -> Iterator[None]:
    """Write the log records of libraries to this server's log."""
    handler = LibraryHandler(log)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
