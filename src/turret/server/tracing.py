"""Spans of requests for OpenTelemetry: the extra `turret[otel]`, and `turret serve --otel`. Loaded only then.

The spans go where OpenTelemetry's own variables say, such as OTEL_EXPORTER_OTLP_ENDPOINT. A span has no text of a
request. If the request names a trace (`traceparent`), its span belongs to that trace.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.errors import ServeRefused

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

KEPT = ("adapter", "receipt", "inputs", "tokens", "experiment", "arm")  # keys of the log's line about an answer


def provider() -> TracerProvider:
    """Where spans are sent from now on. Raises ServeRefused without the extra."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ServeRefused("--otel: OpenTelemetry is not installed: pip install 'turret[otel]'") from None
    named = "OTEL_SERVICE_NAME" in os.environ
    made = TracerProvider(resource=Resource.create({} if named else {"service.name": "turret"}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


class TraceMiddleware:
    """A span for each request, with its route, status and receipt.

    Args:
        provider: Of `provider()`.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self.app = app
        self.tracer = provider.get_tracer("turret")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        method = scope["method"] if len(scope["method"]) <= 10 else "OTHER"
        with self.tracer.start_as_current_span(method, context=extract(headers), kind=SpanKind.SERVER) as span:
            await self.app(scope, receive, sending)
            route = getattr(scope.get("route"), "path", None) or "unknown"
            state = scope.get("state", {})
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.request.method": method, "http.route": route})
            span.set_attributes({"http.response.status_code": 499 if state.get("left") else status})
            said = {"request": state.get("request_id"), **state.get("log_fields", {})}
            for key in ("request", *KEPT):
                if said.get(key) is not None:
                    span.set_attribute(f"turret.{key}", said[key])
            if status >= 500:
                span.set_status(StatusCode.ERROR)
