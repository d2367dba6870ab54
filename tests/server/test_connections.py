"""Ambiguous requests are refused, and no client can use up the connections of all others."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import pytest

from turret.errors import Busy, ServeRefused
from turret.server.limits import ClientConnections, RequestLimits, client_of, networks

GOOD = json.dumps({"model": "a", "input": "x"}).encode()
POST = b"POST /v1/classify HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
NEXT = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"  # the smuggled request
MANY_ADDRESSES = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")


def everything(port: int, sent: bytes) -> bytes:
    """All bytes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as opened:
        opened.sendall(sent)
        answer = b""
        while piece := opened.recv(65536):
            answer += piece
        return answer


def chunked(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("path", [b"/v1/classify", b"/healthz", b"/sign-in", b"/nothing"])
@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(GOOD),
        b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(GOOD) + GOOD,
        b"transfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n" + chunked(b""),
    ],
)
def test_content_length_beside_transfer_encoding_is_400_and_closes(shared, path, framing) -> None:
    answer = everything(shared.port, POST.replace(b"/v1/classify", path) + framing + NEXT)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1  # the rest is never read as a request
    assert b"Content-Length and Transfer-Encoding" in answer or GOOD in framing[-len(GOOD) :]  # no chunk: h11 says so
    assert b"connection: close" in answer.lower()


def test_a_chunked_body_of_http_1_0_is_400_and_closes(shared) -> None:
    answer = everything(
        shared.port, POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"transfer-encoding: chunked\r\n\r\n" + chunked(GOOD)
    )
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("path", ["/v1/models", "/api/status", "/nothing"])
def test_two_authorizations_are_400_whichever_comes_first(serve, workspace, path) -> None:
    _, secret = workspace.tokens.create("boss", ["admin", "infer"])
    port = serve().port
    good, bad = f"authorization: Bearer {secret}\r\n", "Authorization: Bearer turret-nobody\r\n"
    for pair in (good + bad, bad + good, good + good):
        answer = everything(port, f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{pair}\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b"two Authorization headers" in answer
        assert b"nobody" not in answer


def test_one_body_in_chunks_or_with_a_length_and_one_authorization_are_fine(serve, put, workspace) -> None:
    put()
    _, secret = workspace.tokens.create("reader")
    bearer = f"authorization: Bearer {secret}\r\nconnection: close\r\n".encode()
    port = serve().port
    for framing in (
        b"transfer-encoding: chunked\r\n\r\n" + chunked(GOOD),
        b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD,
    ):
        assert everything(port, POST + bearer + framing).startswith(b"HTTP/1.1 200 ")


# --- connections ---------------------------------------------------------------------------------------------------


@contextmanager
def crowd(port: int, address: str, count: int, sent: bytes = b"") -> Iterator[Sequence[socket.socket]]:
    """That many connections from an address, each after sending some bytes; the server may have closed some."""
    with ExitStack() as opened:
        sockets = []
        for _ in range(count):
            made = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(address, 0))
            sockets.append(opened.enter_context(made))
            with suppress(OSError):
                made.sendall(sent)
        yield sockets


def status(opened: socket.socket) -> int:
    answer = opened.recv(65536)
    return int(answer.split()[1]) if answer else 0


@pytest.mark.slow
@MANY_ADDRESSES
@pytest.mark.parametrize(
    "sent",
    [b"", POST[:20], POST + b"content-length: 1000000\r\n\r\n{"],
    ids=["idle", "half of the headers", "half of a body"],
)
def test_hundreds_of_idle_and_slow_connections_of_one_client_hold_up_no_other(serve, put, until, sent) -> None:
    put()
    running = serve(limits=RequestLimits(connections=100, connections_per_client=20, in_flight=40))
    client = running.client()
    with crowd(running.port, "127.0.0.2", 300, sent):
        until(lambda: running.served.clients.open >= 20)
        for _ in range(9):
            began = time.monotonic()
            fresh = running.client()
            for each in (client, fresh):
                assert each.get("/healthz").status_code == 200
                assert each.post("/v1/classify", content=GOOD, headers={"content-type": "application/json"}).is_success
            assert time.monotonic() - began < 5


