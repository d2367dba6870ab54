"""How much is taken from outside: every limit in one place, and the door that holds requests to them.

The door (`Bounded`) reads a body to its end before anything looks at it: within the bytes, within the seconds, while
there is room. What is too large is answered at once and the rest read off, so that the client comes to hear the answer.
Refuses to know what a request means.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.errors import Busy, Draining, TooLarge, TooSlow, WrongMediaType
from turret.server.connections import ClientConnections, take
from turret.server.error_responses import answer
from turret.server.paths import is_page

# Of what one request may say; they stand in the schemas.
MOST_INPUTS = 1024
MOST_CHOICES = 16  # n
MOST_TOKENS = 4096
MOST_MESSAGES = 256
MOST_LOGPROBS = 20  # alternatives told beside a token
MOST_STOPS = 4
MOST_TEXT = 1_000_000  # characters
MOST_OUTCOMES = 1000
MOST_UNIT = 1024  # characters

OPEN = ("/healthz", "/readyz")  # answered whatever happens
JSON, FORM = "application/json", "application/x-www-form-urlencoded"  # the body of the API, and of a page


@dataclass(frozen=True)
class RequestLimits:
    """Of one server. Seconds are wall clock."""

    body_bytes: int = 4 << 20  # of one request
    bodies_bytes: int = 64 << 20  # of all requests that are being read or answered
    body_keys: int = 4096  # of all objects in a body
    body_values: int = 1 << 18  # of all lists and objects in a body
    body_seconds: float = 10.0  # until the last byte of a body
    header_seconds: float = 10.0  # until the last byte of the headers
    header_bytes: int = 32 << 10
    linger_seconds: float = 5.0  # reading off what is too large
    write_seconds: float = 30.0  # until a client that does not read is given up
    answer_seconds: float = 300.0
    connections: int = 1024
    connections_per_client: int | None = 128  # half of in_flight, so that one client leaves room for others
    in_flight: int = 256  # requests being read or answered
    control_waiting: int = 32  # verbs of the control plane that wait for a thread
    outcomes_waiting: int = 32  # requests that tell outcomes, at a time
    shadow_inputs: int = 16  # that shadows work on at a time; beyond it they are shed
    drain_seconds: float = 60.0


class Load:
    """What is in flight now. `draining` is set once and for all."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0  # of bodies
        self.bytes_of: Counter[str] = Counter()  # of these, by client
        self.draining = False


class Bounded:
    """An ASGI application behind its limits."""

    def __init__(self, app: ASGIApp, limits: RequestLimits, load: Load, clients: ClientConnections) -> None:
        self.app = app
        self.limits = limits
        self.load = load
        self.clients = clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        if self.load.draining:
            await answer(Draining("the server is going down: ask another, or later"), scope, receive, send)
            return
        if self.load.requests >= self.limits.in_flight:
            await answer(Busy(f"{self.load.requests} requests are in flight: try again", 1), scope, receive, send)
            return
        self.load.requests += 1
        body = _Body(self.limits, self.load, self.clients.limited(scope.get("client")))
        try:
            await self._pass(scope, receive, send, body)
        finally:
            self.load.requests -= 1
            body.close()

    async def _pass(self, scope: Scope, receive: Receive, send: Send, body: _Body) -> None:
        try:
            content = await body.read(scope, receive)
        except TooLarge as error:
            await answer(error, scope, receive, send, linger=self.limits.linger_seconds)
            return
        except (TooSlow, WrongMediaType, Busy) as error:
            await answer(error, scope, receive, send, close=True)
            return
        if content is not None:  # None: the client went away
            await self.app(scope, _replayed(content, receive), send)


class _Body:
    """The bytes of one request, counted while they are held. client: for whom they count too."""

    def __init__(self, limits: RequestLimits, load: Load, client: str | None) -> None:
        self.limits = limits
        self.load = load
        self.client = client
        self.content = bytearray()

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self.limits.body_bytes):
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    self._take(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise TooSlow(
                f"the body was not there after {self.limits.body_seconds:g} seconds: send it in one go"
            ) from None
        if self.content:
            _check_type(headers, FORM if is_page(scope["path"]) else JSON)
        return bytes(self.content)

    def _take(self, piece: bytes) -> None:
        if len(self.content) + len(piece) > self.limits.body_bytes:
            raise self._too_large()
        if self.load.bytes + len(piece) > self.limits.bodies_bytes:
            raise Busy("the bodies of other requests take all the memory that is meant for them: try again", 1)
        if self.client is not None:
            held = self.load.bytes_of[self.client]
            if held > len(self.content) and held + len(piece) > self.limits.bodies_bytes // 2:
                raise Busy(f"other bodies of {self.client} take all the memory that is meant for one client", 1)
            self.load.bytes_of[self.client] += len(piece)
        self.content += piece
        self.load.bytes += len(piece)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body has more than {self.limits.body_bytes} bytes: send the inputs in several requests")

    def close(self) -> None:
        self.load.bytes -= len(self.content)
        take(self.load.bytes_of, self.client, len(self.content))
        self.content = bytearray()


def _check_type(headers: dict[bytes, bytes], wanted: str) -> None:
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
    if kind != wanted:
        raise WrongMediaType(f"content-type is {ascii(kind)[:60]}: expected {wanted}")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise WrongMediaType("the body is encoded: expected it as it is, without content-encoding")


def _replayed(content: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever comes after it: the client going away."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay
