"""The control plane shows the store, memory and aliases, and changes them."""

from __future__ import annotations

import csv
import threading
from pathlib import Path
from typing import Any

import pytest
from server.console_forms import post
from server.echo import probabilities

from turret.server.limits import RequestLimits


def test_the_store_is_listed_by_pages_with_what_is_in_memory(serve, put) -> None:
    versions = [put("a"), put("a"), put("b", accuracy=0.5)]
    client = serve().client()
    client.post("/api/adapters/a@2/load")
    first = client.get("/api/adapters", params={"limit": 2}).json()
    assert [each["version"] for each in first["adapters"]] == ["a@1", "a@2"]
    assert [each["loaded"] for each in first["adapters"]] == [False, True]
    assert first["after"] == "a@2"
    rest = client.get("/api/adapters", params={"limit": 2, "after": "a@2"}).json()
    assert [each["version"] for each in rest["adapters"]] == ["b@1"]
    assert rest["after"] is None
    assert rest["adapters"][0]["metrics"] == {"test": {"accuracy": 0.5}}
    assert [each["version"] for each in client.get("/api/adapters?name=b").json()["adapters"]] == ["b@1"]
    shown = client.get("/api/adapters/a@2").json()
    assert (shown["digest"], shown["loaded"]) == (versions[1].digest, True)
    assert client.get("/api/adapters/a@9").status_code == 404
    assert client.get("/api/adapters/A@9").status_code == 404


def test_the_versions_of_a_comparison_are_one_line_of_the_list(serve, put) -> None:
    put()
    for _ in range(3):
        put(comparison="comparisons/a-0123456789")
    client = serve().client()
    first = client.get("/api/adapters", params={"limit": 1}).json()
    assert [each["version"] for each in first["adapters"]] == ["a@1"]
    assert first["after"] is None
    (line,) = first["comparisons"]
    assert (line["comparison"], line["first"], line["last"]) == ("comparisons/a-0123456789", "a@2", "a@4")
    own = client.get("/api/adapters", params={"comparison": line["comparison"], "limit": 2}).json()
    assert [each["version"] for each in own["adapters"]] == ["a@2", "a@3"]
    assert (own["comparisons"], own["after"]) == ([], "a@3")
    assert client.get("/api/adapters/a").json()["version"] == "a@1"


def test_load_pin_unpin_and_unload(serve, put) -> None:
    version = put()
    put()
    client = serve(slots=1).client()
    assert client.post("/api/adapters/a@1/load", json={"pin": True}).json() == {
        "version": "a@1",
        "digest": version.digest,
    }
    (loaded,) = client.get("/api/loaded").json()["loaded"]
    assert (loaded["version"], loaded["pinned"]) == ("a@1", True)
    assert client.post("/api/adapters/a@1/unpin").status_code == 200
    assert client.post("/api/adapters/a@1/unload").status_code == 200
    assert client.get("/api/loaded").json() == {"loaded": []}
    assert client.post("/api/adapters/a@1/unload").status_code == 404
    assert client.post("/api/adapters/a@2/pin").status_code == 200
    assert client.post("/api/adapters/a@7/load").status_code == 404
    assert client.post("/api/adapters/a@1/load", json={"pin": "yes"}).status_code == 400


def test_promote_loads_first_then_moves_and_rollback_goes_back(serve, put, workspace) -> None:
    put()
    put()
    running = serve()
    client = running.client()
    for reference in ("a@1", "a@2"):
        moved = client.post(f"/api/adapters/{reference}/promote", json={"alias": "production"}).json()
        assert (moved["version"], moved["serving"]) == (reference, reference)
    assert running.engine.loads == ["a@1", "a@2"]
    back = client.post("/api/aliases/a/production/rollback").json()
    assert (back["version"], back["before"], back["serving"]) == ("a@1", "a@2", "a@1")
    assert client.post("/v1/classify", json={"model": "a", "input": "x"}).json()["model"] == "a@1"
    assert running.engine.cold == []
    assert client.post("/api/aliases/a/production/rollback").status_code == 404
    assert str(workspace.resolve("a")) == "a@1"


def test_promote_of_what_cannot_be_loaded_moves_nothing(serve, put, workspace) -> None:
    put()
    put()
    put("z", base="sha256:another")
    workspace.promote("a@1", "production")
    running = serve()
    running.engine.broken.add("a@2")
    client = running.client()
    got = client.post("/api/adapters/a@2/promote", json={"alias": "production"})
    assert got.status_code == 409
    assert "secret" not in got.text
    assert str(workspace.resolve("a")) == "a@1"
    assert client.post("/api/adapters/z@1/promote", json={"alias": "production"}).status_code == 409


