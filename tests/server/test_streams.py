"""Streams end properly: read, left by the client, ended by an error, or drained with the server."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time

import httpx2
import pytest
from server.echo import SamplingParams, words

from turret.errors import AdapterError
from turret.server.limits import RequestLimits
from turret.server.questions import CHARACTERS_PER_TOKEN

LONG = " ".join(f"w{number}" for number in range(200))
BODY = {"model": "a", "prompt": LONG, "max_tokens": 200, "stream": True}


def test_a_client_that_goes_away_in_the_middle_of_a_stream_frees_its_request(serve, put, until) -> None:
    put()
    running = serve(pace=0.02)
    with running.client().stream("POST", "/v1/completions", json=BODY) as got:
        lines = got.iter_lines()  # a reference: without one the stream closes
        assert next(lines).startswith("data: ")
        assert running.engine.cancelled == []
    until(lambda: running.engine.cancelled == [got.headers["turret-receipt"].partition("-")[2]], seconds=3)
    until(lambda: running.served.load.requests == 0)
    until(lambda: [each for each in running.log() if each["event"] == "request"])
    line = next(each for each in running.log() if each["event"] == "request")
    assert line["adapter"] == "a@1"
    guess = len(LONG) // CHARACTERS_PER_TOKEN + 1  # of the prompt, which the engine has not counted yet
    assert guess < line["tokens"] < guess + 150  # the pieces are counted, though the client left before the end


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_its_first_word_frees_its_request(serve, put, until, stream) -> None:
    put()
    running = serve(pace=0.5)
    with httpx2.Client(base_url=running.url, timeout=0.2) as client, pytest.raises(httpx2.ReadTimeout):
        client.post("/v1/completions", json={"model": "a", "prompt": [LONG] * 3, "stream": stream})
    until(lambda: running.served.load.requests == 0, seconds=3)
    until(lambda: len(running.engine.cancelled) == 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_is_given_up_and_others_go_on(serve, put, until, stream) -> None:
    put()
    running = serve(limits=RequestLimits(write_seconds=0.3, body_bytes=32 << 20))
    body = json.dumps({"model": "a", "prompt": ["x" * 900_000] * 20, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as lazy:
        lazy.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        until(lambda: running.served.load.requests == 1)
        until(lambda: running.served.load.requests == 0, seconds=20)
        until(lambda: len(running.server.server_state.connections) == 0, seconds=20)
    assert running.client().post("/v1/completions", json={"model": "a", "prompt": "x"}).status_code == 200
    assert not [line for line in running.log() if line["event"] == "bug"]


def test_an_error_before_the_first_word_has_a_status_and_one_after_it_is_an_event(serve, put, monkeypatch) -> None:
    put()
    running = serve()
    from server import echo

    step, at = echo.Ticket.step, 0

    def fails(ticket) -> bool:
        if len(ticket.said) - len(ticket.left) == at:
            ticket.over = True
            ticket.tell(echo.Failed(AdapterError("it broke at /secret/place/file.py")))
            return False
        return step(ticket)

    monkeypatch.setattr(echo.Ticket, "step", fails)
    got = running.client().post("/v1/completions", json={**BODY, "prompt": "x y"})
    assert (got.status_code, got.json()["error"]["code"]) == (409, "adapter_error")
    at = 2
    got = running.client().post("/v1/completions", json={**BODY, "prompt": "x y"})
    assert got.status_code == 200
    last = json.loads(got.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "adapter_error"
    assert "secret" not in got.text
    assert "[DONE]" not in got.text


@pytest.mark.slow
def test_draining_lets_running_answers_finish_and_refuses_new_ones_with_503(serve, put, until) -> None:
    put()
    running = serve(pace=0.01)
    whole: list[str] = []

    def read() -> None:
        with running.client().stream("POST", "/v1/completions", json=BODY) as got:
            whole.extend(got.iter_lines())

    reader = threading.Thread(target=read)
    with running.client() as fresh:
        reader.start()
        until(lambda: running.served.load.requests == 1)
        running.server.drain()
        for path in ("/v1/models", "/metrics"):
            got = fresh.get(path)
            assert (got.status_code, got.json()["error"]["code"]) == (503, "draining")
            assert "retry-after" in got.headers
        assert fresh.get("/readyz").status_code == 503
        assert fresh.get("/healthz").status_code == 200
        reader.join(timeout=20)
    assert whole[-2:] == ["data: [DONE]", ""] or whole[-1] == "data: [DONE]"
    assert sum('"text": " w' in line for line in whole) == 199
    until(lambda: running.ended)


def test_draining_ends_when_its_time_is_up(serve, put, until) -> None:
    put()
    running = serve(pace=5.0, limits=RequestLimits(drain_seconds=0.2))
    failed: list[Exception] = []

    def ask() -> None:
        try:
            running.client().post("/v1/completions", json=BODY | {"stream": False})
        except httpx2.HTTPError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: running.served.load.requests == 1)
    started = time.monotonic()
    running.server.drain()
    running.server.config.timeout_graceful_shutdown = 0.1
    until(lambda: running.ended, seconds=5)
    assert time.monotonic() - started < 4
    asking.join(timeout=5)


def test_a_second_signal_ends_at_once(serve, put) -> None:
    put()
    running = serve()
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.served.load.draining
    assert not running.server.force_exit
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.server.force_exit


@pytest.mark.slow
def test_a_request_keeps_the_version_it_started_with(serve, put, workspace) -> None:
    first = put()
    put()
    workspace.promote("a@1", "production")
    running = serve(pace=0.01)
    client = running.client()
    with client.stream("POST", "/v1/completions", json=BODY) as got:
        lines = got.iter_lines()
        said = [next(lines)]
        moved = running.client().post("/api/adapters/a@2/promote", json={"alias": "production"})
        assert moved.json()["serving"] == "a@2"
        workspace.delete("a@1", force=True)
        said += [line for line in lines if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in said if line and "[DONE]" not in line]
    assert {chunk["model"] for chunk in chunks} == {"a@1"}
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == "".join(words(first.digest, LONG, SamplingParams(max_tokens=200)))
    assert client.post("/v1/classify", json={"model": "a", "input": "x"}).json()["model"] == "a@2"


def test_choices_of_one_stream_are_told_apart_by_their_index(serve, put) -> None:
    version = put()
    body = {"model": "a", "prompt": ["one two", "three"], "n": 2, "seed": 1, "stream": True}
    got = serve().client().post("/v1/completions", json=body)
    texts = ["", "", "", ""]
    for line in got.text.strip().split("\n\n")[:-1]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        texts[choice["index"]] += choice["text"]
    wanted = [("one two", 1), ("one two", 2), ("three", 1), ("three", 2)]
    assert texts == ["".join(words(version.digest, text, SamplingParams(seed=seed))) for text, seed in wanted]
