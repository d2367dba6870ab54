"""Promises in a server: answers abstain, outcomes reach them by receipt, and a broken one is seen and acted on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from marks import few
from server.echo import LABELS, probabilities

import turret
from turret import audit
from turret.server import services
from turret.store import Version, promises
from turret.store.promises import Promise, Terms
from turret.workspace import Workspace

TERMS = Terms("error", 0.05, 0.95, 0.45, 500, 400, 8, 400, "x.csv", "test", "sha256:0", "alarm", 604800.0, 0.05)
TEXTS = [f"text {number}" for number in range(40)]


def promised(workspace: Workspace, version: Version, **changes: Any) -> Promise:
    with workspace.store.database().writing() as connection:
        return promises.make(connection, version, replace(TERMS, **changes))


def surest(version: Version, text: str) -> tuple[str, float]:
    found = probabilities(version.digest, text)
    label = max(found, key=lambda each: found[each])
    return label, found[label]


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.05)


def classify(client: Any, texts: str | list[str], model: str = "a") -> Any:
    answer = client.post("/v1/classify", json={"model": model, "input": texts})
    assert answer.status_code == 200, answer.text
    return answer


def test_answers_below_the_threshold_abstain_and_keep_their_label(workspace, put, serve) -> None:
    version, plain = put("a"), put("b")
    promised(workspace, version)
    client = serve().client()
    data = classify(client, TEXTS).json()["data"]
    for text, each in zip(TEXTS, data, strict=True):
        label, probability = surest(version, text)
        assert each["abstain"] == (probability < 0.45)
        assert (each["label"], each["probabilities"][label]) == (label, pytest.approx(probability))
    assert {each["abstain"] for each in data} == {True, False}
    assert {each["abstain"] for each in classify(client, TEXTS, "b").json()["data"]} == {None}, str(plain)
    text = client.get("/metrics").text
    abstained = sum(each["abstain"] for each in data)
    assert f'turret_promise_answers_total{{adapter="a@1",what="abstained"}} {abstained}.0' in text


def test_no_answer_of_a_new_version_slips_past_its_promise(workspace, put, serve) -> None:
    """The server has never seen the version, and its promise was made after the server started."""
    put("a")
    running = serve()
    client = running.client()
    classify(client, TEXTS[:1])
    running.served._followers.stop()  # nothing is read in the background any more
    version = put("a")
    promised(workspace, version, threshold=promises.NEVER)
    assert classify(client, TEXTS[:1], "a@2").json()["data"][0]["abstain"] is True


def test_a_changed_promise_is_followed(workspace, put, serve) -> None:
    version = put("a")
    promised(workspace, version, threshold=0.0)
    client = serve().client()
    assert classify(client, "hello").json()["data"][0]["abstain"] is False
    promised(workspace, version, threshold=promises.NEVER)
    until(lambda: classify(client, "hello").json()["data"][0]["abstain"] is True)


def tell(client: Any, told: list[tuple[str, Any]]) -> list[str]:
    found = client.post("/api/outcomes", json=[{"receipt": receipt, "value": value} for receipt, value in told])
    assert found.status_code == 200, found.text
    return [each["status"] for each in found.json()["outcomes"]]


@pytest.mark.slow
def test_outcomes_reach_a_promise_by_the_receipt_of_the_answer(workspace, put, serve) -> None:
    version = put("a")
    promised(workspace, version, threshold=0.0)
    client = serve().client()
    one, many = classify(client, "one"), classify(client, TEXTS[:3])
    label = one.json()["data"][0]["label"]
    other = next(each for each in LABELS if each != label)
    receipt, several = one.headers["turret-receipt"], many.headers["turret-receipt"]
    told = [(receipt, other), (f"{several}#0", 1), (many.json()["id"] + "#1", 0), (f"{several}#2", "odd"), (several, 1)]
    assert tell(client, told) == ["counted", "counted", "counted", "refused", "unknown"]
    assert tell(client, [(receipt, label)]) == ["repeated"]
    standing = workspace.promise("a").standing
    assert (standing.outcomes, standing.wrong) == (3, 2)


@pytest.mark.parametrize("when_broken", few(["rollback", "alarm", "stricter"], 1))
def test_a_broken_promise_is_seen_and_acted_on(workspace, put, serve, when_broken, monkeypatch) -> None:
    monkeypatch.setattr(services, "GUARD_SECONDS", 0.3)
    put("a")
    version = put("a")
    workspace.promote("a@1", "production")
    workspace.promote("a@2", "production")
    promised(workspace, version, threshold=0.0, when_broken=when_broken)
    running = serve()
    client = running.client()
    answers = classify(client, TEXTS)
    assert answers.headers["turret-version"] == "2"
    receipt = answers.headers["turret-receipt"]
    assert tell(client, [(f"{receipt}#{number}", 0) for number in range(40)]) == ["counted"] * 40
    until(lambda: 'turret_promise_breaks{adapter="a@2"} 1.0' in client.get("/metrics").text)
    with workspace.store.database().reading() as connection:
        verbs = [each.verb for each in audit.read_actions(connection)]
    assert verbs.count("promise broken") == 1
    assert any(line["event"] == "promise" for line in running.log())
    page = client.get("/adapters/a/2").text
    if when_broken == "alarm":
        assert 'turret_promise_state{adapter="a@2",state="broken"} 1.0' in client.get("/metrics").text
        assert "broken" in page
        assert classify(client, "x").json()["data"][0]["abstain"] is False
    elif when_broken == "stricter":
        until(lambda: classify(client, "x").json()["data"][0]["abstain"] is True)
        assert verbs[0] == "promise"
        assert "every answer goes to a person" in page
    else:
        until(lambda: classify(client, "x").headers["turret-version"] == "1")
        assert "rollback" in verbs


def test_while_an_experiment_covers_the_answer_a_number_is_its_outcome_and_a_label_the_promises(
    begin, workspace
) -> None:
    running = begin(share=0.5)
    versions = [workspace.resolve("a@1"), workspace.resolve("a@2")]
    for version in versions:
        promised(workspace, version, threshold=0.0)
    client = running.client()
    running.view.refresh()
    answer = client.post("/v1/classify", json={"model": "a", "input": "hello", "user": "ann"})
    receipt, label = answer.headers["turret-receipt"], answer.json()["data"][0]["label"]
    found = client.post("/api/outcomes", json=[{"receipt": receipt, "value": 1}, {"receipt": receipt, "value": label}])
    first, second = found.json()["outcomes"]
    assert (first["status"], first["experiment"]) == ("counted", "a#1")
    assert (second["status"], second["experiment"]) == ("counted", None)
    assert "counted for the promise of a@" in second["text"]


def test_another_tenants_promise_does_not_exist(workspace, put, serve) -> None:
    version = put("a")
    promised(workspace, version, threshold=0.0)
    _, mine = workspace.tokens.create("me", ["infer", "admin"])
    other = Workspace(workspace.store.root, tenant="legal")
    _, theirs = other.tokens.create("them", ["infer", "admin"])
    running = serve()
    answer = classify(running.client(mine), "hello")
    receipt = answer.headers["turret-receipt"]
    assert tell(running.client(theirs), [(receipt, 0)]) == ["unknown"]
    assert tell(running.client(mine), [(receipt, 0)]) == ["counted"], "the control"
    client = running.client(mine)
    until(lambda: "turret_promise_state" in client.get("/metrics").text)
    assert 'adapter="a@1"' not in running.client(theirs).get("/metrics").text


def test_answers_of_the_last_second_are_written_when_a_server_ends(workspace, put, serve) -> None:
    promised(workspace, put("a"), threshold=0.0)
    running = serve()
    running.served._followers.stop()
    classify(running.client(), TEXTS[:5])
    assert workspace.promise("a").answers == 0
    running.served.stop()
    assert workspace.promise("a").answers == 5


async def _asked(url: str) -> tuple[list[bool], str]:
    async with turret.AsyncClient(url) as client:
        answer = await client.classify(TEXTS[:4], "a")
        became = await client.outcome(answer.labels[0], receipt=f"{answer.receipt.id}#0")
        return answer.abstains, became["status"]


def test_the_python_client_has_what_abstains_and_sends_labels(workspace, put, serve) -> None:
    import asyncio

    version = put("a")
    promised(workspace, version, threshold=0.45)
    abstains, status = asyncio.run(_asked(serve().url))
    assert abstains == [surest(version, text)[1] < 0.45 for text in TEXTS[:4]]
    assert status == ("noted" if abstains[0] else "counted")
