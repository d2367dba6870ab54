"""Promises while the server answers: which answers abstain, a log of them, samples of the texts, and alarms.

The promises of a tenant are read when one has changed. A version that was never asked for is looked up before its first
answer is sent, so no answer slips past a promise while a new version follows an alias. A killed process loses the log
of its last second.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2
from sqlalchemy import Connection

from turret.audit import Mark
from turret.database import LONGEST_RECEIPT, Database
from turret.engine import SamplingParams
from turret.errors import EngineError, ServeRefused, TurretError, one_line
from turret.server.engines import Engines, Input, ServedBase
from turret.server.logs import Log
from turret.store import promises
from turret.store.promises import Alarm, LoggedAnswer, Promise
from turret.tasks import Task
from turret.tasks.shapes import Answer
from turret.tasks.tokens import Tokens
from turret.timestamp import timestamp
from turret.workspace.promising import embedded_text

MOST_KEPT = 100_000  # unwritten answers, while the store cannot be reached
MOST_KNOWN = 10_000  # versions


@dataclass(frozen=True)
class Covered:
    """A version's promise, and the task that its answers are of."""

    promise: Promise
    task: type[Task]
    watched: bool  # live texts are compared with its examples


class LivePromises:
    """The promises of one tenant. `turn` has a thread of its own; any thread calls the rest.

    Args:
        mark: Returns what differs after a change of a promise; without it they are read at every turn.
    """

    def __init__(
        self, database: Database, mark: Callable[[], Mark] | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database, self._mark, self._clock = database, mark, clock
        self._read_mark: Mark | None = None  # of the last read
        self._known: dict[str, Covered | None] = {}  # by the digest of a version
        self._unwritten: list[LoggedAnswer] = []
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self.lost = 0  # answers that were not logged

    @property
    def has_any(self) -> bool:
        """Whether the tenant had a promise at the last read."""
        return any(each is not None for each in self._known.values())

    def knows(self, digest: str) -> bool:
        """Whether `of` reads nothing."""
        return digest in self._known

    def of(self, digest: str) -> Covered | None:
        """The promise of a version; None without one. Reads the store for a version that is not known yet."""
        if digest not in self._known:
            with self._database.reading() as connection:
                found = promises.of_digest(connection, digest)
                self._known[digest] = None if found is None else _covered_promise(connection, found)
        return self._known[digest]

    def log_answers(self, covered: Covered, receipt: str, answers: Sequence[Answer]) -> list[bool]:
        """Whether each answer abstains; logs all of them.

        Args:
            receipt: the id of the request; each of several answers has `RECEIPT#0`, `RECEIPT#1` and so on.
        """
        promise, at = covered.promise, timestamp(self._clock())
        found, logged = [], list[LoggedAnswer]()
        for place, answer in enumerate(answers):
            abstains = promise.abstains(covered.task, answer)
            found.append(abstains)
            if (decision := covered.task.decision(answer)) is not None:
                own = (receipt if len(answers) == 1 else f"{receipt}#{place}")[:LONGEST_RECEIPT]
                logged.append(LoggedAnswer(promise.id, own, *decision, int(not abstains), at))
        with self._lock:
            room = max(MOST_KEPT - len(self._unwritten), 0)
            self._unwritten += logged[:room]
            self.lost += len(logged) - min(room, len(logged))
        return found

    def turn(self) -> None:
        """Write the log, and read the promises in force if one may have changed. Raises StoreError."""
        self.flush()
        mark = self._mark() if self._mark else None
        if mark is not None and mark == self._read_mark:
            return
        with self._database.reading() as connection:
            new = {each.digest: _covered_promise(connection, each) for each in promises.in_force(connection)}
        known = list(self._known) if len(self._known) < MOST_KNOWN else []
        self._known = {**{digest: new.get(digest) for digest in known}, **new}
        self._read_mark = mark

    def flush(self) -> None:
        """Write the log now. If that fails, the log is kept. Raises StoreError."""
        with self._writing:
            with self._lock:
                logged, self._unwritten = self._unwritten, []
            if not logged:
                return
            try:
                with self._database.writing() as connection:
                    promises.log(connection, logged)
            except BaseException:
                with self._lock:
                    self._unwritten = [*logged, *self._unwritten]
                raise


def _covered_promise(connection: Connection, promise: Promise) -> Covered:
    watch = promises.watch_of(connection, promise.id)
    return Covered(promise, promises.task_of(connection, promise), watch is not None and watch.drifted is None)


# --- input sampler ----------------------------------------------------------------------------------------------------
# Sample the texts that a promise covers, and embed them by the bare base, to notice that they have changed.
#
# Of all texts of a few seconds one is drawn at random, for each promise. It is embedded after all requests, and only if
# none waits. What fails is left out: a sample that is missing weakens the test, and does not mislead it.


SAMPLE_SECONDS = 5.0  # in which one text of a promise is drawn
PATIENCE = 10.0  # seconds until an embedding is given up
LOWEST_PRIORITY = -2  # below that of shadows and batches


@dataclass
class _Drawn:
    """One text at random of those that came since `since`."""

    since: float
    base: str  # its fingerprint
    texts: int = 0
    text: str | None = None


class InputSampler:
    """The samples of one tenant. `turn` has a thread of its own; any thread calls `offer`, which returns at once.

    Args:
        options: makes the settings of an embedding.
    """

    def __init__(
        self,
        database: Database,
        engines: Engines,
        options: Callable[..., SamplingParams],
        tenant: str,
        log: Log,
        clock: Callable[[], float],
        seconds: float | None = None,
    ) -> None:
        self._database, self._engines, self._options, self._tenant = database, engines, options, tenant
        self._log, self._clock, self._seconds = log, clock, SAMPLE_SECONDS if seconds is None else seconds
        self._random, self._lock = random.Random(), threading.Lock()
        self._drawn: dict[int, _Drawn] = {}  # by the id of a promise
        self._tokens: dict[str, Tokens] = {}  # by the fingerprint of a base
        self._unable = set[str]()  # fingerprints of bases that do not embed

    def offer(self, promise_id: int, base: str, inputs: Sequence[Input]) -> None:
        """Texts that a version with this promise has answered. base: the fingerprint of its base."""
        if base in self._unable or not inputs:
            return
        with self._lock:
            drawn = self._drawn.setdefault(promise_id, _Drawn(self._clock(), base))
            drawn.texts += len(inputs)
            if self._random.random() * drawn.texts < len(inputs):
                drawn.text = embedded_text(self._random.choice(inputs))

    def turn(self) -> None:
        """Embed and keep the texts that are due. Raises StoreError."""
        now = self._clock()
        with self._lock:
            due = {each: drawn for each, drawn in self._drawn.items() if now - drawn.since >= self._seconds}
        if not due or not self._database.writable():
            return
        for promise_id, drawn in due.items():
            base = self._engines.of(drawn.base)
            if base is not None and base.engine.stats().waiting:
                continue  # the text stays, or a later one takes its place
            with self._lock:
                del self._drawn[promise_id]
            if base is not None and drawn.text is not None:
                self._keep(promise_id, base, drawn.text)

    def _keep(self, promise_id: int, base: ServedBase, text: str) -> None:
        try:
            vector = self._embed_text(base, text)
        except (EngineError, TimeoutError):
            return
        except (TurretError, ValueError) as error:
            if base.fingerprint not in self._unable:
                message = f"input drift is not watched: {one_line(str(error))}"
                self._log.write("promise", "warning", base=base.name, message=message)
            self._unable.add(base.fingerprint)
            return
        with self._database.writing() as connection:
            promises.add_input(connection, promise_id, vector)

    def _embed_text(self, base: ServedBase, text: str) -> bytes:
        from turret.experiments.input_drift import MOST_TOKENS, pack_vectors  # loads numpy

        tokens = self._tokens.setdefault(base.fingerprint, Tokens(base.tokenizer))
        row = tokens.row(text, min(MOST_TOKENS, base.engine.longest))
        ticket = base.engine.submit(
            "embed", row, None, self._options(), priority=LOWEST_PRIORITY, deadline=PATIENCE, tenant=self._tenant
        )
        try:
            return pack_vectors([ticket.result(timeout=PATIENCE + 1)["embedding"]])[0]
        finally:
            ticket.cancel()


# --- alarms -----------------------------------------------------------------------------------------------------------
# Send alarms to a program of the operator: `turret serve --alarm-url`.
#
# One server of a store sends. An alarm that was delivered is recorded after that, so a kill in between sends it again:
# it is delivered at least once, and its `id` stays the same.


ALARM_SECONDS = 5.0  # until a receiver has answered
PAUSES = (1.0, 4.0)  # before the second and the third try
AGAIN_SECONDS = 60.0  # until an alarm that could not be delivered is tried again
SIGNATURE = "turret-signature"


@dataclass(frozen=True)
class AlarmSettings:
    """Where alarms are sent. Raises ServeRefused.

    Args:
        url: http or https; without a user and a password, which other users of the machine could read.
        secret: signs each alarm, so that a receiver knows who sent it.
    """

    url: str
    secret: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid:
            raise ServeRefused(f"--alarm-url {ascii(self.url)[:80]}: expected a URL such as https://example.com/alarms")
        if parts.username is not None or parts.password is not None:
            raise ServeRefused("--alarm-url has a user or a password: leave it out, and set TURRET_ALARM_SECRET")

    @property
    def place(self) -> str:
        """Scheme and host. The path may be a secret, so the log does not have it."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def headers(self, body: bytes) -> dict[str, str]:
        """The headers of an alarm, with `HMAC-SHA256(secret, body)` in hex if there is a secret."""
        found = {"content-type": "application/json"}
        if self.secret is not None:
            found[SIGNATURE] = "sha256=" + hmac.new(self.secret.encode(), body, hashlib.sha256).hexdigest()
        return found


class AlarmSender:
    """Sends the alarms of a store to one URL. `turn` has a thread of its own.

    Args:
        database: opened for the operator.
        settings: None sends nothing.
        mark: returns what differs after something that there may be an alarm for.
    """

    def __init__(
        self,
        database: Database,
        settings: AlarmSettings | None,
        mark: Callable[[], Sequence[Mark]],
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._settings, self._mark, self._log, self._clock = database, settings, mark, log, clock
        self._closed = threading.Event()
        self._known: Sequence[Mark] | None = None  # all alarms up to here were sent, or tried
        self._again = float("inf")
        self.sent = self.failed = 0  # alarms, and tries that failed
        self.waiting = 0

    def turn(self, *, leads: bool) -> None:
        """Send what was not sent. Raises StoreError.

        Args:
            leads: whether this server sends; another one does otherwise.
        """
        if self._settings is None or not leads:
            self._known, self.waiting = None, 0
            return
        mark = self._mark()
        if mark == self._known and self._clock() < self._again:
            return
        with self._database.reading() as connection:
            found = promises.unsent_alarms(connection)
        self.waiting = len(found)
        for alarm in found:
            if self._deliver(self._settings, alarm):
                with self._database.writing() as connection:
                    promises.mark_sent(connection, alarm)
                self.waiting -= 1
            if self._closed.is_set():
                return
        self._known, self._again = mark, self._clock() + AGAIN_SECONDS if self.waiting else float("inf")

    @property
    def figures(self) -> dict[str, float]:
        """For `/metrics`."""
        return {"alarms_sent": self.sent, "alarms_failed": self.failed, "alarms_waiting": self.waiting}

    def close(self) -> None:
        """Try no more. What was not sent is sent by the next server."""
        self._closed.set()

    def _deliver(self, to: AlarmSettings, alarm: Alarm) -> bool:
        """Whether the receiver took it, after three tries."""
        problem = ""
        for pause in (*PAUSES, 0.0):
            try:
                asyncio.run(_post(to, json.dumps(alarm.as_json()).encode()))
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, TimeoutError, ValueError) as error:
                problem = one_line(str(error)) or f"no answer within {ALARM_SECONDS:g} seconds"
                self.failed += 1
            else:
                self.sent += 1
                self._say(to, alarm, "info", "delivered")
                return True
            if self._closed.wait(pause):
                break
        self._say(to, alarm, "error", f"not delivered: {problem}; it is tried again for a day")
        return False

    def _say(self, to: AlarmSettings, alarm: Alarm, level: str, message: str) -> None:
        about = {"version": alarm.version, "experiment": alarm.experiment, "to": to.place}
        self._log.write("alarm", level, kind=alarm.kind, message=message, **about)


async def _post(to: AlarmSettings, body: bytes) -> None:
    """Send an alarm once. Raises an error unless the answer is 2xx within `SECONDS`. Follows no redirect."""
    async with (
        asyncio.timeout(ALARM_SECONDS),
        httpx2.AsyncClient(timeout=ALARM_SECONDS) as client,
        client.stream("POST", to.url, content=body, headers=to.headers(body)) as answer,
    ):
        if not answer.is_success:
            raise ValueError(f"the receiver answered {answer.status_code}, expected 2xx")
