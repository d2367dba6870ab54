"""Alarms: a real receiver is told once of a promise that broke, also if it was down, hung or was restarted."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from server.conftest import Running
from server.patience import until
from server.test_promises import TEXTS, classify, promised, tell
from typer.testing import CliRunner

from turret import audit
from turret.cli.main import app
from turret.errors import ServeRefused
from turret.experiments import Guards
from turret.server import live_promises
from turret.server.live_promises import SIGNATURE, AlarmSettings
from turret.store import promises
from turret.store.promises import ALARM_KINDS
from turret.workspace import Workspace


class Receiver:
    """An HTTP server that keeps what it is sent. status: of its answers; hang: seconds before each."""

    def __init__(self, port: int = 0, status: int = 204, hang: float = 0.0, where: str | None = None) -> None:
        self.got: list[tuple[dict[str, Any], dict[str, str], bytes]] = []
        self.status, self.hang = status, hang
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append((json.loads(body), {key.lower(): each for key, each in self.headers.items()}, body))
                time.sleep(receiver.hang)
                self.send_response(receiver.status)
                if where is not None:
                    self.send_header("location", where)
                self.end_headers()

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/alarms/secret-path"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_promises, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(live_promises, "ALARM_SECONDS", 0.5)
    monkeypatch.setattr(live_promises, "AGAIN_SECONDS", 0.2)


def break_promise(running: Running, **changes: Any) -> Any:
    """A promise of a@1 that its outcomes break."""
    version = running.workspace.resolve("a@1")
    promise = promised(running.workspace, version, threshold=0.0, **changes)
    running.view.refresh()
    receipt = classify(running.client(), TEXTS, "a@1").headers["turret-receipt"]
    assert tell(running.client(), [(f"{receipt}#{number}", 0) for number in range(40)]) == ["counted"] * 40
    return promise


def sent(workspace: Workspace) -> int:
    with workspace.store.database().reading() as connection:
        return len(connection.execute(promises.alarms.select()).all())


@pytest.mark.slow
def test_a_broken_promise_is_told_once_with_two_servers_on_one_store(workspace, put, serve, receiver) -> None:
    put("a")
    running = [serve(alarm=AlarmSettings(receiver.url)) for _ in range(2)]
    break_promise(running[0])
    until(lambda: sent(workspace) == 1, 20)
    time.sleep(2 * 0.5 + 0.2)  # both servers have looked again
    (told, headers, _), *more = receiver.got
    assert more == []
    assert (told["kind"], told["tenant"], told["version"]) == ("promise broken", "default", "a@1")
    assert told["promise"] == "at most 5% wrong among what it decides, at 95% confidence"
    assert "40 of 40 outcomes are wrong" in told["why"]
    assert told["did"] == "nothing but this alarm"
    assert told["experiment"] is None
    assert told["at"] <= time.strftime("%Y-%m-%dT%H:%M:%S~", time.gmtime())
    assert SIGNATURE not in headers
    with workspace.store.database().reading() as connection:
        assert audit.read_actions(connection)[0].verb == told["kind"]
    figures = "".join(each.client().get("/metrics").text for each in running)
    assert figures.count("turret_alarms_sent 1.0") == 1
    assert figures.count("turret_alarms_waiting 0.0") == 2


@pytest.mark.slow
def test_a_receiver_that_is_down_is_told_when_it_is_up(workspace, put, serve) -> None:
    put("a")
    first = Receiver()
    first.close()  # nobody listens at its port
    running = serve(alarm=AlarmSettings(first.url))
    break_promise(running)
    client = running.client()
    until(lambda: "turret_alarms_failed 3.0" in client.get("/metrics").text, 20)
    assert "turret_alarms_waiting 1.0" in running.client().get("/metrics").text
    assert classify(running.client(), "x", "a@1").is_success
    second = Receiver(first.port)
    try:
        until(lambda: sent(workspace) == 1)
        assert len(second.got) == 1
    finally:
        second.close()
    lines = [each for each in running.log() if each["event"] == "alarm"]
    assert lines[0]["level"] == "error"
    assert "not delivered" in lines[0]["message"]
    assert lines[-1]["message"] == "delivered"
    assert "secret-path" not in running.lines.getvalue(), "the path of the URL may be a secret"


@pytest.mark.slow
def test_a_receiver_that_hangs_delays_no_request(workspace, put, serve) -> None:
    put("a")
    slow = Receiver(hang=60)
    running = serve(alarm=AlarmSettings(slow.url))
    break_promise(running)
    until(lambda: slow.got, 20)
    started = time.monotonic()
    for _ in range(20):
        classify(running.client(), "x", "a@1")
    assert time.monotonic() - started < 5
    until(lambda: any("no answer within 0.5 seconds" in each.get("message", "") for each in running.log()))
    assert sent(workspace) == 0
    slow.hang = 0
    until(lambda: sent(workspace) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("status", [302, 500])
def test_an_answer_that_is_no_success_is_no_delivery_and_no_redirect_is_followed(
    workspace, put, serve, receiver, status
) -> None:
    put("a")
    other = Receiver(status=status, where=receiver.url)
    running = serve(alarm=AlarmSettings(other.url))
    break_promise(running)
    until(lambda: len(other.got) >= 3, 20)
    assert (receiver.got, sent(workspace)) == ([], 0)
    until(lambda: any(f"answered {status}" in each.get("message", "") for each in running.log()))
    assert len({told["id"] for told, _, _ in other.got}) == 1, "an alarm keeps its id"
    other.close()


def signed(secret: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


@pytest.mark.slow
def test_an_alarm_is_signed_with_the_secret(put, serve, receiver) -> None:
    put("a")
    break_promise(serve(alarm=AlarmSettings(receiver.url, "mellon")))
    until(lambda: receiver.got, 20)
    _, headers, body = receiver.got[0]
    assert headers[SIGNATURE] == signed("mellon", body)
    assert headers[SIGNATURE] != signed("friend", body), "the control: another secret"
    assert headers[SIGNATURE] != signed("mellon", body.replace(b"a@1", b"b@1")), "the control: another body"


def test_a_break_that_the_command_line_recorded_is_told_by_the_next_server(
    workspace, put, serve, receiver, monkeypatch
) -> None:
    monkeypatch.setattr(live_promises, "ALARM_SECONDS", 20)  # an alarm whose answer comes too late is told again
    put("a")
    running = serve()  # without alarms
    break_promise(running)
    client = running.client()
    until(lambda: "turret_promise_breaks" in client.get("/metrics").text, 20)
    assert any(each.done for each in workspace.settle_promises()) or workspace.promise("a@1").promise.broken
    running.stop()
    assert (receiver.got, sent(workspace)) == ([], 0)
    serve(alarm=AlarmSettings(receiver.url))
    until(lambda: sent(workspace) == 1)
    assert [told["kind"] for told, _, _ in receiver.got] == ["promise broken"]


def test_what_happened_a_day_ago_is_told_no_more(workspace, put, monkeypatch) -> None:
    version = put("a")
    with workspace.store.database().writing() as connection:
        for day, what in (("2020-01-01", "a@1"), ("2999-01-01", "a@2")):
            audit.record(
                connection, ALARM_KINDS[0], what, "a", at=f"{day}T00:00:00.000000Z", who=None, after={"why": "x"}
            )
        audit.record(connection, "promote", str(version), "a", at="2999-01-01T00:00:00.000000Z", who=None)
    with workspace.store.database().writing() as connection:
        (found,) = promises.unsent_alarms(connection)
        assert found.version == "a@2"
        promises.mark_sent(connection, found)
        promises.mark_sent(connection, found)  # another server did so too
        assert promises.unsent_alarms(connection) == []


@pytest.mark.slow
def test_an_arm_that_a_guard_drops_is_told(begin, workspace, receiver) -> None:
    settings = {"alarm": AlarmSettings(receiver.url)}
    running = begin(share=0.5, guards=Guards(max_errors=0.02), engine=settings)
    running.engine.broken.add("a@2")
    running.engine.unload("a@2")
    for number in range(60):
        running.client().post("/v1/classify", json={"model": "a", "input": "x", "user": f"u{number}"})
    until(lambda: receiver.got, 20)
    told = receiver.got[0][0]
    assert (told["kind"], told["version"], told["experiment"]) == ("experiment drop", "a@2", "a#1")
    assert (told["promise"], told["did"]) == (None, "candidate (a@2) rolled back")
    assert told["why"]


@pytest.mark.parametrize("url", ["example.com", "ftp://example.com", "file:///etc/passwd", "http://", "http://[::1"])
def test_only_http_is_taken(url) -> None:
    AlarmSettings("https://example.com:8443/x")  # the control
    with pytest.raises(ServeRefused, match=r"--alarm-url .*: expected a URL such as"):
        AlarmSettings(url)


def test_a_secret_in_the_url_is_refused_and_the_command_line_checks_first(tmp_path) -> None:
    words = ["serve", "--store", str(tmp_path), "--alarm-url", "https://me:mellon@example.com"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code != 0
    assert isinstance(found.exception, ServeRefused)
    assert "TURRET_ALARM_SECRET" in str(found.exception)
    assert "mellon" not in str(found.exception)


def test_the_secret_is_not_shown() -> None:
    assert "mellon" not in repr(AlarmSettings("https://example.com", "mellon"))
