"""Requests that are too large, too slow or malformed get 4xx quickly, and other traffic continues."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from starlette.types import Message

from turret.errors import TooSlow
from turret.server import limits
from turret.server.limits import Load, RequestLimits, is_page

GOOD = {"model": "a", "input": "x"}


@contextmanager
def raw(running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as opened:
        yield opened


def head(length: int | str = 10, more: str = "", path: str = "/v1/classify") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n{more}\r\n"
    ).encode()


def said(opened: socket.socket) -> tuple[int, dict]:
    """(status, body) of the one response on the connection."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = opened.recv(65536)
        assert piece, "closed without an answer"
        answer += piece
    headers, _, body = answer.partition(b"\r\n\r\n")
    length = int(next(line for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length")).split()[1])
    while len(body) < length:
        body += opened.recv(65536)
    return int(headers.split()[1]), json.loads(body)


def well(running) -> None:
    assert running.client().post("/v1/classify", json=GOOD).status_code == 200


def test_a_body_of_100_mb_is_413_before_it_is_sent_and_while_it_is(serve, put) -> None:
    put()
    running = serve()
    started = time.monotonic()
    with raw(running) as opened:
        opened.sendall(head(100_000_000))
        assert said(opened)[0] == 413
    with raw(running) as opened:  # without a length, in chunks, until the server answers
        opened.sendall(head(0).replace(b"content-length: 0", b"transfer-encoding: chunked"))
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(1500):
            opened.sendall(chunk)
        opened.sendall(b"0\r\n\r\n")
        status, body = said(opened)
        assert (status, body["error"]["code"]) == (413, "too_large")
    got = running.client().post("/v1/classify", content=b"x" * 100_000_000)  # a client that sends all before it reads
    assert got.status_code == 413
    assert time.monotonic() - started < 15
    assert running.served.load.bytes == 0
    well(running)


def test_a_body_that_comes_a_byte_a_second_is_408(serve, put) -> None:
    put()
    running = serve(limits=RequestLimits(body_seconds=0.3))
    with raw(running) as opened:
        opened.sendall(head(1000))
        for _ in range(2):
            opened.sendall(b"{")
            time.sleep(0.1)
        status, body = said(opened)
        assert (status, body["error"]["code"]) == (408, "too_slow")
    well(running)


@pytest.mark.parametrize(("size", "refused"), [(10, "the file comes at less than 1000 bytes a second"), (400, None)])
def test_a_file_that_comes_too_slowly_is_refused_and_one_that_comes_steadily_is_read(size, refused) -> None:
    async def piece() -> Message:
        await asyncio.sleep(0.1)
        return {"type": "http.request", "body": bytes(size), "more_body": True}

    async def read(count: int) -> None:
        receive = limits._limit_upload(piece, RequestLimits(body_seconds=0.4, file_rate=1000))
        for _ in range(count):
            await receive()

    if refused is None:
        asyncio.run(read(12))
    else:
        with pytest.raises(TooSlow, match=refused):
            asyncio.run(read(12))


def test_a_file_that_stops_coming_is_refused_at_once() -> None:
    async def read() -> None:
        receive = limits._limit_upload(asyncio.Event().wait, RequestLimits(body_seconds=0.1))
        await receive()

    with pytest.raises(TooSlow, match=r"no byte arrived for 0\.1 seconds"):
        asyncio.run(read())


def test_headers_that_come_a_byte_a_second_are_408_also_on_a_connection_that_was_good(serve, put) -> None:
    put()
    running = serve(limits=RequestLimits(header_seconds=0.3))
    with raw(running) as opened:
        opened.sendall(b"POST /v1/cla")
        assert said(opened)[0] == 408
    with raw(running) as opened:
        assert said(opened)[0] == 408  # not a byte
    with raw(running) as opened:
        body = json.dumps(GOOD).encode()
        opened.sendall(head(len(body)) + body)
        assert said(opened)[0] == 200
        opened.sendall(b"GET /v1/mod")
        assert said(opened)[0] == 408
    well(running)


def test_half_a_body_is_400(serve, put) -> None:
    put()
    running = serve()
    with raw(running) as opened:
        opened.sendall(head(1000) + b'{"model": "a"')
        opened.shutdown(socket.SHUT_WR)
        status, body = said(opened)
        assert (status, body["error"]["code"]) == (400, "bad_request")
        assert "ended before" in body["error"]["message"]
    well(running)


@pytest.mark.parametrize("nonsense", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"x" * 30_000])
def test_what_is_not_http_is_400_in_json(serve, put, nonsense) -> None:
    put()
    running = serve()
    with raw(running) as opened:
        opened.sendall(nonsense + b"\r\n\r\n")
        status, body = said(opened)
        assert (status, set(body["error"])) == (400, {"message", "type", "param", "code"})
    well(running)


@pytest.mark.parametrize("size", [33_000, 100_000, 1_000_000])
def test_headers_beyond_the_limit_are_431_and_those_within_it_are_read(serve, put, size) -> None:
    put()
    running = serve()
    body = json.dumps(GOOD).encode()
    for more in (f"x-a: {'x' * size}\r\n", "".join(f"x-{number}: y\r\n" for number in range(size // 8))):
        with raw(running) as opened:
            opened.sendall(head(len(body), more) + body)
            status, answer = said(opened)
            assert (status, answer["error"]["code"]) == (431, "headers_too_large")
    with raw(running) as opened:
        opened.sendall(head(len(body), f"x-a: {'x' * 32_000}\r\n") + body)
        assert said(opened)[0] == 200
        opened.sendall(head(len(body), f"x-a: {'x' * 33_000}\r\n") + body)  # the second request of a connection
        assert said(opened)[0] == 431


AMBIGUOUS = {
    "folded": ("x-a: b\r\n c: d\r\n", "folded"),
    "folded by a tab": ("x-a: b\r\n\tc: d\r\n", "folded"),
    "a line feed alone": ("x-a: b\nx-c: d\r\n", "CR LF"),
    "an empty line of a line feed alone": ("x-a: b\n\n", "CR LF"),
    "a carriage return alone": ("x-a: b\rx-c: d\r\n", "CR LF"),
    "a NUL": ("x-a: b\0\r\n", "control character"),
    "two cookies": ("cookie: a=b\r\ncookie: a=c\r\n", "two Cookie headers"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_headers_that_servers_read_in_different_ways_are_400(serve, put, name) -> None:
    put()
    running = serve()
    more, why = AMBIGUOUS[name]
    body = json.dumps(GOOD).encode()
    for path in ("/v1/classify", "/healthz"):
        with raw(running) as opened:
            opened.sendall(head(len(body), more, path) + body)
            status, answer = said(opened)
            assert (status, why in answer["error"]["message"]) == (400, True), answer
    with raw(running) as opened:  # a request that comes in two parts, cut between CR and LF, is a good one
        sent = head(len(body), "x-a: b\r\n")
        place = sent.index(b"x-a: b\r") + len(b"x-a: b\r")
        opened.sendall(sent[:place])
        time.sleep(0.05)
        opened.sendall(sent[place:] + body)
        assert said(opened)[0] == 200


def test_a_body_has_the_limit_of_its_route(serve, put) -> None:
    put()
    running = serve()
    client = running.client()
    for method, path, most in (
        ("POST", "/v1/classify", 4 << 20), ("POST", "/api/runs", 4 << 20), ("POST", "/playground", 4 << 20),
        ("POST", "/api/studies/plan", 4 << 20), ("POST", "/api/panels", 4 << 20),
        ("POST", "/api/adapters/a/promote", 64 << 10), ("POST", "/adapters/a/promote", 64 << 10),
        ("POST", "/sign-in", 8 << 10), ("GET", "/v1/models", 8 << 10), ("POST", "/no-such-path", 8 << 10),
    ):  # fmt: skip
        form = "application/x-www-form-urlencoded" if is_page(path) else "application/json"
        headers = {"content-type": form, "origin": running.url}
        asked = [client.request(method, path, content=b"x" * size, headers=headers) for size in (most, most + 1)]
        got = [each.status_code for each in asked]
        assert got[0] != 413, (path, got)
        assert got[1] == 413, (path, got)
        remedy = "send the inputs in several requests" if most == 4 << 20 else "shorten it"
        assert f"more than {most} bytes: {remedy}" in asked[1].text, path


def test_a_client_that_leaves_while_it_sends_a_file_is_no_bug(serve, put, until) -> None:
    put()
    running = serve()
    host, _, port = running.url.removeprefix("http://").partition(":")
    head = f"POST /v1/files HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: multipart/form-data; boundary=x\r\n"
    part = '--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nhalf of it'
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}content-length: 100000\r\n\r\n{part}".encode())
    until(lambda: any(line.get("status") == 499 for line in running.log()))
    assert not any(line["event"] == "bug" for line in running.log())


def test_a_wrong_content_type_is_415(serve, put) -> None:
    put()
    running = serve()
    client, body = running.client(), json.dumps(GOOD)
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "application/xml",
    ):
        got = client.post("/v1/classify", content=body, headers={"content-type": kind})
        assert (got.status_code, got.json()["error"]["code"]) == (415, "wrong_media_type"), kind
    packed = client.post(
        "/v1/classify", content=body, headers={"content-type": "application/json", "content-encoding": "gzip"}
    )
    assert packed.status_code == 415
    fine = client.post("/v1/classify", content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert fine.status_code == 200


DEEP = 200_000
BAD_BODIES = {
    "nested": b"[" * DEEP + b"]" * DEEP,
    "nested objects": b'{"a":' * 4000 + b"1" + b"}" * 4000,
    "nested in place": b'{"model":"a","input":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "not JSON": b"{'model': 'a'}",
    "not UTF-8": b'{"model": "a", "input": "\xff\xfe"}',
    "half a character": b'{"model": "a", "input": "\\ud800"}',
    "NaN": b'{"model": "a", "prompt": "x", "temperature": NaN}',
    "a number of 100,000 digits": b'{"model": "a", "prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "an unknown key": b'{"model": "a", "input": "x", "colour": 1}',  # and no prompt
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions"])
def test_a_body_that_is_not_a_request_is_400_quickly(shared, name, path) -> None:
    started = time.monotonic()
    headers = {"content-type": "application/json"}
    got = shared.client().post(path, content=BAD_BODIES[name], headers=headers)
    assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error"), got.text
    assert time.monotonic() - started < 5
    assert len(got.content) < 1000


BILLION = 1_000_000_000
TOO_MUCH = [
    {"n": BILLION},
    {"max_tokens": BILLION},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"n": 16, "prompt": ["x"] * 1024},
    {"prompt": ["x"] * 100_000},
    {"prompt": []},
    {"prompt": [[1]] * 100_000},
    {"prompt": [-1]},
    {"prompt": [True]},
    {"stop": ["x"] * 100},
    {"stop": ""},
    {"temperature": 1e9},
    {"top_p": 0},
    {"top_k": BILLION},
    {"num_beams": BILLION},
    {"repetition_penalty": 0},
    {"seed": 1 << 70},
    {"echo": True, "num_beams": 2},
    {"best_of": 3, "stream": True},
    {"best_of": BILLION},
    {"logprobs": BILLION},
    {"logprobs": True},
    {"presence_penalty": 2.5},
    {"frequency_penalty": BILLION},
    {"logit_bias": {"1": 101}},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {str(token): 1 for token in range(1025)}},
    {"truncate_prompt_tokens": 0},
    {"guided_regex": ""},
    {"guided_choice": []},
    {"guided_regex": "a" * 70_000},
    {"guided_json": {"title": "x" * 70_000}},
    {"guided_regex": "a", "guided_choice": ["b"]},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "yaml"}},
    {"suffix": "x"},
    {"model": "x" * 10_000},
    {"model": None},
    {"max_tokens": "5"},
    {"stream": "yes"},
]


@pytest.mark.parametrize("more", TOO_MUCH, ids=lambda more: str(more)[:40])
def test_what_asks_for_too_much_or_for_what_is_not_offered_is_4xx_quickly(shared, more) -> None:
    started = time.monotonic()
    got = shared.client().post("/v1/completions", json={"model": "a", "prompt": "x", **more})
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] in (*more, None)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a\0", "a\\b", "-a", "%2e%2e", "\u0430", "a\n", "A", "a@", "a@0", "@a"]
)
def test_a_name_that_could_mean_more_is_404(shared, name) -> None:
    client = shared.client()
    got = client.post("/v1/classify", json={"model": name, "input": "x"})
    assert (got.status_code, got.json()["error"]["code"]) == (404, "bad_reference")
    assert client.get(f"/api/adapters/{quote(name, safe='')}").status_code == 404
    assert client.post(f"/api/adapters/{quote(name, safe='')}/load").status_code == 404


