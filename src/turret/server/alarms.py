"""Send alarms to a program of the operator: `turret serve --alarm-url`.

One server of a store sends. An alarm that was delivered is recorded after that, so a kill in between sends it again:
it is delivered at least once, and its `id` stays the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2

from turret.audit import Mark
from turret.database import Database
from turret.errors import ServeRefused, one_line
from turret.server.logs import Log
from turret.store import alarms
from turret.store.alarms import Alarm

SECONDS = 5.0  # until a receiver has answered
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
            found = alarms.unsent(connection)
        self.waiting = len(found)
        for alarm in found:
            if self._deliver(self._settings, alarm):
                with self._database.writing() as connection:
                    alarms.mark_sent(connection, alarm)
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
                problem = one_line(str(error)) or f"no answer within {SECONDS:g} seconds"
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
        asyncio.timeout(SECONDS),
        httpx2.AsyncClient(timeout=SECONDS) as client,
        client.stream("POST", to.url, content=body, headers=to.headers(body)) as answer,
    ):
        if not answer.is_success:
            raise ValueError(f"the receiver answered {answer.status_code}, expected 2xx")
