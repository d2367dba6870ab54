"""A proxy in front of an S3 server that does to one request what a bad network or a bad server does.

A rule names the request, by method, path and the number of such requests before it, and what happens to it:

- `hold`: it waits until `release`, then continues normally
- `refuse`: it is answered 503 and not carried out
- `do-refuse`: it is carried out and answered 503
- `cut`: the connection ends, and it is not carried out
- `do-cut`: it is carried out, and the connection ends
- `late`: the connection ends, and it is carried out at `release`, maybe long after the client ended
- `silent`: it is not carried out, and there is no answer until the proxy ends
"""

from __future__ import annotations

import http.client
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from turret.store import Store

DEEDS = ("hold", "refuse", "do-refuse", "cut", "do-cut", "late")
_REFUSAL = b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code><Message>try again</Message></Error>"
_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Request:
    """One complete request."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    body: bytes = field(repr=False, default=b"")


@dataclass
class Rule:
    """What happens to at most `times` requests with this method and path, after the first `skip` of them."""

    deed: str
    method: str = ".*"
    path: str = ".*"
    skip: int = 0
    times: int = 1


class Proxy:
    """Runs inside `running`; `seen` has all requests."""

    def __init__(self, server: str) -> None:
        self._server = urlsplit(server)
        self._lock = threading.Lock()
        self._ended, self._released, self.caught = threading.Event(), threading.Event(), threading.Event()
        self._rule: Rule | None = None
        self._late: list[Request] = []
        self.seen: list[Request] = []

    def rule(self, deed: str, method: str = ".*", path: str = ".*", *, skip: int = 0, times: int = 1) -> None:
        """Apply this rule from now on, instead of the rule before."""
        self._released.clear()
        self.caught.clear()
        with self._lock:
            self.seen, self._late, self._rule = [], [], Rule(deed, method, path, skip, times)

    def release(self) -> int:
        """Continue requests that are held, carry out late ones, and return their number."""
        with self._lock:
            self._rule, late, self._late = None, self._late, []
        self._released.set()
        for request in late:
            self.forward(request)
        return len(late)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Yields the address."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client closed the connection
                    self.close_connection = True

            def __getattr__(self, name: str) -> object:
                if name.startswith("do_"):
                    return lambda: proxy.answer(self)
                raise AttributeError(name)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self._ended.set()
            self._released.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Treat the request as the rule says."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = Request(handler.command, handler.path, dict(handler.headers), body)
        deed = self._deed(request)
        if deed == "silent":
            self._ended.wait()
        if deed in ("cut", "late", "silent"):
            self._cut(handler)
            return
        if deed == "hold":
            self._released.wait()
        status, headers, content = (503, {}, _REFUSAL) if deed == "refuse" else self.forward(request)
        if deed == "do-cut":
            self._cut(handler)
            return
        if deed == "do-refuse":
            status, headers, content = 503, {}, _REFUSAL
        handler.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _OF_A_CONNECTION and not (content and name.lower() == "content-length"):
                handler.send_header(name, value)
        if content or not any(name.lower() == "content-length" for name in headers):
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def forward(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Send the request to the server."""
        assert self._server.hostname is not None
        connection = http.client.HTTPConnection(self._server.hostname, self._server.port, timeout=60)
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
            connection.request(request.method, request.path, request.body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _deed(self, request: Request) -> str:
        with self._lock:
            self.seen.append(request)
            rule = self._rule
            if rule is None or not (re.fullmatch(rule.method, request.method) and re.search(rule.path, request.path)):
                return "pass"
            if rule.skip > 0 or rule.times == 0:
                rule.skip -= 1
                return "pass"
            rule.times -= 1
            if rule.deed == "late":
                self._late.append(request)
        self.caught.set()
        return rule.deed

    def _cut(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True


@contextmanager
def proxied(server: str) -> Iterator[tuple[Proxy, str]]:
    """A running proxy, and its address."""
    proxy = Proxy(server)
    with proxy.running() as address:
        yield proxy, address


def through(address: str, where: str) -> Store:
    """A store whose requests for files, and no other, go to that address."""
    store, before = Store(where), os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = address
    try:
        store._blobs.owner()  # the address is looked up at the first request
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before
    return store