@pytest.mark.slow
def test_100_000_inputs_in_one_request_are_400(shared) -> None:
    got = shared.client().post("/v1/classify", json={"model": "a", "input": ["x"] * 100_000})
    assert got.status_code == 400
    assert "1024" in got.json()["error"]["message"]
    assert shared.client().post("/v1/classify", json={"model": "a", "input": ["x"] * 1024}).status_code == 200


@pytest.mark.parametrize("more", [{"n": 16}, {"best_of": 16}, {"best_of": 16, "n": 16}], ids=["n", "best_of", "both"])
def test_prompts_times_n_or_best_of_are_bounded_together(shared, more) -> None:
    body = {"model": "a", "max_tokens": 1, "prompt": ["x"] * 65, **more}
    started = time.monotonic()
    got = shared.client().post("/v1/completions", json=body)
    assert got.status_code == 400, got.text[:200]
    assert "1024" in got.json()["error"]["message"]
    assert time.monotonic() - started < 5
    few = shared.client().post("/v1/completions", json=body | {"prompt": ["x"] * 4})
    assert (few.status_code, len(few.json()["choices"])) == (200, 4 * more.get("n", 1))


def test_what_changes_nothing_is_taken(shared) -> None:
    more = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": False, "user": "u"}
    got = shared.client().post("/v1/completions", json={"model": "a", "prompt": "x", "suffix": None, **more})
    assert got.status_code == 200, got.text