def test_a_move_of_an_alias_is_kept_with_the_token_that_asked_for_it(serve, put, workspace) -> None:
    put()
    put()
    secrets = {name: workspace.tokens.create(name, ["admin"])[1] for name in ("ann", "bob")}
    running = serve()
    for reference, name in (("a@1", "ann"), ("a@2", "bob")):
        got = running.client(secrets[name]).post(f"/api/adapters/{reference}/promote", json={"alias": "production"})
        assert got.status_code == 200
    running.client(secrets["ann"]).post("/api/aliases/a/production/rollback")
    workspace.promote("a@2", "candidate")  # in this process
    *asked, own = (move["who"] for move in workspace.show("a@1")["alias_history"])
    assert asked == ["token ann", "token bob", "token ann"]
    assert own == workspace.resolve("a@1").who


@pytest.mark.parametrize("version", ["1" * 5000, "1" * 10, "\u0661", "-1", ""])
def test_a_version_that_a_form_names_is_a_short_number(serve, put, workspace, version) -> None:
    put()
    workspace.panels.create("p", {"q": "a@1"})
    client = serve().client()
    for path in ("/adapters/a/move/promote", "/panels/p/promote"):
        got = post(client, path, version=version, alias="production")
        assert (got.status_code, "expected a number of at most 9 digits" in got.text) == (400, True)
        assert post(client, path, version="1", alias="production").status_code == 303


def test_gates_hold_and_are_told(serve, put, workspace) -> None:
    put(accuracy=0.5)
    workspace.gate("a", "production", add=["accuracy>=0.9"])
    client = serve().client()
    got = client.post("/api/adapters/a@1/promote", json={"alias": "production"})
    assert (got.status_code, got.json()["error"]["code"]) == (409, "gate_failed")
    got = client.post("/api/adapters/a@1/promote", json={"alias": "beta", "require": ["loss<1"]})
    assert got.json()["error"]["code"] == "gate_failed"
    got = client.post("/api/adapters/a@1/promote", json={"alias": "beta", "require": ["nonsense"]})
    assert (got.status_code, "bad gate 'nonsense': expected a metric" in got.text) == (400, True)
    got = client.post("/api/adapters/a@1/promote", json={"alias": "Beta"})
    assert (got.status_code, "bad alias 'Beta': expected 1 to 32" in got.text) == (400, True)


def test_as_many_golden_examples_are_taken_as_the_schema_says(serve, put) -> None:
    put()
    client = serve().client()
    table = "text,label\n" + "".join(f"{'long ' * 200}{number},odd\n" for number in range(150))
    assert 100_000 < len(table) < 200_000  # more than other bodies of `/api/` may have
    got = client.post("/api/adapters/a/gates", json={"golden": table, "share": 0.9})
    assert got.status_code == 200, got.text
    assert client.post("/api/adapters/a/promote", json={"alias": "x" * 100_000}).status_code == 413