@MANY_ADDRESSES
def test_a_client_beyond_its_connections_is_told_and_may_come_again_when_one_is_closed(serve, put, until) -> None:
    put()
    running = serve(limits=RequestLimits(connections_per_client=3))
    with crowd(running.port, "127.0.0.2", 3), crowd(running.port, "127.0.0.2", 1) as (one_more,):
        answer = one_more.recv(65536)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"3 connections of 127.0.0.2 are open, which is the limit for one client" in answer
    until(lambda: not running.served.clients.open)
    with crowd(running.port, "127.0.0.2", 3, NEXT) as again:
        assert [status(each) for each in again] == [200] * 3


@MANY_ADDRESSES
def test_a_proxy_has_no_limit_of_its_own(serve, put) -> None:
    put()
    running = serve(limits=RequestLimits(connections_per_client=2), proxies=networks(["127.0.0.3"]))
    with crowd(running.port, "127.0.0.3", 9, NEXT) as proxy, crowd(running.port, "127.0.0.2", 2, NEXT) as others:
        assert [status(each) for each in (*proxy, *others)] == [200] * 11
        with crowd(running.port, "127.0.0.2", 1, NEXT) as (one_more,):
            assert status(one_more) == 429


@MANY_ADDRESSES
def test_bodies_of_one_client_leave_half_of_the_memory_to_others(serve, put, until) -> None:
    put()
    running = serve(limits=RequestLimits(bodies_bytes=100_000))
    slow = POST + b"content-length: 40000\r\n\r\n" + b" " * 30_000
    with crowd(running.port, "127.0.0.2", 1, slow), crowd(running.port, "127.0.0.2", 1, slow) as (second,):
        assert status(second) == 429
        until(lambda: running.served.load.bytes == 30_000)
        with crowd(running.port, "127.0.0.4", 1, slow):
            until(lambda: running.served.load.bytes == 60_000)
            got = running.client().post("/v1/classify", content=GOOD, headers={"content-type": "application/json"})
            assert got.status_code == 200
    until(lambda: running.served.load.bytes == 0)
    assert not running.served.load.bytes_of


def test_who_a_client_is() -> None:
    assert client_of(("10.0.0.7", 5)) == "10.0.0.7"
    assert client_of(("::ffff:10.0.0.7", 5, 0, 0)) == "10.0.0.7"
    assert client_of(("2001:db8:1:2:3:4:5:6", 5)) == client_of(("2001:db8:1:2:9::1", 5)) == "2001:db8:1:2::/64"
    assert client_of(("fe80::1%eth0", 5)) == "fe80::/64"
    assert client_of(None) is None
    assert client_of("/run/socket") is None


def test_connections_are_counted_by_client_and_forgotten() -> None:
    clients = ClientConnections(4, 2, networks(["10.0.0.0/8"]))
    assert clients.limited_client(("10.9.9.9", 5)) is None
    assert ClientConnections(4, None).limited_client(("1.2.3.4", 5)) is None
    for client in ("1.2.3.4", "1.2.3.4", None, None):
        clients.enter(client)
    with pytest.raises(Busy, match=r"^2 connections of 1\.2\.3\.4 are open"):
        clients.enter("1.2.3.4")
    with pytest.raises(Busy, match=r"^4 connections are open"):
        clients.enter("1.2.3.5")
    for client in ("1.2.3.4", "1.2.3.4", None, None):
        clients.leave(client)
    assert (clients.open, clients.open_of) == (0, {})


@pytest.mark.parametrize("text", ["", "proxy.example", "10.0.0.0/99", "1.2.3"])
def test_a_proxy_is_an_address_or_a_network(text) -> None:
    with pytest.raises(ServeRefused, match="expected an address"):
        networks([text])
