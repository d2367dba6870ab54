"""Every limit of a server: of connections, of a request with the middleware that enforces them, and quotas.

The middleware reads a body to its end before a route sees it. If a body is too large, the response is sent at once and
the rest of the body is read and dropped, so that the client gets to read the response.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.errors import Busy, Draining, QuotaSpent, ServeRefused, StoreError, TooLarge, TooSlow, WrongMediaType
from turret.server.error_responses import send_error
from turret.store.usage import Amount, Budgets
from turret.turns import Places

# --- paths ------------------------------------------------------------------------------------------------------------
# Which paths are pages of the console. Every other path belongs to the API.


# The first part of a page's path. Pages use a session cookie and forms, and answer in HTML.
MENU = ("adapters", "train", "runs", "comparisons", "playground", "panels", "experiments", "store")
PAGES = frozenset(("", *MENU, "sign-in", "sign-out", "static"))
UNSIGNED = frozenset(("sign-in", "static"))  # open without a session
INFER_PAGES = frozenset(("", "playground", "sign-out"))  # open to the scope infer; admin opens all pages


def first_segment(path: str) -> str:
    """`/adapters/news` -> `adapters`."""
    return path.lstrip("/").partition("/")[0]


def is_page(path: str) -> bool:
    return first_segment(path) in PAGES


# --- limits -----------------------------------------------------------------------------------------------------------


# Of the values in one request; the schemas enforce them.
MOST_INPUTS = 1024
MOST_CHOICES = 16  # n
MOST_TOKENS = 4096
MOST_MESSAGES = 256
MOST_LOGPROBS = 20  # alternatives for each token
MOST_STOPS = 4
MOST_BIASES = 1024  # tokens of logit_bias
MOST_SCHEMA = 64 << 10  # bytes of a JSON schema, and of any other constraint
MOST_TOOLS = 128 << 10  # bytes of all tools
MOST_TEXT = 1_000_000  # characters
MOST_OUTCOMES = 1000
MOST_UNIT = 1024  # characters

OPEN = ("/healthz", "/readyz")  # without a token, and without limits
JSON, FORM = "application/json", "application/x-www-form-urlencoded"  # the bodies of the API and of pages
TEXT_BODIES = ("/v1/", "/tokenize", "/detokenize", "/playground")
# The routes whose bodies have texts, tables or many questions: how their paths begin, and how they end.
LARGE_BODIES = (*TEXT_BODIES, "/api/outcomes", "/api/runs", "/api/studies", "/api/panels")
LARGE_ENDINGS = ("/gates",)  # with golden examples
# The routes whose bodies are files, which are not read before the route, and their type.
FILES, MULTIPART = ("/v1/files", "/train", "/playground/file"), "multipart/form-data"


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one server. Seconds are wall clock."""

    body_bytes: int = 4 << 20  # of one request with texts, tables or outcomes
    small_body_bytes: int = 64 << 10  # of any other request, and of the forms of pages
    tiny_body_bytes: int = 8 << 10  # of signing in and out, and of a request that has no body
    bodies_bytes: int = 64 << 20  # of all requests in flight
    file_bytes: int = 200 << 20  # of one file that is sent: a table, or one for a batch
    file_rate: int = 16 << 10  # bytes a second of such a file, at least, after `body_seconds`
    body_keys: int = 4096  # of all objects in a body
    body_values: int = 1 << 18  # of all lists and objects in a body
    body_seconds: float = 10.0  # until the last byte of a body
    header_seconds: float = 10.0  # until the last byte of the headers
    header_bytes: int = 32 << 10
    linger_seconds: float = 5.0  # reading the rest of a body that is too large
    write_seconds: float = 30.0  # until a client that does not read is disconnected
    answer_seconds: float = 300.0
    connections: int = 1024
    connections_per_client: int | None = 128  # half of in_flight, so that one client leaves room for others
    in_flight: int = 256  # requests that are being read or answered, without `uploads`
    uploads: int = 32  # files that are being sent
    control_waiting: int = 32  # operations of the control plane
    outcomes_waiting: int = 32  # requests with outcomes
    shadow_inputs: int = 16  # inputs that shadows work on; more are dropped
    drain_seconds: float = 60.0

    def body_bytes_of(self, method: str, path: str) -> int:
        """The most bytes of a body, by its route."""
        if method != "POST" or path in ("/sign-in", "/sign-out"):
            return min(self.tiny_body_bytes, self.body_bytes)
        if path.startswith(LARGE_BODIES) or path.endswith(LARGE_ENDINGS):
            return self.body_bytes
        known = path.startswith("/api/") or is_page(path)
        return min(self.small_body_bytes if known else self.tiny_body_bytes, self.body_bytes)