@pytest.mark.slow
def test_a_busy_server_tells_the_time_until_room_by_the_pace_of_the_last_requests(monkeypatch) -> None:
    now = [50.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    load = Load(RequestLimits(in_flight=2))
    assert load.seconds_until_room() == 1.0
    for _ in range(4):
        with load.place(load.answering, "a"):
            now[0] += 3.0
    assert load.seconds_until_room() == (62.0 - 53.0) / 4
    assert load.requests == load.requests_of("a") == 0


def test_more_requests_than_may_be_in_flight_are_429_with_retry_after(serve, put, until) -> None:
    put()
    running = serve(limits=RequestLimits(in_flight=2))
    with raw(running) as one, raw(running) as two:
        for opened in (one, two):
            opened.sendall(head(10))
        until(lambda: running.served.load.requests == 2)
        got = running.client().post("/v1/classify", json=GOOD)
        assert (got.status_code, got.json()["error"]["code"]) == (429, "busy")
        assert int(got.headers["retry-after"]) >= 1
        assert running.client().get("/healthz").status_code == 200
    until(lambda: running.served.load.requests == 0)
    well(running)


@pytest.mark.slow
def test_bodies_together_never_take_more_memory_than_is_meant_for_them(serve, put, until) -> None:
    put()
    running = serve(limits=RequestLimits(bodies_bytes=100_000))
    with raw(running) as one:
        one.sendall(head(95_000) + b"x" * 90_000)
        until(lambda: running.served.load.bytes == 90_000)
        with raw(running) as two:
            two.sendall(head(20_000) + b"x" * 20_000)
            assert said(two)[0] == 429
    until(lambda: running.served.load.bytes == 0)
    well(running)


def test_more_connections_than_the_limit_are_told_and_closed(serve, put) -> None:
    put()
    running = serve(limits=RequestLimits(connections=3))
    opened = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(3)]
    time.sleep(0.1)
    with raw(running) as one_more:
        assert said(one_more)[0] == 429
    for each in opened:
        each.close()
    time.sleep(0.1)
    well(running)


