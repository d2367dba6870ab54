"""The server's log: a JSON object per line, without texts of requests and without tokens."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.errors import ServeRefused, require_package
from turret.json_types import JsonValue
from turret.server.error_responses import send_error
from turret.timestamp import timestamp

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


# --- tracing ----------------------------------------------------------------------------------------------------------
# Spans of requests for OpenTelemetry: the extra `turret[otel]`, and `turret serve --otel`. Loaded only then.
#
# The spans go where OpenTelemetry's own variables say, such as OTEL_EXPORTER_OTLP_ENDPOINT. A span has no text of a
# request. If the request names a trace (`traceparent`), its span belongs to that trace.


# Keys of the log's line about an answer.
KEPT = ("adapter", "adapters", "receipt", "inputs", "tokens", "experiment", "arm")


def provider() -> TracerProvider:
    """Where spans are sent from now on. Raises ServeRefused without the extra."""
    with require_package("--otel", "OpenTelemetry", "pip install 'turret[otel]'", ServeRefused):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    named = "OTEL_SERVICE_NAME" in os.environ
    made = TracerProvider(resource=Resource.create({} if named else {"service.name": "turret"}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


class TraceMiddleware:
    """A span for each request, with its route, status and receipt, around a `LogMiddleware`.

    Args:
        provider: Of `provider()`.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self.app = app
        self.tracer = provider.get_tracer("turret")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        method = scope["method"] if len(scope["method"]) <= 10 else "OTHER"
        with self.tracer.start_as_current_span(method, context=extract(headers), kind=SpanKind.SERVER) as span:
            await self.app(scope, receive, send)
            route = getattr(scope.get("route"), "path", None) or "unknown"
            state = scope["state"]
            status = state["status"]
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.request.method": method, "http.route": route})
            span.set_attributes({"http.response.status_code": 499 if state.get("left") else status})
            said = {"request": state.get("request_id"), **state.get("log_fields", {})}
            for key in ("request", *KEPT):
                if said.get(key) is not None:
                    span.set_attribute(f"turret.{key}", said[key])
            if status >= 500:
                span.set_status(StatusCode.ERROR)


# --- logs -------------------------------------------------------------------------------------------------------------


class Log:
    """Writes whole lines from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def write(self, event: str, level: str = "info", **fields: JsonValue) -> None:
        """Write one line. Fields that are None are left out."""
        time = timestamp(datetime.now(UTC))
        known = {key: value for key, value in fields.items() if value is not None}
        line = json.dumps({"time": time, "level": level, "event": event, **known}, ensure_ascii=True, default=str)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()

    def bug(self, error: BaseException, **fields: JsonValue) -> None:
        """Write where a bug happened, without the error's text, which may repeat a text of a request."""
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        self.write("bug", "error", error=type(error).__name__, where=where, **fields)


class LibraryHandler(logging.Handler):
    """Writes the warnings and errors of libraries to the log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        bug = record.exc_info[1] if record.exc_info else getattr(record, "bug", None)
        if bug is not None:
            self._log.bug(bug, logger=record.name)
        else:
            self._log.write("library", record.levelname.lower(), logger=record.name, message=record.getMessage())


class LogMiddleware:
    """Gives each request an id, writes a line when it ends, and answers a bug with status 500.

    Args:
        observe: Called with route, status and seconds of each request.
    """

    def __init__(
        self, app: ASGIApp, log: Log, observe: Callable[[str, int, float], None], clock: Callable[[], float]
    ) -> None:
        self.app = app
        self.log = log
        self.observe = observe
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = self.clock(), 0
        request_id = "req-" + secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            self.log.bug(error, request=request_id)
            if not status:
                await send_error(error, scope, receive, send_with_id)
        finally:
            scope["state"]["status"] = status
            self._write(scope, status or 499, self.clock() - started)

    def _write(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unknown"
        if scope["path"] in ("/healthz", "/readyz") and status == 200:
            return
        request_state = scope["state"]
        caller = request_state.get("caller")
        if request_state.get("left") and status < 400:  # a stream had begun
            status = 499
        self.observe(route, status, seconds)
        self.log.write(
            "request",
            "error" if status >= 500 else "info",
            request=request_state["request_id"],
            method=scope["method"] if len(scope["method"]) <= 10 else "OTHER",
            route=route,
            status=status,
            seconds=round(seconds, 4),
            token=getattr(caller, "name", None),
            tenant=getattr(caller, "tenant", None),
            **request_state.get("log_fields", {}),
        )
