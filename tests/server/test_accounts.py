"""Usage is counted once, survives SIGTERM and an outage, and belongs to a tenant; the audit log has every action."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from command_line import typed
from server.console_forms import post, signed_in

from turret.access import Access
from turret.audit import read_actions as actions
from turret.errors import StoreError
from turret.store import usage
from turret.workspace import Workspace

ALL = ["infer", "admin"]
TESTS = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}


def counted(workspace: Workspace) -> dict[str, tuple[int, int, int, int]]:
    found = usage.read_usage(workspace.store.database())
    return {each.adapter: (each.requests, each.answers, each.prompt_tokens, each.completion_tokens) for each in found}


def test_usage_is_counted_by_tenant_and_adapter_and_read_by_the_tenant(serve, put, workspace) -> None:
    put("a")
    put("b")
    other = workspace.with_access(Access("other"))
    own, theirs = workspace.tokens.create("t", ALL)[1], other.tokens.create("t", ALL)[1]
    limited = workspace.tokens.create("limited", ALL, adapters=["b"])[1]
    running = serve()
    client = running.client(own)
    for _ in range(3):
        client.post("/v1/classify", json={"model": "a", "input": ["one", "one two"]})
    client.post("/v1/completions", json={"model": "b", "prompt": "one two three"})
    client.post("/v1/completions", json={"model": "echo", "prompt": "one"})
    client.post("/v1/classify", json={"model": "nobody", "input": "x"})
    rows = {each["adapter"]: each for each in client.get("/api/usage").json()["usage"]}
    assert {name: (row["requests"], row["answers"], row["prompt_tokens"]) for name, row in rows.items()} == {
        "": (1, 1, 1),
        "a": (3, 6, 9),
        "b": (1, 1, 3),
    }
    assert rows["b"]["completion_tokens"] == 4
    assert running.client(theirs).get("/api/usage").json() == {"usage": []}
    assert [each["adapter"] for each in running.client(limited).get("/api/usage").json()["usage"]] == ["", "b"]
    assert client.get("/api/usage", params={"since": "2999-01-01"}).json() == {"usage": []}
    assert client.get("/api/usage", params={"since": "yesterday"}).status_code == 400


def test_two_servers_add_to_the_same_sums(serve, put, workspace) -> None:
    put("a")
    first, second = serve(), serve()
    for running in (first, second, first):
        running.client().post("/v1/classify", json={"model": "a", "input": "x"})
        running.served.usage.flush()
    assert counted(workspace) == {"a": (3, 3, 3, 0)}


def test_what_cannot_be_written_is_kept_and_written_once(workspace, put) -> None:
    put("a")
    database, away = workspace.store.database(), [False]

    class Outage(type(database)):
        def adding(self):
            if away[0]:
                raise StoreError("the store is away")
            return super().adding()

    database.__class__ = Outage
    log = usage.UsageLog(database, clock=lambda: 86_399.0)
    log.add("default", "a", 1, 2, 3)
    away[0] = True
    with pytest.raises(StoreError):
        log.flush()
    log.add("default", "a", 1, 2, 3)
    away[0] = False
    log.flush()
    log.flush()
    assert [each.as_json() for each in usage.read_usage(database)] == [
        {"tenant": "default", "adapter": "a", "day": "1970-01-01", "requests": 2, "answers": 2, "prompt_tokens": 4,
         "completion_tokens": 6}
    ]  # fmt: skip


def test_a_server_of_a_read_only_store_counts_nothing_and_says_so(put, workspace) -> None:
    put("a")
    log = usage.UsageLog(
        type(workspace.store.database()).open_catalog(workspace.store.root / "turret.db", read_only=True)
    )
    log.add("default", "a", 1, 2, 3)
    log.flush()
    assert not log.counts
    assert counted(workspace) == {}


@pytest.mark.slow
def test_sigterm_loses_no_usage_and_sigkill_at_most_two_seconds(put, workspace, tmp_path) -> None:
    put("a")
    program = Path(__file__).parent / "echo_server.py"
    expected = 0
    for sign in (signal.SIGTERM, signal.SIGKILL):
        command = [sys.executable, program, str(workspace.store.root), "0"]
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx2.Client(base_url=url, trust_env=False) as client:
            for _ in range(20):
                assert client.post("/v1/classify", json={"model": "a", "input": "x"}).status_code == 200
            expected += 20
            if sign == signal.SIGKILL:
                time.sleep(usage.SECONDS + 1.0)
                assert client.post("/v1/classify", json={"model": "a", "input": "x"}).status_code == 200
        process.send_signal(sign)
        process.wait(timeout=30)
        process.stdout.close()
        requests = counted(workspace)["a"][0]
        assert expected <= requests <= expected + (sign == signal.SIGKILL)
        expected = requests


def test_turret_usage_prints_a_table_csv_and_json(workspace, put) -> None:
    put("a")
    log = usage.UsageLog(workspace.store.database(), clock=lambda: 0.0)
    workspace.with_access(Access("legal")).tokens.create("t")
    log.add("legal", "tax", 2, 30, 4)
    log.add("default", "", 1, 5, 6)
    log.flush()
    store = ["--store", str(workspace.store)]
    status, out, _ = typed("usage", "--csv", *store)
    assert (status, list(csv.reader(io.StringIO(out)))) == (0, [
        ["tenant", "adapter", "day", "requests", "answers", "prompt_tokens", "completion_tokens"],
        ["default", "", "1970-01-01", "1", "1", "5", "6"],
        ["legal", "tax", "1970-01-01", "1", "2", "30", "4"],
    ])  # fmt: skip
    assert [
        each["adapter"] for each in json.loads(typed("usage", "--tenant", "legal", "--json", *store)[1])["usage"]
    ] == ["tax"]
    assert "(base)" in typed("usage", *store)[1]
    assert typed("usage", "--since", "1970-01-02", *store)[1].startswith("no usage")
    assert typed("usage", "--since", "soon", *store)[0] == 2


def test_every_control_action_is_a_row_with_who_before_and_after(serve, put, workspace, monkeypatch) -> None:
    monkeypatch.setenv("TURRET_USER", "ada")
    for _ in range(3):
        put("a", accuracy=0.9)
    secret = workspace.tokens.create("boss", ALL)[1]
    client = serve().client(secret)
    post = {
        "/api/adapters/a@1/promote": {"alias": "production"},
        "/api/adapters/a@2/promote": {"alias": "production"},
        "/api/aliases/a/production/rollback": None,
        "/api/adapters/a@3/load": None,
        "/api/adapters/a@3/pin": None,
        "/api/adapters/a@3/unpin": None,
        "/api/adapters/a@3/unload": None,
        "/api/experiments/a/start": {"candidates": ["a@2"], "share": 0.2},
        "/api/experiments/a/ramp": {"share": 0.5},
        "/api/experiments/a/stop": {},
    }
    for path, body in post.items():
        assert client.post(path, json=body).status_code == 200, path
    workspace.gate("a", "production", add=["accuracy>=0.5"])
    workspace.delete("a@3")
    workspace.tokens.rotate("boss")
    workspace.tokens.revoke("boss")
    with workspace.store.database().reading() as connection:
        found = actions(connection)[::-1]
    assert [(each.who, each.verb, each.what) for each in found] == [
        *(("ada", "put", f"a@{number}") for number in (1, 2, 3)),
        ("ada", "token create", "token boss"),
        ("token boss", "promote", "a@production"),
        ("token boss", "promote", "a@production"),
        ("token boss", "rollback", "a@production"),
        *(("token boss", verb, "a@3") for verb in ("load", "pin", "unpin", "unload")),
        *(("token boss", f"experiment {verb}", "a#1") for verb in ("start", "ramp", "stop")),
        ("ada", "gate", "a@production"),
        ("ada", "delete", "a@3"),
        ("ada", "token rotate", "token boss"),
        ("ada", "token revoke", "token boss"),
    ]
    moves = [(each.before, each.after) for each in found if each.what == "a@production"]
    assert moves[:3] == [({"version": a}, {"version": b}) for a, b in ((None, 1), (1, 2), (2, 1))]
    assert moves[3] == ({"gates": []}, {"gates": ["test.accuracy>=0.5"]})
    (ramp,) = [each for each in found if each.verb == "experiment ramp"]
    assert ramp.before == {"weights": {"control": 0.8, "candidate": 0.2}}
    assert ramp.after["weights"] == {"control": 0.5, "candidate": 0.5}
    kept = workspace.tokens.list()[0]
    assert kept.hash not in str(found)
    assert str(kept.former_hash) not in str(found)


def test_the_audit_log_is_read_in_pages_by_admins_of_the_tenant(serve, put, workspace) -> None:
    for name in ("a", "b", "a"):
        put(name)
    own = workspace.tokens.create("t", ALL)[1]
    theirs = workspace.with_access(Access("other")).tokens.create("t", ALL)[1]
    limited = workspace.tokens.create("limited", ALL, adapters=["b"])[1]
    running = serve()
    client = running.client(own)
    page = client.get("/api/audit", params={"limit": 2}).json()
    assert [each["verb"] for each in page["actions"]] == ["token create", "token create"]
    page = client.get("/api/audit", params={"limit": 2, "before": page["before"]}).json()
    assert [each["what"] for each in page["actions"]] == ["a@2", "b@1"]
    last = client.get("/api/audit", params={"limit": 2, "before": page["before"]}).json()
    assert ([each["what"] for each in last["actions"]], last["before"]) == (["a@1"], None)
    assert [each["what"] for each in running.client(theirs).get("/api/audit").json()["actions"]] == ["token t"]
    assert [each["what"] for each in running.client(limited).get("/api/audit").json()["actions"]] == ["b@1"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/usage?since=2026-13-45",
        "/api/usage?until=2026-02-30",
        "/api/audit?since=2026-13-45",
        *(f"/api/audit?{field}=a%00b" for field in ("who", "verb", "what")),
        "/api/audit?who=%00",
    ],
)
def test_a_day_of_no_calendar_and_a_nul_are_refused(serve, put, path) -> None:
    put("a")
    client = serve().client()
    got = client.get(path)
    assert (got.status_code, "\n" in got.json()["error"]["message"]) == (400, False)
    assert client.get("/store" + path.removeprefix("/api")).status_code == 400
    assert client.get(path.partition("?")[0] + "?since=2026-02-28").status_code == 200


def test_a_token_that_expires_makes_none_that_lives_for_ages(serve, workspace) -> None:
    secret = workspace.tokens.create("boss", ALL, lifetime=86400.0)[1]
    client = signed_in(serve(), secret)
    page = post(client, "/store/tokens", name="long", scope="infer", expires="999999999d")
    assert (page.status_code, "so it makes none that lives longer" in page.text) == (403, True)
    assert [each.name for each in workspace.tokens.list()] == ["boss"]
    assert post(client, "/store/tokens", name="short", scope="infer", expires="1h").status_code == 200


def test_turret_audit_prints_who_did_what(workspace, put) -> None:
    put("a")
    workspace.promote("a@1", "production")
    store = ["--store", str(workspace.store)]
    found = json.loads(typed("audit", "--json", *store)[1])["actions"]
    assert [each["verb"] for each in found] == ["promote", "put"]
    assert '{"version": null} -> {"version": 1}' in typed("audit", *store)[1].replace("\n", " ")
    assert json.loads(typed("audit", "--limit", "1", "--json", *store)[1])["actions"] == found[:1]
    assert typed("audit", "--tenant", "legal", *store)[1] == "no action yet\n"