# --- connections ------------------------------------------------------------------------------------------------------
# The open connections of each client are counted, and those beyond a limit are refused.


Network = IPv4Network | IPv6Network
Peer = Sequence[str | int] | None  # an address of Python's sockets: (host, port, ...), or the path of a Unix socket
CLIENT_BITS = 64  # an IPv6 client is a network of this prefix length


def client_of(peer: Peer) -> str | None:
    """The client of a connection: an IPv4 address or an IPv6 /64 network; None for a Unix socket."""
    if not isinstance(peer, tuple | list):
        return None
    try:
        address = ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return None
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, CLIENT_BITS), strict=False))


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """The addresses and networks of `--proxy`. Raises ServeRefused."""
    found: list[Network] = []
    for text in texts:
        try:
            found.append(ip_network(text.strip(), strict=False))
        except ValueError:
            raise ServeRefused(
                f"--proxy {ascii(text)[:60]}: expected an address or a network such as 10.0.0.0/8"
            ) from None
    return tuple(found)


class ClientConnections:
    """The open connections.

    Args:
        limit: Of all connections.
        limit_per_client: Of the connections of one client; None for no limit.
        proxies: Networks without a limit per client, because their connections belong to many clients.
    """

    def __init__(self, limit: int, limit_per_client: int | None, proxies: Sequence[Network] = ()) -> None:
        self.limit, self.limit_per_client = limit, limit_per_client
        self.open = 0
        self.open_of: Counter[str] = Counter()
        self._proxies = proxies

    def limited_client(self, peer: Peer) -> str | None:
        """The client of a connection; None if it has no limit of its own."""
        client = client_of(peer) if self.limit_per_client is not None else None
        if client is None:
            return None
        address = ip_network(client).network_address
        return None if any(address in network for network in self._proxies) else client

    def enter(self, client: str | None) -> None:
        """Count one more connection. Raises Busy, and counts nothing, beyond a limit."""
        limit = self.limit_per_client
        if client is not None and limit is not None and self.open_of[client] >= limit:
            raise Busy(
                f"{limit} connections of {client} are open, which is the limit for one client: "
                "close some, or try again",
                1,
            )
        if self.open >= self.limit:
            raise Busy(f"{self.limit} connections are open: try again", 1)
        self.open += 1
        if client is not None:
            self.open_of[client] += 1

    def leave(self, client: str | None) -> None:
        """Count one connection less."""
        self.open -= 1
        subtract(self.open_of, client, 1)


def subtract(counts: Counter[str], key: str | None, count: int) -> None:
    """Lower the count of a key, and drop the key at zero."""
    if key is not None and key in counts:
        counts[key] -= count
        if counts[key] <= 0:
            del counts[key]


# --- requests ---------------------------------------------------------------------------------------------------------


class Load:
    """What is in flight now, by tenant. `draining` never goes back to False."""

    def __init__(self, limits: RequestLimits) -> None:
        self.answering, self.uploads = Places(limits.in_flight), Places(limits.uploads)
        self.bodies = Places(limits.bodies_bytes)  # bytes
        self.bytes_of: Counter[str] = Counter()  # of bodies, by client
        self.draining = False
        self._ends: deque[float] = deque(maxlen=32)  # when requests ended

    @property
    def requests(self) -> int:
        """Requests in flight, and files that are being sent."""
        return self.answering.taken + self.uploads.taken

    @property
    def bytes(self) -> int:
        """Bytes of bodies."""
        return self.bodies.taken

    def requests_of(self, tenant: str) -> int:
        """Those of one tenant."""
        return self.answering.of[tenant] + self.uploads.of[tenant]

    @contextmanager
    def place(self, places: Places, tenant: str) -> Iterator[None]:
        """Count a request for the length of the block. Raises Busy."""
        if not places.has_room(tenant):
            what = "files are being sent" if places is self.uploads else "requests are in flight"
            raise Busy(f"too many {what}: try again", self.seconds_until_room())
        places.take(tenant)
        try:
            yield
        finally:
            places.free(tenant)
            self._ends.append(time.monotonic())

    def seconds_until_room(self) -> float:
        """Seconds until one of the requests in flight ends, at the pace of the last ones."""
        return (time.monotonic() - self._ends[0]) / len(self._ends) if self._ends else 1.0


