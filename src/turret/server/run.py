"""A socket, the application on it, and an orderly end: SIGTERM lets what runs finish and refuses what is new.

The first signal drains: the server listens on, answers 503 to new questions, and ends when the last answer is out or
the time is up. The second one ends it at once. Refuses to know routes.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from turret.errors import ServeRefused
from turret.server.app import create
from turret.server.http_protocol import protocol
from turret.server.logs import Forwarded, Log
from turret.server.state import ServerState

LIBRARIES = ("uvicorn", "asyncio")


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address that does not listen yet; port 0 takes a free one. Raises ServeRefused."""
    try:
        family, kind, wire, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, wire)  # asyncio sends at once (TCP_NODELAY) only where the protocol is said
    except OSError as error:
        raise ServeRefused(f"serve on {host}: {error.strerror or error}: give an address of this machine") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise ServeRefused(f"serve on {host} port {port}: {error.strerror}: give another --port or --host") from None
    return made


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, ended by draining."""

    def __init__(self, served: ServerState, announce: Callable[[], None] = lambda: None) -> None:
        limits = served.limits
        super().__init__(
            uvicorn.Config(
                create(served),
                http=protocol(limits, served.clients),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            )
        )
        self.served = served
        self._announce = announce
        self._until = float("inf")

    def drain(self) -> None:
        """Take nothing new from now on, and end once what runs is finished."""
        if not self.served.load.draining:
            self.served.load.draining = True
            self._until = self.served.clock() + self.served.limits.drain_seconds
            self.served.log.say("draining", in_flight=self.served.load.requests)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.served.load.draining:
            self.should_exit = self.force_exit = True
        self.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()  # it listens now

    async def on_tick(self, counter: int) -> bool:
        load = self.served.load
        ended = load.draining and (not load.requests or self.served.clock() >= self._until)
        return await super().on_tick(counter) or ended


def run(served: ServerState, listening: socket.socket, announce: Callable[[str], None] = lambda url: None) -> None:
    """Serve until a signal says otherwise, then give everything back but the engine. announce: told the address."""
    url = url_of(listening)

    def begun() -> None:
        served.log.say("serving", url=url, base=served.base_id, guarded=not served.guard.open)
        announce(url)

    with _forwarding(served.log):
        served.start()
        try:
            Server(served, begun).run(sockets=[listening])
        finally:
            served.load.draining = True
            served.stop()
            listening.close()
            served.log.say("ended", in_flight=served.load.requests)


@contextmanager
def _forwarding(log: Log) -> Iterator[None]:
    """What the libraries say goes to our log, for as long as this server runs."""
    handler = Forwarded(log)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
