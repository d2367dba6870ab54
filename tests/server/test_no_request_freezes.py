"""No request freezes the server, makes it use much memory, or ends it: every route and header, on a real process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import byte_level
import httpx2
import pytest
from engine.test_constraints import HIDDEN, chain_of_rules, chained
from server.frozen import FEW, GROWTH, PATTERNS, Attack, Caller, attacks, frozen_by
from store.bundles import tensors, write_bundle

from turret.workspace import Workspace

TESTS = Path(__file__).parents[1]
NAMED = {
    "name": "a", "reference": "a@1", "model": "base", "adapter": "a", "after": "a", "run_id": "x", "key": "x",
    "receipt": "x", "candidates": ["a@1"], "control": "a@1", "shadows": ["a@1"], "batch_id": "x", "file_id": "x",
    "input_file_id": "x", "comparison": "comparisons/a-0123456789",
}  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the clock of another process")


@dataclass
class Process:
    """A server in a process of its own."""

    started: subprocess.Popen[str]
    url: str
    workspace: Workspace
    admin: str
    infer: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, token: str) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url, headers={"authorization": f"Bearer {token}"}, timeout=60, trust_env=False
        )

    def caller(self, named: dict[str, Any]) -> Caller:
        """Somebody with every scope, on pages too."""
        with httpx2.Client(base_url=self.url, timeout=20, trust_env=False) as client:
            found = re.search(r'name="form_token" value="(\w+)"', client.get("/sign-in").text)
            assert found is not None
            said = {"token": self.admin, "form_token": found[1]}
            session = (
                client.post("/sign-in", data=said, headers={"origin": self.url}).headers["set-cookie"].split(";")[0]
            )
            page = client.get("/adapters", headers={"cookie": session}).text
            return Caller(self.port, named, self.admin, session, re.search(r'"x-form-token": "(\w+)"', page)[1])

    def schema(self) -> dict[str, Any]:
        with self.client(self.admin) as client:
            found: dict[str, Any] = client.get("/openapi.json").json()
            return found


@contextmanager
def process(command: list[str], workspace: Workspace, *more: str) -> Iterator[Process]:
    _, admin = workspace.tokens.create("boss", ["admin", "infer"])
    _, infer = workspace.tokens.create("anybody", ["infer"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, *command, workspace.store.location.given, *more],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    ) as started:  # fmt: skip
        try:
            said = started.stdout.readline().strip()
            yield Process(started, json.loads(said)["url"] if said.startswith("{") else said, workspace, admin, infer)
        finally:
            started.kill()


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("real")
    with served(folder, str(folder / "store")) as made:
        yield made


@contextmanager
def served(folder: Path, store: str) -> Iterator[Process]:
    """`turret serve` with a base that generates, a chat template with tools, and an adapter."""
    base = byte_level.save_base(folder / "base")
    workspace = Workspace(store)
    workspace.store.put("a", byte_level.save_adapter(folder / "a", base, seed=1))
    command = ["-m", "turret", "serve", "--port", "0", "--json", "--device", "cpu", "--dtype", "float32"]
    with process([*command, "--base", str(base), "--store"], workspace) as made:
        with made.client(made.infer) as client:  # the kernels are compiled
            client.post("/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 2}, timeout=400)
        yield made


def some(found: Iterator[Attack], step: int) -> Iterator[Attack]:
    return (attack for place, attack in enumerate(found) if place % step == 0)


def check(server: Process, found: Iterator[Attack]) -> dict[int, int]:
    slow, statuses, growth = frozen_by(found, server.caller(NAMED), server.started.pid)
    assert server.started.poll() is None
    assert not slow, "\n".join(slow)
    assert growth < GROWTH
    print(f"{sum(statuses.values())} requests, {growth >> 20} MiB more memory, {sorted(statuses.items())}")
    return statuses


@pytest.mark.slow
def test_no_route_and_no_header_freezes_the_server_with_some_texts(real) -> None:
    statuses = check(real, some(attacks(real.schema(), real.caller(NAMED), FEW, whole=False), 23))
    assert sum(statuses.values()) > 80


@pytest.mark.parametrize("quotes", ['\\"', "\\"])
def test_a_cookie_in_quotes_is_read_by_no_route(real, quotes) -> None:
    """The walk found it: FastAPI reads all cookies of each request, which `http.cookies` does in quadratic time."""
    cookie = {"cookie": 'a="' + quotes * (30_000 // len(quotes)) + '"'}
    check(real, (Attack(f"cookie, {path}", "GET", path, headers=cookie) for path in ("/v1/models", "/sign-in", "/")))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_route_and_no_header_freezes_the_server_with_any_text(real, pattern) -> None:
    statuses = check(real, attacks(real.schema(), real.caller(NAMED), [pattern]))
    assert sum(statuses.values()) > 1000
    assert {200, 400, 404, 413, 431} <= set(statuses)


@pytest.mark.slow
def test_a_route_that_freezes_the_server_is_found(tmp_path) -> None:
    workspace = Workspace(tmp_path / "store")
    said = {"base": {"id": "echo", "fingerprint": "sha256:echo"}, "task": {"kind": "classify"}}
    workspace.store.put("a", write_bundle(tmp_path, tensors(0), said=said))
    with process([str(TESTS / "server" / "freezing_server.py")], workspace) as server:
        caller = server.caller(NAMED | {"model": "echo"})
        found = (each for each in attacks(server.schema(), caller, ["%"]) if "careless" in each.what)
        slow, statuses, _ = frozen_by(found, caller, server.started.pid)
        assert slow
        assert all("/v1/careless" in each for each in slow)
        assert sum(statuses.values()) > 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_nul_in_any_text_of_any_route_is_no_fault_of_the_server(tmp_path, new_url, kind) -> None:
    with served(tmp_path, str(tmp_path / "store") if kind == "folder" else new_url()) as server:
        caller = server.caller(NAMED)
        slow, statuses, _ = frozen_by(attacks(server.schema(), caller, ["\0"]), caller, server.started.pid)
        assert not slow
        assert {status for status in statuses if status >= 500} == set(), statuses
        body = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
        body += b'content-disposition: form-data; name="file"; filename="a\0b\x07.jsonl"\r\n\r\n{}\r\n--x--\r\n'
        with server.client(server.infer) as client:  # written by hand: a client library escapes such a name
            headers = {"content-type": "multipart/form-data; boundary=x"}
            assert client.post("/v1/files", content=body, headers=headers).status_code == 400
            plain = body.replace(b"\0", b"").replace(b"\x07", b"")
            assert client.post("/v1/files", content=plain, headers=headers).status_code == 200


# --- constraints ------------------------------------------------------------------------------------------------------

DEEP = chained(39, 100, "bare")
TOOL = {"name": "f", "parameters": DEEP}
CHAT = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
TEXT = {"model": "a", "prompt": "x", "max_tokens": 4}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": DEEP}}
KILLERS = {
    "chat, response_format": ("/v1/chat/completions", CHAT | {"response_format": FORMAT}),
    "chat, grammar": ("/v1/chat/completions", CHAT | {"structured_outputs": {"grammar": chain_of_rules(3200)}}),
    "chat, a schema in a grammar": ("/v1/chat/completions", CHAT | {"structured_outputs": {"grammar": HIDDEN}}),
    "chat, tool": (
        "/v1/chat/completions",
        CHAT | {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
    ),
    "chat, stream": ("/v1/chat/completions", CHAT | {"response_format": FORMAT, "stream": True}),
    "completions, response_format": ("/v1/completions", TEXT | {"response_format": FORMAT}),
    "completions, guided_json": ("/v1/completions", TEXT | {"guided_json": DEEP}),
    "completions, structured_outputs": ("/v1/completions", TEXT | {"structured_outputs": {"json": DEEP}}),
    "completions, grammar": ("/v1/completions", TEXT | {"structured_outputs": {"grammar": HIDDEN}, "n": 3}),
    "responses, format": (
        "/v1/responses",
        {"model": "a", "input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": DEEP}}},
    ),
    "responses, tool": (
        "/v1/responses",
        {"model": "a", "input": "x", "tools": [{"type": "function", **TOOL}], "tool_choice": "required"},
    ),
}


def test_a_constraint_that_would_end_the_server_is_400_on_every_route_and_running_answers_go_on(real) -> None:
    with real.client(real.infer) as client, real.client(real.infer) as other:
        asked = TEXT | {"max_tokens": 450, "stream": True, "temperature": 1.0, "model": "base"}
        with other.stream("POST", "/v1/completions", json=asked) as beside:
            lines = beside.iter_lines()
            next(lines)
            for name, (path, body) in KILLERS.items():
                got = client.post(path, json=body)
                said = got.json()["error"]
                assert (got.status_code, said["code"]) == (400, "data_error"), (name, said)
                assert len(said["message"]) < 300
                assert "nest it less deeply" in said["message"]
            assert [line for line in lines if line][-1] == "data: [DONE]"
        good = CHAT | {"structured_outputs": {"choice": ["yes", "no"]}}
        answer = client.post("/v1/chat/completions", json=good).json()
        assert answer["choices"][0]["message"]["content"] in ("yes", "no")
    assert real.started.poll() is None


def test_a_line_of_a_batch_that_would_end_the_server_is_an_error_of_that_line(real) -> None:
    bodies = [
        CHAT,
        *(body for path, body in KILLERS.values() if path == "/v1/chat/completions" and "stream" not in body),
    ]
    sent = "".join(
        json.dumps({"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"
        for number, body in enumerate(bodies)
    )
    with real.client(real.infer) as client:
        file = client.post("/v1/files", files={"file": ("b.jsonl", sent.encode())}, data={"purpose": "batch"}).json()
        wanted = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=wanted).json()
        until = time.monotonic() + 120
        while batch["status"] not in ("completed", "failed", "expired"):
            assert time.monotonic() < until, batch
            time.sleep(0.1)
            batch = client.get(f"/v1/batches/{batch['id']}").json()
        assert batch["status"] == "completed", batch
        assert batch["request_counts"] == {"total": len(bodies), "completed": 1, "failed": len(bodies) - 1}
        errors = client.get(f"/v1/files/{batch['error_file_id']}/content").text.splitlines()
        assert {json.loads(line)["response"]["status_code"] for line in errors} == {400}
    assert real.started.poll() is None