class LimitMiddleware:
    """Refuses requests beyond the limits, and passes on the others with their whole body."""

    def __init__(self, app: ASGIApp, limits: RequestLimits, load: Load, clients: ClientConnections) -> None:
        self.app = app
        self.limits = limits
        self.load = load
        self.clients = clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        tenant = _tenant(scope)
        uploads = scope["path"] in FILES and scope["method"] == "POST"
        places = self.load.uploads if uploads else self.load.answering
        client = self.clients.limited_client(scope.get("client"))
        most = self.limits.body_bytes_of(scope["method"], scope["path"])
        try:
            if self.load.draining:
                raise Draining("the server is shutting down: send the request to another one, or later")
            with self.load.place(places, tenant), closing(_Body(self.limits, most, self.load, client, tenant)) as body:
                passed = await self._check(scope, receive, send, None if uploads else body)
                if passed is not None:
                    await self.app(scope, passed, send)
        except (Busy, Draining) as error:
            await send_error(error, scope, receive, send)

    async def _check(self, scope: Scope, receive: Receive, send: Send, body: _Body | None) -> Receive | None:
        """What the route receives. None: the request was refused here, or the client has disconnected.

        Args:
            body: That is read whole; None for a file, which is larger, and which the route reads piece by piece.
        """
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            if body is None:
                _check_type(headers, MULTIPART)
                if _announces_more(headers, self.limits.file_bytes):
                    raise _too_large(self.limits)
                return _limit_upload(receive, self.limits)
            if await body.read(scope, headers, receive):
                return replay_body(bytes(body.content), receive)
        except TooLarge as error:
            await send_error(error, scope, receive, send, linger=self.limits.linger_seconds)
        except (TooSlow, WrongMediaType, Busy) as error:
            await send_error(error, scope, receive, send, close=True)
        return None


TAKE_BODIES = ("POST", "PUT", "PATCH", "DELETE")


