"""A server process: it prints its URL, drains on SIGTERM, and refuses bad settings before it loads a base."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from turret.cli.main import run
from turret.cli.serve import only_base, size_of
from turret.errors import ServeRefused
from turret.server.app import bind, url_of

TESTS = Path(__file__).parents[1]


@pytest.fixture
def process(put, workspace) -> Iterator[subprocess.Popen[str]]:
    put()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(TESTS / "server" / "echo_server.py"), str(workspace.store.root), "0.02"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        yield started
        started.kill()


def test_sigterm_lets_a_running_answer_finish_refuses_new_ones_and_ends_with_status_0(process) -> None:
    url = process.stdout.readline().strip()
    body = {"model": "a", "prompt": " ".join(f"w{n}" for n in range(60)), "max_tokens": 60, "stream": True}
    with (
        httpx2.Client(base_url=url, timeout=20, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json=body) as got,
    ):
        lines = got.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while (late := client.get("/v1/models")).status_code != 503:
            assert time.monotonic() < end
        assert late.json()["error"]["code"] == "draining"
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert len(rest) > 50
    assert process.wait(timeout=10) == 0
    events = [json.loads(line)["event"] for line in process.stderr.read().splitlines()]
    assert events[0] == "serving"
    assert "draining" in events
    assert events[-1] == "ended"


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(process) -> None:
    url = process.stdout.readline().strip()
    body = {"model": "a", "prompt": " ".join("x" * 5000), "max_tokens": 4000, "stream": True}
    with (
        httpx2.Client(base_url=url, timeout=20, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json=body) as got,
    ):
        lines = got.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) is not None


def test_serving_beyond_loopback_without_tokens_is_refused_before_anything_is_loaded(put, workspace, capsys) -> None:
    put()
    assert run(["serve", "--host", "0.0.0.0", "--store", str(workspace.store.root)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("turret: serve on 0.0.0.0 without tokens: expected a loopback address")
    assert err.count("\n") == 1


def test_a_port_that_is_taken_and_an_address_that_is_not_ours_are_one_line(put, workspace, capsys) -> None:
    put()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", "--port", port, "--store", str(workspace.store.root)]) == 2
        assert f"port {port}: Address already in use: give another --port" in capsys.readouterr().err
    with pytest.raises(ServeRefused, match=r"serve on 192\.0\.2\.1.*: give an"):
        bind("192.0.2.1", 0)


def test_small_answers_are_sent_at_once(serve, put) -> None:
    """Without TCP_NODELAY each answer waits for the other side's delayed acknowledgement: 40 ms."""
    put()
    client, seconds = serve().client(), []
    for _ in range(30):
        started = time.perf_counter()
        client.post("/v1/classify", json={"model": "a", "input": "x"})
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[5] < 0.03


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_an_address_of_version_six_is_written_in_brackets() -> None:
    with bind("::1", 0) as six:
        assert url_of(six).startswith("http://[::1]:")


def test_the_base_is_the_stores_only_one_or_must_be_said(put, workspace, capsys) -> None:
    with pytest.raises(ServeRefused, match="the store has no adapter; name one with --base"):
        only_base(workspace)
    put()
    assert only_base(workspace) == "echo"
    from store.bundles import tensors, write_bundle

    bundle = write_bundle(workspace.store.root.parent / "more", tensors(999), said={"base": {"id": "other"}})
    workspace.store.put("b", bundle)
    with pytest.raises(ServeRefused, match="adapters of echo, other; name one with --base"):
        only_base(workspace)


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"500MB": 500_000_000, "2g": 2_000_000_000, "1.5 GB": 1_500_000_000, "100": 100, None: None}
    assert {text: size_of(text) for text in sizes} == sizes
    for text in ("", "many", "-1", "0", "5 TB"):
        with pytest.raises(ServeRefused, match="expected a number of bytes"):
            size_of(text)
