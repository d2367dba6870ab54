"""HTTP/1.1 on a socket, with what uvicorn leaves open: headers in time, connections in number, half a request answered,
and an end for clients that do not read.

Refuses to know routes and limits of bodies.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from turret.errors import BadRequest, Busy, TooSlow, TurretError
from turret.server.connections import ClientConnections
from turret.server.error_responses import problem
from turret.server.limits import RequestLimits


def protocol(limits: RequestLimits, open_by: ClientConnections) -> type[asyncio.Protocol]:
    """The protocol with these limits, as uvicorn wants it: a class. open_by: the connections of each client."""

    class Bound(HttpProtocol):
        header_seconds, write_seconds = limits.header_seconds, limits.write_seconds
        clients = open_by

    return Bound


class HttpProtocol(H11Protocol):
    """A connection that waits for headers and for its reader, and not for ever."""

    header_seconds = 10.0
    write_seconds = 30.0
    clients: ClientConnections

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._leave: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        opened = transport.get_extra_info("socket")
        if opened is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # what is closed while nobody reads ends too
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.write_seconds * 1000))
        client = self.clients.limited(transport.get_extra_info("peername"))
        try:
            self.clients.enter(client)
        except Busy as error:
            self._refuse(error)
        else:
            self._leave = partial(self.clients.leave, client)
            self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._expect()  # a piece of the next request's headers; the first one began the time
        else:
            self._came()

    def eof_received(self) -> None:
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self._refuse(BadRequest("the body ended before its announced length: send all of it"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self._stuck or self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._came()
        self._reads()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read, answered in our shape."""
        self._refuse(BadRequest(f"this is not HTTP/1.1, or its headers have more than the limit: {msg.lower()}"))

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.header_seconds, self._give_up)

    def _came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _reads(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _give_up(self) -> None:
        self._late = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and not self.transport.is_closing():
            self._refuse(TooSlow(f"the headers were not there after {self.header_seconds:g} seconds"))

    def _refuse(self, error: TurretError) -> None:
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            told = problem(error)
            body = told.encoded()
            headers = {**told.headers, "content-length": str(len(body)), "connection": "close"}
            lines = [f"HTTP/1.1 {told.status} {STATUS_PHRASES[told.status].decode()}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            if self.cycle is not None:
                self.cycle.disconnected = True
        self.transport.close()