class _Body:
    """The bytes of one request, counted until `close`.

    Args:
        most: Bytes of this body.
        client: The one whose share they count towards, if any.
        tenant: Whose request it is.
    """

    def __init__(self, limits: RequestLimits, most: int, load: Load, client: str | None, tenant: str) -> None:
        self.limits = limits
        self.most = most
        self.load = load
        self.client, self.tenant = client, tenant
        self.content = bytearray()

    async def read(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bool:
        """Whether the whole body came; else the client has disconnected."""
        if _announces_more(headers, self.most):
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    self._append(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise TooSlow(
                f"the body did not arrive within {self.limits.body_seconds:g} seconds: send it without pauses"
            ) from None
        # Other methods, and other ones than POST where files are sent, have no route: that is 405, whatever the body.
        if self.content and scope["method"] in TAKE_BODIES and scope["path"] not in FILES:
            _check_type(headers, FORM if is_page(scope["path"]) else JSON)
        return True

    def _append(self, piece: bytes) -> None:
        if len(self.content) + len(piece) > self.most:
            raise self._too_large()
        if not self.load.bodies.has_room(self.tenant, len(piece)):
            raise Busy("the bodies of other requests use all the memory for bodies: try again", 1)
        if self.client is not None:
            used = self.load.bytes_of[self.client]
            if used > len(self.content) and used + len(piece) > self.limits.bodies_bytes // 2:
                raise Busy(f"other bodies of {self.client} use all the memory for the bodies of one client", 1)
            self.load.bytes_of[self.client] += len(piece)
        self.content += piece
        self.load.bodies.take(self.tenant, len(piece))

    def _too_large(self) -> TooLarge:
        remedy = "send the inputs in several requests" if self.most == self.limits.body_bytes else "shorten it"
        return TooLarge(f"the body has more than {self.most} bytes: {remedy}")

    def close(self) -> None:
        self.load.bodies.free(self.tenant, len(self.content))
        subtract(self.load.bytes_of, self.client, len(self.content))
        self.content = bytearray()


def _announces_more(headers: dict[bytes, bytes], most: int) -> bool:
    length = headers.get(b"content-length", b"0")
    return length.isdigit() and (len(length) > 18 or int(length) > most)


def _check_type(headers: dict[bytes, bytes], expected: str) -> None:
    content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
    if content_type != expected:
        raise WrongMediaType(f"content-type is {ascii(content_type)[:60]}: expected {expected}")
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise WrongMediaType("the body has a content-encoding: send it without one")


def _too_large(limits: RequestLimits) -> TooLarge:
    return TooLarge(f"the file has more than {limits.file_bytes} bytes: send several files")


def _tenant(scope: Scope) -> str:
    """Whose request it is; empty for a visitor without a session."""
    caller = scope.get("state", {}).get("caller")
    return "" if caller is None else str(caller.access.tenant)


def _limit_upload(receive: Receive, limits: RequestLimits) -> Receive:
    """The pieces of a file. Raises TooLarge; and TooSlow if a piece does not come in time, or all come too slowly."""
    size, waited = 0, 0.0

    async def counted() -> Message:
        nonlocal size, waited
        began, left = time.monotonic(), limits.body_seconds + size / limits.file_rate - waited
        try:
            async with asyncio.timeout(min(limits.body_seconds, left)):
                message = await receive()
        except TimeoutError:
            if left < limits.body_seconds:
                raise TooSlow(
                    f"the file comes at less than {limits.file_rate} bytes a second: send it faster"
                ) from None
            raise TooSlow(
                f"no byte arrived for {limits.body_seconds:g} seconds: send the file without pauses"
            ) from None
        waited += time.monotonic() - began
        size += len(message.get("body", b""))
        if size > limits.file_bytes:
            raise _too_large(limits)
        return message

    return counted


def replay_body(content: bytes, receive: Receive) -> Receive:
    """The body as one message, then the messages that follow it, such as a disconnect."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay


# --- quotas -----------------------------------------------------------------------------------------------------------
# Quotas of requests and tokens per minute, as token buckets that refill evenly; shared by the servers of a store.
#
# A request takes one from the bucket of requests, and needs a positive balance in the bucket of tokens. The tokens of
# an answer are known only when it is ready. They are charged then, below zero if necessary; the next request waits
# until the balance is positive again.


MAX_KEYS = 4096  # above this, keys with full buckets are dropped


@dataclass(frozen=True)
class Quota:
    """Limits per minute; None for no limit."""

    requests: int | None = None
    tokens: int | None = None


class _Bucket:
    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self.at = now

    def fill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds until the bucket holds the amount."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)


class Quotas:
    """The buckets of every key in use."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, dict[str, _Bucket]] = {}

    def admit(self, key: str, owner: str, quota: Quota) -> None:
        """Take one request, or raise QuotaSpent and take nothing. owner: the key's name in the error."""
        buckets = self._fill_buckets(key, quota)
        for unit in ("requests", "tokens"):
            bucket = buckets.get(unit)
            if bucket is not None and (seconds := bucket.wait(1)) > 1e-9:
                raise QuotaSpent(
                    f"the quota of {owner} is spent: {bucket.per_minute} {unit} a minute; try again in {seconds:.0f} s",
                    retry_after=seconds,
                )
        if "requests" in buckets:
            buckets["requests"].level -= 1

    def charge(self, key: str, quota: Quota, tokens: int) -> None:
        """Take the tokens of an answer."""
        buckets = self._fill_buckets(key, quota)
        if "tokens" in buckets:
            buckets["tokens"].level -= tokens

    def give_back(self, key: str) -> None:
        """Return one request that was admitted and then refused."""
        if (bucket := self._buckets.get(key, {}).get("requests")) is not None:
            bucket.level = min(bucket.per_minute, bucket.level + 1)

    def set_tokens(self, key: str, quota: Quota, level: float) -> None:
        """Take over the level of tokens that all servers share."""
        if (bucket := self._fill_buckets(key, quota).get("tokens")) is not None:
            bucket.level = min(bucket.per_minute, level)

    def _fill_buckets(self, key: str, quota: Quota) -> dict[str, _Bucket]:
        now = self._clock()
        limits = {"requests": quota.requests, "tokens": quota.tokens}
        sizes = {unit: size for unit, size in limits.items() if size is not None}
        buckets = self._buckets.get(key, {})
        if {unit: bucket.per_minute for unit, bucket in buckets.items()} != sizes:
            buckets = {unit: _Bucket(size, now) for unit, size in sizes.items()}
        for bucket in buckets.values():
            bucket.fill(now)
        if buckets:
            self._buckets[key] = buckets
        if len(self._buckets) > MAX_KEYS:
            self._drop_full(now)
        return buckets

    def _drop_full(self, now: float) -> None:
        """Drop the keys whose buckets are full: a new key starts with full buckets too."""
        for key, buckets in list(self._buckets.items()):
            for bucket in buckets.values():
                bucket.fill(now)
            if all(bucket.level >= bucket.per_minute for bucket in buckets.values()):
                del self._buckets[key]


# --- shared quotas ----------------------------------------------------------------------------------------------------
# Quotas that all servers of a store share.
#
# A server counts alone first, so a flood of requests that are refused asks the catalog
# nothing. Then it takes the request from the catalog (`turret.store.usage`), in small batches. Tokens of answers are
# charged to the catalog twice a second, and once: a flush that is tried again has the same number. While the catalog
# does not answer, each server counts alone, and the log says so.


IDLE_SECONDS = 1.0  # after which an unused reservation is given back
LAST_TRIES = 3  # of the flush when a server ends
ALONE_SECONDS = 5.0  # after an error of the catalog, until it is asked again


@dataclass
class _Reserved:
    """Requests that this server may admit without asking the catalog."""

    per_minute: int
    count: int
    used: float  # when the last one was added or taken


class SharedQuotas:
    """The quotas of one server, which it shares with the others.

    `admit` and `charge` never block; `reserve` and `turn` ask the catalog, so they belong on other threads.

    Args:
        log: called with an error of the catalog.
    """

    def __init__(self, clock: Callable[[], float], budgets: Budgets, log: Callable[[StoreError], None]) -> None:
        self._clock, self._budgets, self._log = clock, budgets, log
        self._own, self._lock = Quotas(clock), threading.Lock()
        self._reserved: dict[str, _Reserved] = {}
        self._charges: dict[str, tuple[int, int]] = {}  # key -> limit per minute, tokens
        self._unsure, self._turning = list[Amount](), threading.Lock()  # of the flush that is tried
        self._levels: dict[str, float] = {}  # of tokens in the catalog, to be taken over by `admit`
        self._alone_until = float("-inf")

    def admit(self, key: str, owner: str, quota: Quota) -> bool:
        """Take one request. False: the catalog must be asked too, by `reserve`. Raises QuotaSpent."""
        with self._lock:
            level = self._levels.pop(key, None)
        if level is not None:
            self._own.set_tokens(key, quota, level)
        self._own.admit(key, owner, quota)
        if quota.requests is None or self._clock() < self._alone_until:
            return True
        with self._lock:
            found = self._reserved.get(key)
            if found is None or not found.count or found.per_minute != quota.requests:
                return False
            found.count, found.used = found.count - 1, self._clock()
            return True

    def reserve(self, key: str, owner: str, quota: Quota) -> None:
        """Take the request that `admit` did not find from the catalog. Raises QuotaSpent."""
        assert quota.requests is not None
        try:
            count, seconds = self._budgets.take(key, "requests", quota.requests)
        except StoreError as error:
            self._alone_until = self._clock() + ALONE_SECONDS
            self._log(error)
            return
        if not count:
            self._own.give_back(key)
            raise QuotaSpent(
                f"the quota of {owner} is spent: {quota.requests} requests a minute; try again in {seconds:.0f} s",
                retry_after=seconds,
            )
        with self._lock:
            found = self._reserved.setdefault(key, _Reserved(quota.requests, 0, 0.0))
            found.per_minute, found.count, found.used = quota.requests, found.count + count - 1, self._clock()

    def charge(self, key: str, quota: Quota, tokens: int) -> None:
        """Take the tokens of an answer."""
        self._own.charge(key, quota, tokens)
        if quota.tokens is not None:
            with self._lock:
                self._charges[key] = quota.tokens, self._charges.get(key, (0, 0))[1] + tokens

    def turn(self, *, last: bool = False) -> None:
        """Charge tokens to the catalog, and give back what was reserved and is not used.

        Raises StoreError; the next turn then tries the same amounts again first.
        """
        with self._turning:
            if self._unsure:
                self._write(self._budgets.writer.number)
            now = self._clock()
            with self._lock:
                charges, self._charges = self._charges, {}
                idle = {key: each for key, each in self._reserved.items() if last or now - each.used > IDLE_SECONDS}
                for key in idle:
                    del self._reserved[key]
            self._unsure = [(key, "tokens", limit, -float(tokens)) for key, (limit, tokens) in charges.items()]
            given_back = ((key, each) for key, each in idle.items() if each.count)
            self._unsure += [(key, "requests", each.per_minute, float(each.count)) for key, each in given_back]
            if self._unsure:
                self._write(self._budgets.writer.next())

    def _write(self, number: int) -> None:
        levels = self._budgets.change(self._unsure, number)
        self._unsure = []
        with self._lock:
            self._levels |= {key: level for (key, unit), level in levels.items() if unit == "tokens"}

    def close(self) -> None:
        """Write the last charges, and give everything back."""
        for _ in range(LAST_TRIES):
            with suppress(StoreError):
                self.turn(last=True)
                break
