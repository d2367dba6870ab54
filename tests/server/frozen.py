"""Finds requests that freeze a server: every route and header, with texts for which careless parsers take too long.

The routes come from the server's own OpenAPI description and from the routes of the pages, so a new route is asked too.
Another connection asks `/healthz` all the while.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import psutil
from server import walk

from turret.server.limits import FILES, RequestLimits, is_page

PROMISED = 0.3  # seconds until /healthz answers, during any other request
GROWTH = 5 << 28  # bytes by which the memory of a server may grow meanwhile: the walk with any text, 16,528
# requests, took 1,064 MiB at its highest, of which one text of a million tokens takes 260
LIMITS = RequestLimits()
HEADER = LIMITS.header_bytes - 2048  # bytes that one value may have
PATTERNS = (
    "\\",
    "%",
    "a.",
    "[",
    ",",
    "&",
    '"',
    "é",
    "9",
    "{",
    ";",
    "=",
    " ",
    "a=",
    "(",
    '\\"',
    "';",
    "%%41",
    "a b ",
    "\0",
)
FEW = ("\\", "%", "a.", '";')
FILL, NUMBER = "fill-7c1e", "number-7c1e"  # where a text, or a number, of an instance is
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=b"
HEADERS = (
    "accept", "accept-encoding", "accept-language", "authorization", "connection", "content-encoding", "content-length",
    "content-type", "cookie", "expect", "forwarded", "hx-request", "if-none-match", "origin", "range", "referer",
    "sec-fetch-site", "te", "traceparent", "tracestate", "transfer-encoding", "turret-unit", "upgrade", "x-a",
    "x-form-token", "x-forwarded-for", "x-request-id",
)  # fmt: skip


@dataclass(frozen=True)
class Caller:
    """Who sends the requests. named: a value for each of `walk.NAMES`."""

    port: int
    named: Mapping[str, Any]
    token: str | None = None
    session: str = ""  # the Cookie header of a page
    form_token: str = ""

    def headers(self, path: str) -> dict[str, str]:
        found = {"host": f"127.0.0.1:{self.port}", "connection": "close"}
        if is_page(path):
            return found | {
                "origin": f"http://127.0.0.1:{self.port}",
                "cookie": self.session,
                "x-form-token": self.form_token,
            }
        return found | ({"authorization": f"Bearer {self.token}"} if self.token else {})


@dataclass(frozen=True)
class Attack:
    """One request. what: for messages."""

    what: str
    method: str
    path: str
    body: bytes = b""
    kind: str | None = None  # the content type
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # the first line and the headers, if they are not made from the others


def attacks(
    schema: Mapping[str, Any], caller: Caller, patterns: Sequence[str], *, whole: bool = True
) -> Iterator[Attack]:
    """Requests to every route of a server, and with every header.

    Args:
        schema: The OpenAPI description of the server.
        whole: Also each text of each body on its own.
    """
    for pattern in patterns:
        yield from _of_headers(pattern)
        for path, methods in schema["paths"].items():
            for method, route in methods.items():
                yield from _of_route(path, method.upper(), route, schema, caller, pattern, whole=whole)
        for route in walk.every_route():
            if is_page(route.path):
                for method in sorted(route.methods):
                    yield from _of_page(route.path.replace(":path", ""), method, pattern)


def repeated(pattern: str, most: int) -> str:
    """A pattern, as often as fits into so many bytes of UTF-8."""
    return pattern * max(1, most // len(pattern.encode()))


def _of_headers(pattern: str) -> Iterator[Attack]:
    value = repeated(pattern, HEADER).encode().decode("latin-1")
    for name in HEADERS:
        for path in ("/sign-in", "/v1/models", "/v1/files"):
            method = "POST" if name in ("content-length", "content-type", "transfer-encoding", "expect") else "GET"
            for text in (value, f"a={value}", f'multipart/form-data; boundary="{value}'):
                yield Attack(f"header {name}: {pattern!r}", method, path, headers={name: text})
    larger = repeated(pattern, LIMITS.header_bytes).encode().decode("latin-1")
    yield Attack(f"more bytes of headers than may be {pattern!r}", "GET", "/v1/models", headers={"x-a": larger})
    many = repeated(f"{pattern.encode().hex()}: {pattern}\r\n", HEADER).encode()
    yield Attack(
        f"headers {pattern!r}",
        "GET",
        "/v1/models",
        raw=b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n" + many + b"\r\n",
    )
    blanks = b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a:" + b" " * HEADER + pattern.encode() + b"\0\r\n\r\n"
    yield Attack(f"blanks before {pattern!r}", "GET", "/v1/models", raw=blanks)
    yield Attack(
        f"a first line of {pattern!r}", "GET", "/v1/models", raw=repeated(pattern, HEADER).encode() + b"\r\n\r\n"
    )


def _of_route(
    path: str,
    method: str,
    route: Mapping[str, Any],
    schema: Mapping[str, Any],
    caller: Caller,
    pattern: str,
    *,
    whole: bool,
) -> Iterator[Attack]:
    where = f"{method} {path}"
    text = quote(repeated(pattern, HEADER // 3), safe="%" if pattern == "%" else "")
    parameters = [each for each in route.get("parameters", ()) if each["in"] in ("path", "query")]
    plain = _filled(path, caller, {})
    for each in parameters:
        if each["in"] == "path":
            yield Attack(f"{where} {each['name']}: {pattern!r}", method, _filled(path, caller, {each["name"]: text}))
        else:
            yield Attack(f"{where} ?{each['name']}: {pattern!r}", method, f"{plain}?{each['name']}={text}")
    yield Attack(f"{where} ?{pattern!r}", method, f"{plain}?{text}")
    yield Attack(f"{where} ?&", method, f"{plain}?{'a&' * (HEADER // 2)}")
    most = LIMITS.body_bytes_of(method, path)
    content = route.get("requestBody", {}).get("content", {})
    if walk.MULTIPART in content:
        yield from _of_file(where, plain, pattern)
        return
    raw = repeated(pattern, most).encode()
    yield Attack(f"{where} body {pattern!r}", method, plain, raw, walk.JSON)
    yield Attack(
        f"{where} list {pattern!r}",
        method,
        plain,
        json.dumps([pattern] * (most // (len(json.dumps(pattern)) + 2))).encode(),
        walk.JSON,
    )
    if walk.JSON in content:
        for place, instance in enumerate(_instances(content[walk.JSON]["schema"], schema, caller)):
            if whole or place % 3 == 0:
                for body in _rendered(instance, pattern, most):
                    yield Attack(f"{where} {json.dumps(instance)[:200]} {pattern!r}", method, plain, body, walk.JSON)


def _of_file(where: str, path: str, pattern: str) -> Iterator[Attack]:
    text, most = repeated(pattern, 1 << 20).encode(), 4 << 20
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n--b--\r\n'
    short = repeated(pattern, 30_000).encode()
    for body in (
        repeated(pattern, most).encode(),
        part % (short, b"x"),
        part % (text, b"x"),
        part % (b"x", text),
        b"--b\r\n" + text + b"\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n" + repeated(f"a: {pattern}\r\n", 1 << 20).encode() + b"\r\nx\r\n--b--\r\n",
        (b"--b\r\n\r\n" + pattern.encode() + b"\r\n") * 50_000,
        b"\r\n--" * (1 << 20),
    ):
        yield Attack(f"{where} {body[:60]!r}", "POST", path, body, MULTIPART)


def _of_page(path: str, method: str, pattern: str) -> Iterator[Attack]:
    where, most = f"{method} {path}", LIMITS.body_bytes_of(method, path)
    text = quote(repeated(pattern, HEADER // 3), safe="%" if pattern == "%" else "")
    plain = re.sub(r"\{(\w+)\}", "x", path)
    if plain != path:
        yield Attack(f"{where} path {pattern!r}", method, re.sub(r"\{(\w+)\}", lambda _: text, path, count=1))
    yield Attack(f"{where} ?{pattern!r}", method, f"{plain}?{text}")
    if method == "POST" and path in FILES:
        yield from _of_file(where, plain, pattern)
    elif method == "POST":
        raw = repeated(pattern, most - 100).encode()
        for start in (b"", b"token=", b"text=", b"version=1&alias=", b"model="):
            yield Attack(f"{where} {start.decode()}{pattern!r}", method, plain, start + raw, FORM)


def _filled(path: str, caller: Caller, values: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1].partition(":")[0]
        return values.get(name) or str(caller.named.get(name, walk.PLAIN.get(name, ["x"])[0]))

    return re.sub(r"\{([^}]+)\}", value, path)


# --- instances of a schema, with a place for the pattern --------------------------------------------------------------


def _instances(
    part: Mapping[str, Any], whole: Mapping[str, Any], caller: Caller, inside: tuple[str, ...] = ()
) -> Iterator[Any]:
    """Small values that fit a schema, each with one text or number to be filled."""
    if "$ref" in part:
        if inside.count(part["$ref"]) < 2:
            yield from _instances(_at(part["$ref"], whole), whole, caller, (*inside, part["$ref"]))
    elif "anyOf" in part or "oneOf" in part:
        for each in part.get("anyOf", part.get("oneOf", ())):
            yield from _instances(each, whole, caller, inside)
    elif part.get("type") == "string" and "enum" not in part and "const" not in part:
        yield f"{FILL}{part.get('maxLength', '')}"
    elif part.get("type") in ("integer", "number"):
        yield NUMBER
    elif part.get("type") == "array":
        for each in _instances(part.get("items", {}), whole, caller, inside):
            yield [each]
    elif part.get("type") == "object":
        smallest = _smallest(part, whole, caller)
        for key, value in part.get("properties", {}).items():
            for each in _instances(value, whole, caller, inside):
                yield smallest | {key: each}
        more = part.get("additionalProperties")
        if more not in (None, False):
            yield {FILL: "x"}
            yield {"x": FILL}
            if isinstance(more, Mapping):
                for each in _instances(more, whole, caller, inside):
                    yield {"x": each}


def _smallest(part: Mapping[str, Any], whole: Mapping[str, Any], caller: Caller) -> Any:
    if "$ref" in part:
        return _smallest(_at(part["$ref"], whole), whole, caller)
    if "anyOf" in part or "oneOf" in part:
        return _smallest(part.get("anyOf", part.get("oneOf"))[0], whole, caller)
    if "const" in part or "enum" in part:
        return part.get("const", part.get("enum", [None])[0])
    if part.get("type") == "object":
        own = caller.named | {"prompt": "x", "input": "x", "recipe": 'base = "b"\nname = "x"\n[data]\nsource = "r.csv"'}
        return {
            key: own.get(key, _smallest(part["properties"][key], whole, caller)) for key in part.get("required", ())
        }
    if part.get("type") == "array":
        return [_smallest(part["items"], whole, caller)]
    return {"string": "x", "integer": 1, "number": 1, "boolean": True}.get(part.get("type"))


def _at(reference: str, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = whole["components"]["schemas"][reference.rpartition("/")[2]]
    return found


def _rendered(instance: Any, pattern: str, most: int) -> Iterator[bytes]:
    """Bodies with the pattern in its place in an instance: as long as the schema, and as the route, allows.

    A text that is longer than its schema allows is refused by the same lines for every field, so only FEW are so long.
    """
    text = json.dumps(instance)
    if NUMBER in text:
        if pattern in ("9", "a."):
            yield text.replace(f'"{NUMBER}"', "9" * (most - len(text))).encode()
            yield text.replace(f'"{NUMBER}"', "1." + "9" * 100_000).encode()
        return
    found = re.search(rf"{FILL}(\d*)", text)
    if found is None:
        return
    escaped = json.dumps(pattern)[1:-1]
    room = (most - len(text)) // len(escaped)
    allowed = min(room, int(found[1]) // len(pattern)) if found[1] else room
    for count in {allowed, room if pattern in FEW else allowed}:
        yield text.replace(found[0], escaped * count).encode()


# --- the watch --------------------------------------------------------------------------------------------------------


class Watch:
    """Asks `/healthz` all the time, on a connection of its own, and reads the memory of the server.

    A wait is the shorter of the time on the clock and the processor time of the server: other programs may have the
    processors.
    """

    def __init__(self, port: int, pid: int) -> None:
        self._port, self._pid, self._process = port, pid, psutil.Process(pid)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._longest, self._asked_at = 0.0, None
        self.most_memory = self.start_memory = self._process.memory_info().rss
        self.problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=30)

    def longest_wait(self) -> float:
        """The longest wait since the last call, once the request that waits now is answered. Raises what ended it."""
        with self._lock:
            if self.problem is not None:
                raise self.problem
            longest, self._longest = self._longest, 0.0
            return longest

    def _run(self) -> None:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=120) as opened:
                while not self._over.is_set():
                    with self._lock:
                        began, worked = time.monotonic(), self._worked()
                        opened.sendall(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
                        answer = opened.recv(65536)
                        while not answer.endswith(b"}") and (more := opened.recv(65536)):
                            answer += more
                        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
                        wait = min(time.monotonic() - began, self._worked() - worked)
                        self._longest = max(self._longest, wait)
                        self.most_memory = max(self.most_memory, self._process.memory_info().rss)
                    time.sleep(0.002)
        except BaseException as error:
            self.problem = error

    def _worked(self) -> float:
        return time.clock_gettime((~self._pid << 3) | 2)  # as clock_getcpuclockid() on Linux


def sent(attack: Attack, caller: Caller) -> int:
    """The status of the answer; 0 if the server closed the connection without one."""
    if attack.raw is not None:
        head = attack.raw
    else:
        headers = caller.headers(attack.path.partition("?")[0]) | {"content-length": str(len(attack.body))}
        headers |= {"content-type": attack.kind} if attack.kind else {}
        headers |= attack.headers
        lines = [f"{attack.method} {attack.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    with socket.create_connection(("127.0.0.1", caller.port), timeout=60) as opened:
        try:
            opened.sendall(head + attack.body)
            opened.shutdown(socket.SHUT_WR) if attack.raw is not None else None
            answer = opened.recv(65536)
            while len(answer) < 12 and (more := opened.recv(65536)):
                answer += more
        except (ConnectionError, TimeoutError):
            return 0
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def frozen_by(found: Iterator[Attack], caller: Caller, pid: int) -> tuple[list[str], dict[int, int], int]:
    """The requests during which `/healthz` waited three times out of three; the statuses; growth of memory in bytes."""
    frozen: list[str] = []
    statuses: dict[int, int] = {}
    with Watch(caller.port, pid) as watch:
        for attack in found:
            waits = []
            for _ in range(3):
                watch.longest_wait()
                status = sent(attack, caller)
                statuses[status] = statuses.get(status, 0) + 1
                assert status != 500, attack.what
                waits.append(watch.longest_wait())
                if waits[-1] < PROMISED:
                    break
            else:
                frozen.append(f"{attack.what}: {min(waits):.2f} s")
    return frozen, statuses, watch.most_memory - watch.start_memory
