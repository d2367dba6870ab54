"""The ASGI application: the routes behind the middleware, in the order in which a request meets it.

log and request id -> other origins -> token and scope -> limits -> route

The server speaks HTTP alone, so each part gets nothing but requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState as UvicornState

from turret.errors import BadRequest, Busy, Draining, HeadersTooLarge, RequestError, ServeRefused, TooSlow, TurretError
from turret.json_types import JsonObject
from turret.server.admin import accounts, adapters, experiments, runs
from turret.server.auth import AuthMiddleware, Guard, allow_origins
from turret.server.console import adapters as adapter_pages
from turret.server.console import entry, operate, playground, render, train
from turret.server.console import experiments as experiment_pages
from turret.server.error_responses import ErrorResponse, error_response, status_response, validation_response
from turret.server.limits import ClientConnections, LimitMiddleware, RequestLimits
from turret.server.logs import LibraryHandler, Log, LogMiddleware, TraceMiddleware
from turret.server.metrics import CONTENT_TYPE
from turret.server.openai import batches, classify, completions, decisions, embeddings, models, responses
from turret.server.openai.batches import BatchRunner
from turret.server.routes import View, router
from turret.server.services import Services
from turret.version import __version__

# --- health -----------------------------------------------------------------------------------------------------------
# `/healthz`, `/readyz` and `/metrics`.


anyone, control = router(""), router("admin or metrics")


@anyone.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process answers."""
    return {"status": "ok"}


@anyone.get("/readyz")
async def readyz(view: View) -> Response:
    """200 once the store was read and adapters are loaded; 503 before that, and while the server shuts down."""
    services = view.services
    if services.load.draining or not services.ready:
        why = "shutting down" if services.load.draining else "not ready yet: adapters are being loaded"
        response = error_response(Draining(f"the server is {why}"))
        return JSONResponse(response.body, response.status, response.headers)
    return JSONResponse({"status": "ready"})


@control.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
async def metrics(view: View) -> Response:
    """Metrics for Prometheus: of the tenant's adapters; for the tenant `default`, of the server and all tenants too."""
    read = partial(view.metrics.text, view.engines.sees, operates=view.access.operates)
    return Response(await view.control(read), media_type=CONTENT_TYPE)


# --- app --------------------------------------------------------------------------------------------------------------


ROUTERS = (
    models.questions,
    completions.questions,
    classify.questions,
    decisions.questions,
    embeddings.questions,
    responses.questions,
    batches.questions,
    adapters.control,
    accounts.control,
    runs.control,
    experiments.control,
    experiments.outcomes,
    control,
    anyone,
    entry.router,
    experiment_pages.router,
    adapter_pages.router,
    train.router,
    playground.router,
    operate.router,
)


def create(services: Services, application: FastAPI | None = None) -> ASGIApp:
    """The whole server as an ASGI application. application: the routes, if they are made already."""
    limited = LimitMiddleware(application or routes(services), services.limits, services.load, services.clients)
    origins = services.settings.origins
    guarded = AuthMiddleware(limited, services.guard, render.PageResponse, services.replica.look_up_session, origins)
    logged = LogMiddleware(allow_origins(guarded, origins), services.log, services.metrics.request, services.clock)
    return logged if services.spans is None else TraceMiddleware(logged, services.spans)


class _Application(FastAPI):
    """FastAPI, whose description asks for no token while the server is open."""

    guard: Guard | None = None  # None while the reference is written

    def openapi(self) -> JsonObject:
        described = super().openapi()
        if self.guard is None or not self.guard.open:
            return described
        without: JsonObject = json.loads(json.dumps(described))
        without["components"].pop("securitySchemes", None)
        for operations in without["paths"].values():
            for operation in operations.values():
                operation.pop("security", None)
        return without


