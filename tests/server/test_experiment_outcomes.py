"""Outcomes over HTTP: each counts once, needs a token, and reaches the status."""

from __future__ import annotations

import random

import pytest
from server.arms import arms, asked, status

from turret.experiments import Guards
from turret.server.limits import RequestLimits


@pytest.mark.slow
def test_each_outcome_over_http_has_one_clear_answer_and_a_unit_counts_once(begin, workspace) -> None:
    running = begin(share=0.5)
    client = running.client()
    first, second, other, last = (asked(client, unit) for unit in ("ann", "ann", "bob", "cid"))
    told = [
        {"value": 1, "receipt": first.headers["turret-receipt"]},
        {"value": 0, "receipt": first.json()["id"]},  # the same answer, by the id in its body
        {"value": True, "receipt": second.headers["turret-receipt"]},
        {"value": 1, "receipt": "nothing like it"},
        {"value": 0.5, "receipt": other.headers["turret-receipt"]},
        {"value": 0, "adapter": "a", "unit": "bob"},
        {"value": 0, "adapter": "a", "unit": "nobody"},
        {"value": 0, "adapter": "nobody", "unit": "ann"},
        {"value": 0, "adapter": "../../etc", "unit": "ann"},
    ]
    got = client.post("/api/outcomes", json=told)
    assert got.status_code == 200, got.text
    found = [each["status"] for each in got.json()["outcomes"]]
    assert found == ["counted", "repeated", "noted", "unknown", "refused", "counted", *["unknown"] * 3]
    assert got.json()["counts"] == {"counted": 2, "repeated": 1, "noted": 1, "unknown": 4, "refused": 1}
    assert sum(arms(workspace, "outcomes").values()) == 2
    client.post("/api/experiments/a/stop")
    one = client.post("/api/outcomes", json={"value": 1, "receipt": last.headers["turret-receipt"]}).json()
    assert [each["status"] for each in one["outcomes"]] == ["late"]
    assert "a#1 ended 20" in one["outcomes"][0]["text"]
    assert 'turret_experiment_outcomes_total{experiment="a#1",status="counted"} 2.0' in client.get("/metrics").text


@pytest.mark.slow
def test_a_streamed_answer_has_its_outcome_too(begin) -> None:
    client = begin(share=0.5).client()
    body = {"model": "a", "prompt": "one two", "stream": True, "user": "ann"}
    with client.stream("POST", "/v1/completions", json=body) as got:
        receipt = got.headers["turret-receipt"]
        list(got.iter_lines())
    told = client.post("/api/outcomes", json={"value": 1, "receipt": receipt}).json()
    assert told["outcomes"][0]["status"] == "counted"


def test_the_id_in_the_body_of_a_response_is_its_receipt_too(begin) -> None:
    client = begin(share=0.5).client()
    got = client.post("/v1/responses", json={"model": "a", "input": "one two", "user": "ann"})
    assert got.json()["id"] == "resp_" + got.headers["turret-receipt"]
    told = client.post("/api/outcomes", json={"value": 1, "receipt": got.json()["id"]}).json()
    assert told["outcomes"][0]["status"] == "counted"


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"value": 1},
        {"value": "x", "unit": "u", "adapter": "a"},
        {"value": "", "receipt": "r"},
        {"value": "x" * 1001, "receipt": "r"},
        {"value": 1, "receipt": "r", "unit": "u"},
        {"value": 1, "unit": "u"},
        {"value": 1e300, "receipt": "r"},
        {"value": None, "receipt": "r"},
        [{"value": 1, "receipt": "r"}] * 1001,
        {"value": 1, "receipt": "r" * 201},
        {"value": 1, "unit": "u" * 1025, "adapter": "a"},
    ],
)
def test_what_is_no_outcome_is_400(shared, body) -> None:
    assert shared.client().post("/api/outcomes", json=body).status_code == 400


@pytest.mark.slow
def test_outcomes_take_either_scope_and_control_takes_admin(begin, workspace) -> None:
    _, infer = workspace.tokens.create("reader")
    _, admin = workspace.tokens.create("boss", ["admin"])
    running = begin(share=0.5)
    told = {"value": 1, "receipt": "r"}
    anyone, reader, boss = running.client(), running.client(infer), running.client(admin)
    for client, outcome, control in ((anyone, 401, 401), (reader, 200, 403), (boss, 200, 200)):
        assert client.post("/api/outcomes", json=told).status_code == outcome
        assert client.get("/api/experiments").status_code == control
        assert client.get("/api/experiments/a").status_code == control
    for verb in ("start", "ramp", "stop"):
        assert reader.post(f"/api/experiments/a/{verb}").status_code == 403
    assert status(workspace)["state"] == "running"


@pytest.mark.slow
def test_too_many_who_tell_outcomes_are_told_to_come_again_and_answers_go_on(begin, workspace) -> None:
    running = begin(share=0.5, engine={"limits": RequestLimits(outcomes_waiting=0)})
    got = running.client().post("/api/outcomes", json={"value": 1, "receipt": "r"})
    assert (got.status_code, got.headers["retry-after"]) == (429, "1")
    assert asked(running.client(), "ann").status_code == 200


@pytest.mark.slow
def test_a_sample_ratio_mismatch_is_shown_over_http_before_any_verdict(begin, workspace) -> None:
    running = begin(share=0.5, guards=Guards(promote=True))
    client, draw, told = running.client(), random.Random(0), []
    router = running.view.routing.router
    for number in range(800):  # that many requests over HTTP would take a minute
        found = router.assign("a", f"u{number}", f"r{number}")
        value = int(draw.random() < (0.3 if found.arm == "control" else 0.7))
        if found.arm == "control" or draw.random() < 0.5:  # the candidate's outcomes are lost half of the time
            told.append({"value": value, "receipt": f"r{number}"})
    assert client.post("/api/outcomes", json=told).json()["counts"] == {"counted": len(told)}
    shown = client.get("/api/experiments/a").json()
    assert shown["sample_ratio"]["ok"] is False
    alarm, taken_back = shown["verdicts"]
    assert alarm.startswith("OUTCOMES MISSING")
    assert taken_back.endswith("was better than control before that: this verdict is taken back")
    running.served._apply_guards()
    assert client.get("/api/experiments/a").json()["state"] == "running"
