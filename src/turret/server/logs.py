"""What the server says about itself: a JSON object a line. Texts of requests and tokens are not in it.

`Logged` is the outermost door: it gives each request an id, writes one line when it is over, and turns a bug into one
answer. Refuses to know routes.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.server.error_responses import problem

Watch = Callable[[str, int, float], None]  # route, status, seconds


class Log:
    """One JSON object a line, whole, whichever thread speaks."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def say(self, event: str, level: str = "info", **said: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        kept = {key: value for key, value in said.items() if value is not None}
        line = json.dumps({"time": time, "level": level, "event": event, **kept}, ensure_ascii=True, default=str)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()

    def bug(self, error: BaseException, **said: Any) -> None:
        """Where it happened, and nothing of what was being said: an error's words may hold a text."""
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        self.say("bug", "error", error=type(error).__name__, where=where, **said)


class Forwarded(logging.Handler):
    """What libraries log, as lines of the same log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._log.bug(record.exc_info[1], logger=record.name)
        else:
            self._log.say("library", record.levelname.lower(), logger=record.name, message=record.getMessage())


class Logged:
    """An ASGI application with a line a request. watch: told route, status and seconds of each."""

    def __init__(self, app: ASGIApp, log: Log, watch: Watch, clock: Callable[[], float]) -> None:
        self.app = app
        self.log = log
        self.watch = watch
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = self.clock(), 0
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = "req-" + secrets.token_hex(12)

        async def heard(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, heard)
        except Exception as error:
            self.log.bug(error, request=request_id)
            if not status:
                await _sorry(error, heard)
        finally:
            self._tell(scope, state, status or 499, self.clock() - started)

    def _tell(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unknown"
        if scope["path"] in ("/healthz", "/readyz") and status == 200:
            return
        asker = state.get("asker")
        self.watch(route, status, seconds)
        self.log.say(
            "request",
            "error" if status >= 500 else "info",
            request=state["request_id"],
            method=scope["method"] if len(scope["method"]) <= 10 else "OTHER",
            route=route,
            status=status,
            seconds=round(seconds, 4),
            token=getattr(asker, "name", None),
            **state.get("told", {}),
        )


async def _sorry(error: Exception, send: Send) -> None:
    told = problem(error)
    raw = [(name.encode(), value.encode()) for name, value in told.headers.items()]
    await send({"type": "http.response.start", "status": told.status, "headers": raw})
    await send({"type": "http.response.body", "body": told.encoded(), "more_body": False})