@pytest.mark.slow
def test_a_full_queue_is_429_with_the_engines_own_retry_after(serve, put) -> None:
    put()
    running = serve(waiting=4, pace=0.2)
    got = running.client().post("/v1/completions", json={"model": "a", "prompt": ["x y z"] * 5})
    assert got.status_code == 429
    assert got.headers["retry-after"] == "3"
    assert len(running.engine.cancelled) == 4  # all or none
    time.sleep(0.3)
    well(running)


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_504_and_its_ticket_is_taken_back(serve, put, until) -> None:
    put()
    running = serve(pace=1.0, limits=RequestLimits(answer_seconds=0.2))
    got = running.client().post("/v1/completions", json={"model": "a", "prompt": "one two three"})
    assert (got.status_code, got.json()["error"]["code"]) == (504, "deadline_exceeded")
    until(lambda: running.engine.stats().queue_length == 0)


def test_methods_and_paths_that_are_not_there_are_told_in_the_same_shape(shared) -> None:
    client = shared.client()
    assert client.get("/v1/classify").status_code == 405
    assert client.get("/v1/classify").headers["allow"] == "POST"
    assert "GET" in client.post("/openapi.json").headers["allow"]
    got = client.get("/v1/nothing")
    assert (got.status_code, got.json()["error"]["code"]) == (404, "not_found")
    assert client.request("TRACE", "/v1/models").status_code == 405
    for method in ("TRACE", "PUT", "PATCH"):
        assert client.request(method, "/v1/files", files={"file": b"x"}).status_code == 405
    assert client.get("/v1/models/").status_code in (400, 404)
