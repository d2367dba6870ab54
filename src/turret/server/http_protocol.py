"""HTTP/1.1 on a socket: uvicorn's protocol with limits on connections and on the time for headers and for writing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState as UvicornState

from turret.errors import BadRequest, Busy, TooSlow, TurretError
from turret.server.connections import ClientConnections
from turret.server.error_responses import error_response
from turret.server.headers import check_head
from turret.server.limits import RequestLimits

REFUSED_SECONDS = 1.0  # in which the rest of a refused request is dropped, so that the client gets to read why


def protocol(limits: RequestLimits, connections: ClientConnections) -> type[asyncio.Protocol]:
    """The protocol with these limits, as the class that uvicorn expects."""

    class Bound(HttpProtocol):
        header_seconds, write_seconds = limits.header_seconds, limits.write_seconds
        header_bytes = limits.header_bytes
        clients = connections

    return Bound


class HeadCheckingConnection(h11.Connection):
    """h11, which parses the head of a request only if `check_head` accepts it. `problem` says why it did not."""

    def __init__(self, most_head: int) -> None:
        super().__init__(h11.SERVER, most_head)
        self._most_head = most_head
        self.problem: TurretError | None = None

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE and self.problem is None:
            self.problem = check_head(self.trailing_data[0], self._most_head)
        if self.problem is not None:
            raise h11.RemoteProtocolError(str(self.problem))
        return super().next_event()


class HttpProtocol(H11Protocol):
    """One connection."""

    conn: HeadCheckingConnection
    header_bytes = 32 << 10
    header_seconds = 10.0
    write_seconds = 30.0
    clients: ClientConnections
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _leave: Callable[[], None] | None = None  # counts the connection out, if it was counted in
    _refused = False

    def __init__(  # Any: as in H11Protocol
        self,
        config: Config,
        server_state: UvicornState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = HeadCheckingConnection(self.header_bytes)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in H11Protocol
        super().connection_made(transport)
        opened = transport.get_extra_info("socket")
        if opened is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # ends a closed connection that nobody reads
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.write_seconds * 1000))
        client = self.clients.limited(transport.get_extra_info("peername"))
        try:
            self.clients.enter(client)
        except Busy as error:
            self._refuse(error)
        else:
            self._leave = partial(self.clients.leave, client)
            self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._start_header_timer()  # part of the next request's headers; its first byte started the timer
        else:
            self._stop_header_timer()

    def eof_received(self) -> None:
        if self._refused:
            self.transport.close()
        elif self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self._refuse(BadRequest("the body ended before its announced length: send all of it"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._write_timer or self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._leave is not None:
            self._leave()
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed in the format of all other errors, and drop the rest of it."""
        error = self.conn.problem or BadRequest(f"this is not HTTP/1.1: {msg.lower()}")
        self._refuse(error, linger=True)

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self._headers_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and not self.transport.is_closing():
            self._refuse(TooSlow(f"the headers did not arrive within {self.header_seconds:g} seconds"))

    def _refuse(self, error: TurretError, *, linger: bool = False) -> None:
        """Answer with an error, unless an answer has begun, and close the connection."""
        if self._refused:
            return
        self._refused = True
        self._stop_header_timer()
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            response = error_response(error)
            body = response.encoded()
            headers = {**response.headers, "content-length": str(len(body)), "connection": "close"}
            lines = [f"HTTP/1.1 {response.status} {STATUS_PHRASES[response.status].decode()}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            if self.cycle is not None:
                self.cycle.disconnected = True
            if linger and self.transport.can_write_eof():
                self.transport.write_eof()
                self.transport.resume_reading()
                self.loop.call_later(REFUSED_SECONDS, self.transport.close)
                return
        self.transport.close()