def routes(services: Services) -> FastAPI:
    """The routes without the middleware. `/openapi.json` describes them."""
    app = _Application(
        title="Turret",
        version=__version__,
        docs_url=None,  # its pages load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        routes=[route for each in ROUTERS for route in each.routes],  # `include_router` would make each a second time
    )
    app.state.services, app.guard = services, getattr(services, "guard", None)

    @app.exception_handler(TurretError)
    async def on_error(request: Request, error: TurretError) -> Response:
        response = error_response(error)
        if response.status >= 500:
            request_id = request.scope.get("state", {}).get("request_id")
            services.log.write("failed", "error", request=request_id, error=type(error).__name__, message=str(error))
        return _encode_error(response, getattr(request.state, "receipt", None))

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
        return _encode_error(validation_response(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # of all routes with this path, not of the first one alone
            found = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
            # /api/runs/draft is not /api/runs/{run_id}
            found = [route for route in found if getattr(route, "path", "") == request.scope["path"]] or found
            headers["Allow"] = ", ".join(sorted({name for route in found for name in getattr(route, "methods", ())}))
        return _encode_error(status_response(error.status_code, str(error.detail)), headers)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        # The log middleware logs it.
        return _encode_error(error_response(error), getattr(request.state, "receipt", None))

    return app


def _encode_error(response: ErrorResponse, headers: dict[str, str] | None = None) -> Response:
    return Response(response.encode_body(), response.status, {**response.headers, **(headers or {})})


# --- run --------------------------------------------------------------------------------------------------------------
# Serve the application on a socket until SIGTERM or Ctrl-C.


# --- head of a request ------------------------------------------------------------------------------------------------
# Lines that only some servers read as one are refused before the first line and the headers are parsed.


_END = b"\r\n\r\n"
_REFUSED = {  # a CR at the end may get its LF with the next bytes
    re.compile(rb"(?<!\r)\n|\r(?=[^\n])"): "a line of the headers does not end in CR LF: end each so",
    re.compile(rb"\n[ \t]"): "a header continues on a second line (folded): send each header on one line",
    re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"): "the headers have a control character: leave it out",
}


def check_head(received: bytes, most: int) -> RequestError | None:
    """What is wrong with the first line and the headers of a request, as far as they were received; None if nothing is.

    Parsers read a line that ends in LF alone, and a folded one, in different ways. They also take quadratic time for
    blanks before a control character.

    Args:
        most: Bytes of the first line and the headers together.
    """
    end = received.find(_END)
    head = received if end < 0 else received[: end + len(_END)]
    if len(head) > most:
        return HeadersTooLarge(f"the headers have more than {most} bytes: send fewer or shorter ones")
    return next((BadRequest(message) for found, message in _REFUSED.items() if found.search(head)), None)


# --- http protocol ----------------------------------------------------------------------------------------------------
# HTTP/1.1 on a socket: uvicorn's protocol with limits on connections and on the time for headers and for writing.


REFUSED_SECONDS = 1.0  # in which the rest of a refused request is dropped, so that the client gets to read why


class LimitedConfig(uvicorn.Config):
    """uvicorn's settings, with what `HttpProtocol` needs."""

    limits: RequestLimits
    clients: ClientConnections


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
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _leave: Callable[[], None] | None = None  # counts the connection out, if it was counted in
    _refused = False

    def __init__(  # Any: as in H11Protocol
        self,
        config: LimitedConfig,
        server_state: UvicornState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits, self.clients = config.limits, config.clients
        self.conn = HeadCheckingConnection(self.limits.header_bytes)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in H11Protocol
        super().connection_made(transport)
        opened = transport.get_extra_info("socket")
        if opened is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # ends a closed connection that nobody reads
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.limits.write_seconds * 1000))
        client = self.clients.limited_client(transport.get_extra_info("peername"))
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
        self._write_timer = self._write_timer or self.loop.call_later(self.limits.write_seconds, self.transport.abort)

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
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._headers_late)

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
            self._refuse(TooSlow(f"the headers did not arrive within {self.limits.header_seconds:g} seconds"))

    def _refuse(self, error: TurretError, *, linger: bool = False) -> None:
        """Answer with an error, unless an answer has begun, and close the connection."""
        if self._refused:
            return
        self._refused = True
        self._stop_header_timer()
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            response = error_response(error)
            body = response.encode_body()
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


# --- run --------------------------------------------------------------------------------------------------------------


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

    def __init__(self, services: Services, announce: Callable[[], None] = lambda: None) -> None:
        application = routes(services)
        config = LimitedConfig(
            create(services, application),
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        config.limits, config.clients = services.limits, services.clients
        super().__init__(config)
        self.services = services
        logged = LogMiddleware(application, services.log, services.metrics.request, services.clock)
        self._runner = BatchRunner(services, logged)
        self._announce = announce
        self._until = float("inf")

    def drain(self) -> None:
        """Accept no new requests, and end once the running ones are answered."""
        services = self.services
        if not services.load.draining:
            services.load.draining = True
            self._until = services.clock() + services.limits.drain_seconds
            services.log.write("draining", in_flight=services.load.requests)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.services.load.draining:
            self.should_exit = self.force_exit = True
        self.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._batches = asyncio.create_task(self._runner.run())
        self._announce()

    async def on_tick(self, counter: int) -> bool:
        load = self.services.load
        answered = not load.requests and not self._runner.working
        drained = load.draining and (answered or self.services.clock() >= self._until)
        return await super().on_tick(counter) or drained


def run(services: Services, listening: socket.socket, announce: Callable[[str], None] = lambda url: None) -> None:
    """Serve until a signal. Closes everything but the engine. announce: called with the URL once it answers."""
    url = url_of(listening)

    def serving() -> None:
        names = ", ".join(each.name for each in services.engines.bases)
        services.log.write("serving", url=url, base=names, guarded=not services.guard.open)
        announce(url)

    with _library_logs(services.log):
        services.start()
        try:
            Server(services, serving).run(sockets=[listening])
        finally:
            services.load.draining = True
            services.stop()
            listening.close()
            services.log.write("ended", in_flight=services.load.requests)


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