def golden(workspace, folder: Path, digest: str, texts: list[str], wrong: int | None = None) -> None:
    """Golden examples for `a@production`: the answers of the version of that digest. wrong: place of a false one."""
    rows = []
    for place, text in enumerate(texts):
        found = probabilities(digest, text)
        rows.append([text, (min if place == wrong else max)(found, key=lambda label: found[label])])
    with (folder / "golden.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    workspace.gate("a", "production", golden=folder / "golden.csv")


@pytest.mark.slow
def test_golden_examples_are_asked_behind_everybody_and_nobody_waits_for_them(serve, put, workspace, tmp_path) -> None:
    version, texts = put(), [f"text {number}" for number in range(200)]
    golden(workspace, tmp_path, version.digest, texts)
    running = serve(pace=0.02)
    moved: list[dict[str, Any]] = []

    def promote() -> None:
        got = running.client().post("/api/adapters/a@1/promote", json={"alias": "production"})
        moved.append(got.json())

    promoting = threading.Thread(target=promote)
    promoting.start()
    client, answered = running.client(), 0
    while promoting.is_alive():
        assert client.get("/api/aliases").status_code == 200
        assert client.get("/healthz").status_code == 200
        answered += client.post("/v1/classify", json={"model": "a@1", "input": "x"}).status_code == 200
    promoting.join()
    assert answered > 3
    assert moved[0]["serving"] == "a@1"
    (replay,) = moved[0]["replays"]
    assert (replay["passed"], replay["total"], replay["first"]) == (200, 200, None)
    assert running.engine.priorities.count(-1) == 200
    again = client.post("/api/adapters/a@1/promote", json={"alias": "production"}).json()
    assert again["replays"] == moved[0]["replays"]  # the answers were kept
    assert running.engine.priorities.count(-1) == 200
    body = {"alias": "production", "replay": True}
    assert client.post("/api/adapters/a@1/promote", json=body).json()["replays"][0]["passed"] == 200
    assert running.engine.priorities.count(-1) == 400


def test_a_wrong_golden_answer_is_named_and_moves_nothing(serve, put, workspace, tmp_path) -> None:
    version = put()
    golden(workspace, tmp_path, version.digest, ["one", "two", "three"], wrong=1)
    got = serve().client().post("/api/adapters/a@1/promote", json={"alias": "production"})
    assert (got.status_code, got.json()["error"]["code"]) == (409, "gate_failed")
    assert "1 of 3 golden examples failed" in got.json()["error"]["message"]
    assert "example 2 'two'" in got.json()["error"]["message"]
    assert workspace.resolve("a@1").aliases == ()


def test_a_full_queue_is_waited_for_by_golden_examples(serve, put, workspace, tmp_path) -> None:
    version = put()
    golden(workspace, tmp_path, version.digest, [f"text {number}" for number in range(20)])
    got = serve(waiting=8, pace=0.01).client().post("/api/adapters/a@1/promote", json={"alias": "production"})
    assert got.status_code == 200, got.text
    assert got.json()["replays"][0]["passed"] == 20


def test_many_promotes_with_golden_examples_are_told_to_come_again_and_sigterm_ends_the_asking(
    serve, put, workspace, tmp_path, until
) -> None:
    version = put()
    golden(workspace, tmp_path, version.digest, [f"text {number}" for number in range(500)])
    running = serve(pace=0.05)
    told: list[tuple[int, str]] = []

    def promote() -> None:
        got = running.client().post("/api/adapters/a@1/promote", json={"alias": "production"})
        told.append((got.status_code, got.json()["error"]["code"]))

    threads = [threading.Thread(target=promote) for _ in range(6)]
    for each in threads:
        each.start()
    until(lambda: len(told) == 2)
    assert told == [(429, "busy")] * 2
    running.server.drain()
    for each in threads:
        each.join()
    assert told[2:] == [(503, "draining")] * 4
    assert workspace.resolve("a@1").aliases == ()


def test_verify_finds_a_flipped_bit_and_promote_refuses_it(serve, put, workspace) -> None:
    put()
    client = serve().client()
    assert client.post("/api/adapters/a@1/verify").json()["ok"] is True
    path = workspace.store.files("a@1")["adapter_model.safetensors"]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert client.post("/api/adapters/a@1/verify").json()["ok"] is False
    got = client.post("/api/adapters/a@1/promote", json={"alias": "beta"})
    assert (got.status_code, got.json()["error"]["code"]) == (500, "corrupt")
    assert str(workspace.store.root) not in got.text


@pytest.mark.slow
def test_50_bad_loads_in_a_row_and_floods_of_loads_leave_good_traffic_alone(serve, put) -> None:
    put()
    for _ in range(8):
        put("b")
    running = serve(slots=4, limits=RequestLimits(control_waiting=8))
    running.engine.broken.add("b@1")
    ended, answered, statuses = threading.Event(), [], []

    def ask() -> None:
        client = running.client()
        while not ended.is_set():
            answered.append(client.post("/v1/classify", json={"model": "a", "input": "x"}).status_code)

    def flood(number: int) -> None:
        client = running.client()
        for turn in range(12):
            verb = ("load", "unload")[turn % 2]
            statuses.append(client.post(f"/api/adapters/b@{number}/{verb}").status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    client = running.client()
    assert {client.post("/api/adapters/b@1/load").status_code for _ in range(50)} == {409}
    floods = [threading.Thread(target=flood, args=(number,)) for number in range(2, 9)]
    for each in floods:
        each.start()
    for each in floods:
        each.join()
    ended.set()
    asking.join()
    assert set(answered) == {200}
    assert len(answered) > 10
    assert set(statuses) <= {200, 404, 429}  # another request unloaded it, or it must wait
    assert len(running.engine.loaded()) <= 4


@pytest.mark.slow
def test_control_that_waits_too_long_in_line_is_told_to_come_again(serve, put) -> None:
    put()
    running = serve(load_seconds=0.5, limits=RequestLimits(control_waiting=2))
    statuses: list[int] = []

    def load() -> None:
        statuses.append(running.client().post("/api/adapters/a@1/load").status_code)

    loads = [threading.Thread(target=load) for _ in range(6)]
    for each in loads:
        each.start()
    for each in loads:
        each.join()
    assert 200 in statuses
    assert 429 in statuses


def test_the_status_says_what_is_served(serve, put) -> None:
    put()
    said = serve().client().get("/api/status").json()
    assert said["base"] == {"id": "echo", "fingerprint": "sha256:echo"}
    assert (said["ready"], said["draining"]) == (True, False)
    assert said["engine"]["queue_length"] == 0


def test_a_base_in_a_folder_is_called_by_its_last_name(serve, put) -> None:
    put()
    running = serve()
    running.engine.base.id = "/secret/place/my-base"
    client = running.client()
    assert client.get("/v1/models").json()["data"][0]["id"] == "my-base"
    assert "secret" not in client.get("/api/status").text
    assert client.post("/v1/completions", json={"model": "my-base", "prompt": "x"}).status_code == 200
