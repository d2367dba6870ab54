"""`turret serve --otel`: a span of each request, as a collector receives it."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from server.echo import LABELS
from server.test_decisions import choice

from turret.errors import ServeRefused
from turret.server import logs

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch):
    """The spans that a collector of OTLP over HTTP has received."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    received: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            sent = service.ExportTraceServiceRequest.FromString(body)
            received.extend(span for of in sent.resource_spans for each in of.scope_spans for span in each.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield received
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_collector_receives_a_span_of_each_request_without_its_text(collector, serve, put, until) -> None:
    put()
    client = serve(otel=True).client()
    body = {"model": "a", "input": "my secret"}
    client.post("/v1/classify", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    client.post("/v1/classify", json={"model": "nobody", "input": "my secret"})
    until(lambda: len(collector) == 2)
    answered, missing = collector
    said = {each.key: each.value.string_value or each.value.int_value for each in answered.attributes}
    assert (answered.name, said["http.response.status_code"]) == ("POST /v1/classify", 200)
    assert (said["turret.adapter"], said["turret.inputs"]) == ("a@1", 1)
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (TRACE, PARENT)
    assert missing.trace_id.hex() != TRACE
    assert "secret" not in str(collector)


def test_the_span_of_a_decision_names_every_version_and_no_text(collector, serve, put, until) -> None:
    put()
    put("b")
    client = serve(otel=True).client()
    asked = [choice(name, *LABELS) for name in "ab"]
    client.post("/api/panels", json={"name": "both", "questions": [{"name": n, "reference": n} for n in "ab"]})
    until(lambda: len(collector) == 1)
    body = {"model": "both", "input": "my secret", "questions": asked}
    got = client.post("/v1/decisions", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert got.status_code == 200, got.text
    until(lambda: len(collector) == 2)
    (answered,) = (each for each in collector if each.name == "POST /v1/decisions")
    said = {each.key: each.value for each in answered.attributes}
    assert [each.string_value for each in said["turret.adapters"].array_value.values] == ["a@1", "b@1"]
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (TRACE, PARENT)
    assert "secret" not in str(collector)


def test_without_the_extra_the_server_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ServeRefused, match=r"pip install 'turret\[otel\]'"):
        logs.provider()
