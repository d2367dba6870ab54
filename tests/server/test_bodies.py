"""Expensive bodies are counted before parsing, and parsed off the event loop, so they delay no other request."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server.echo import FINGERPRINT
from store.bundles import tensors, write_bundle

from turret.errors import TooLarge
from turret.server import routes
from turret.server.limits import RequestLimits
from turret.workspace import Workspace

TESTS = Path(__file__).parents[1]
PROMISED = 0.1  # seconds until /healthz answers, during any other request

MILLION = 1_000_000
ATTACKS = {
    "300,000 keys": (
        "/v1/classify",
        413,
        b'{"model":"a","input":"x",' + b",".join(b'"k%d":1' % n for n in range(300_000)) + b"}",
    ),
    "as many keys as may be": (
        "/v1/classify",
        400,
        b'{"model":"a","input":"x",' + b",".join(b'"k%d":1' % n for n in range(4000)) + b"}",
    ),
    "keys in keys": ("/v1/classify", 413, b'{"a":' * 300_000 + b"1" + b"}" * 300_000),
    "keys in a list": ("/v1/completions", 413, b'{"model":"a","prompt":[' + b'{"a":1},' * 300_000 + b"1]}"),
    "2,000,000 numbers": ("/v1/completions", 413, b'{"model":"a","prompt":[' + b"1," * (2 * MILLION) + b"1]}"),
    "130,000 bad numbers": ("/v1/completions", 400, b'{"model":"a","prompt":[' + b"-1," * 130_000 + b"1]}"),
    "2 prompts of 130,000 tokens, the last one bad": (
        "/v1/completions",
        400,
        b'{"model":"a","prompt":[[' + b"1," * 130_000 + b"1],[" + b"1," * 130_000 + b"-1]]}",
    ),
    "100,000 inputs": ("/v1/classify", 400, json.dumps({"model": "a", "input": ["x"] * 100_000}).encode()),
    "1,000,000 empty objects": ("/v1/completions", 413, b'{"model":"a","prompt":[' + b"{}," * MILLION + b"1]}"),
    "1,000,000 texts": ("/v1/completions", 413, b'{"model":"a","prompt":[' + b'"",' * MILLION + b'""]}'),
    "4,000,000 quotes": ("/v1/classify", 400, b'{"model":"a","input":' + b'"' * (4 * MILLION) + b"}"),
    "a text of colons": ("/v1/classify", 400, b'{"model":"a","input":"' + b":,[{" * MILLION + b'"}'),
    "messages of parts that are none": (
        "/v1/chat/completions",
        413,
        json.dumps(
            {"model": "a", "messages": [{"role": "user", "content": [{"type": "x", "a": 1}] * 256}] * 256}
        ).encode(),
    ),
}


class Server(NamedTuple):
    port: int
    pid: int

    @property
    def worked(self) -> float:
        """Processor time of the server so far, in all its threads."""
        return time.clock_gettime((~self.pid << 3) | 2)  # as clock_getcpuclockid() on Linux


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """A server in its own process, so that no test holds its global lock."""
    folder = tmp_path_factory.mktemp("bodies")
    workspace = Workspace(folder / "store")
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify"}}
    workspace.store.put("a", write_bundle(folder, tensors(0), said=said))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(TESTS / "server" / "echo_server.py"), str(workspace.store.root), "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as started:
        try:
            yield Server(int(started.stdout.readline().rpartition(":")[2]), started.pid)
        finally:
            started.kill()


def ask(opened: socket.socket, method: str, path: str, content: bytes = b"") -> tuple[int, bytes]:
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    opened.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = opened.recv(65536)
        assert piece, "closed without an answer"
        answer += piece
    headers, _, body = answer.partition(b"\r\n\r\n")
    length = int(headers.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += opened.recv(65536)
    return int(headers.split()[1]), body


def waits(server: Server, over: threading.Event) -> list[float]:
    """The server's processor time between each request to /healthz and its response, until `over` is set.

    Not wall-clock time, because other processes may use the processor.
    """
    found = []
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as opened:
        while not over.is_set():
            began = server.worked
            assert ask(opened, "GET", "/healthz")[0] == 200
            found.append(server.worked - began)
            over.wait(0.005)
    return found


def waits_during(server: Server, name: str) -> list[float]:
    """Seconds that /healthz took, each time it was asked during four costly requests."""
    path, status, content = ATTACKS[name]
    over, found = threading.Event(), []

    def attack() -> None:
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as opened:
                found.extend(ask(opened, "POST", path, content) for _ in range(4))
        finally:
            over.set()

    attacker = threading.Thread(target=attack)
    attacker.start()
    seconds = waits(server, over)
    attacker.join()
    assert [each[0] for each in found] == [status] * 4, found[0][1][:300]
    message = json.loads(found[0][1])["error"]["message"]
    assert len(message) < 300
    assert "\n" not in message
    return seconds


@pytest.mark.skipif(sys.platform != "linux", reason="reads the clock of another process")
@pytest.mark.parametrize("name", ATTACKS)
def test_health_is_told_at_once_while_costly_bodies_are_read(server, name) -> None:
    slowest = []
    for _ in range(3):  # other programs on this machine may slow one of them
        slowest.append(max(waits_during(server, name)))
        if slowest[-1] < PROMISED:
            break
    assert min(slowest) < PROMISED, slowest


def test_many_keys_and_values_within_a_text_are_none() -> None:
    limits = RequestLimits(body_keys=3, body_values=4)
    for text in ('":,[{' * 9, "\\" * 7 + ":,[{" * 9, '\\":,[{' * 9 + "\\", "\n\t::::\u2028,,,,,"):
        routes.check_counts(json.dumps({"model": "a", "input": text}).encode(), limits)
        with pytest.raises(TooLarge, match="more than 3 keys"):
            routes.check_counts(json.dumps({"1": text, "2": 0, "3": 0, text: 0}).encode(), limits)
        with pytest.raises(TooLarge, match="more than 4 values"):
            routes.check_counts(json.dumps([text, "", text, 0, text]).encode(), limits)


def test_as_many_as_the_limits_say_are_taken_and_one_more_is_not(serve, put) -> None:
    put()
    client = serve(limits=RequestLimits(body_keys=4, body_values=13)).client()
    parts = [{"model": "a", "input": ["x"] * count} for count in (10, 11, 12)]
    assert [client.post("/v1/classify", json=each).status_code for each in parts] == [200, 200, 413]
    more = {"model": "a", "input": "x", "a": 1, "b": 2}
    assert client.post("/v1/classify", json=more).status_code == 400
    got = client.post("/v1/classify", json={**more, "c": 3})
    assert (got.status_code, got.json()["error"]["code"]) == (413, "too_large")
    assert got.json()["error"]["message"] == "the body has more than 4 keys: send what it asks in several requests"


def test_a_number_that_no_float_holds_is_400_wherever_it_is(serve, put) -> None:
    put()
    client = serve().client()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maximum": math.inf}}}
    asked = {"model": "a", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    for path, body in (
        ("/v1/chat/completions", json.dumps(asked).replace("Infinity", "1e400")),
        ("/v1/responses", '{"model": "a", "input": "x", "metadata": {"a": [-1e400]}}'),
        ("/v1/classify", '{"model": "a", "input": "x", "user": 1e400}'),
    ):
        got = client.post(path, content=body, headers={"content-type": "application/json"})
        assert (got.status_code, "no float holds" in got.json()["error"]["message"]) == (400, True), got.text
    assert client.post("/v1/classify", json={"model": "a", "input": "1e400"}).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a":,[]{}\\\u00e9\n', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(alphabet='b":,[{\\', max_size=5), inner, max_size=5)
    ),
    max_leaves=20,
)


def sizes(value: object) -> tuple[int, int]:
    """(keys, values in lists and objects, an empty one counted as if it had one)."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return 0, 0
    found = [sizes(each) for each in inner]
    keys = len(value) if isinstance(value, dict) else 0
    return keys + sum(each[0] for each in found), max(1, len(inner)) + sum(each[1] for each in found)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(JSON, st.booleans())
def test_the_counts_are_exact_for_whatever_is_json(value, ascii_only) -> None:
    content = json.dumps(value, ensure_ascii=ascii_only).encode()
    keys, values = sizes(value)
    routes.check_counts(content, RequestLimits(body_keys=keys, body_values=values))
    if keys:
        with pytest.raises(TooLarge):
            routes.check_counts(content, RequestLimits(body_keys=keys - 1, body_values=values))
    if values:
        with pytest.raises(TooLarge):
            routes.check_counts(content, RequestLimits(body_keys=keys, body_values=values - 1))
