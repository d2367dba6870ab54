"""Shadows are compared with the answer, never returned, and delay no request."""

from __future__ import annotations

import time

import pytest
from server.arms import arms, asked, label, status

from turret.experiments import Guards
from turret.server.limits import RequestLimits


@pytest.mark.slow
def test_a_shadow_answers_the_same_texts_is_compared_and_never_returned(begin, workspace, until) -> None:
    running = begin((), shadows="a@3")
    client, texts = running.client(), [f"text {number}" for number in range(30)]
    for number, text in enumerate(texts, 1):
        got = asked(client, None, text)  # without candidates every request counts
        assert (got.json()["model"], got.headers["turret-arm"]) == ("a@1", "control")
        assert got.json()["data"][0]["label"] == label(workspace, "a@1", text)
        until(lambda put=number: running.engine.priorities.count(-1) == put and running.view.shadows.inputs == 0)
    running.view.routing.router.flush()
    (shadow,) = [each for each in status(workspace)["arms"] if each["role"] == "shadow"]
    agreed = sum(label(workspace, "a@1", text) == label(workspace, "a@3", text) for text in texts)
    assert 0 < agreed < len(texts)
    assert (shadow["answers"], shadow["compared"], shadow["agreed"], shadow["errors"]) == (30, 30, agreed, 0)
    assert running.engine.priorities.count(-1) == 30
    metrics = client.get("/metrics").text
    assert f'turret_experiment_shadows_total{{arm="shadow",experiment="a#1",what="agreed"}} {agreed}.0' in metrics


@pytest.mark.slow
def test_a_shadow_that_fails_or_dawdles_is_seen_by_its_experiment_and_by_nobody_else(begin, workspace, until) -> None:
    running = begin((), shadows="a@3", guards=Guards(max_errors=0.02))
    running.engine.broken.add("a@3")
    running.engine.unload("a@3")
    running.engine.load_seconds = 0.5  # of each attempt
    client, began = running.client(), time.monotonic()
    for _ in range(12):
        assert asked(client, "ann").json()["model"] == "a@1"
    assert time.monotonic() - began < 5  # 12 loads would take 6 s
    until(lambda: running.view.shadows.inputs == 0)
    running.view.routing.router.flush()
    assert arms(workspace, "errors") == {"control": 0, "shadow": 12}
    for number in range(12):  # its errors count beside answers of the control that came meanwhile
        running.served._apply_guards()
        if status(workspace)["state"] == "ended":
            break
        asked(client, f"bob {number}")
        until(lambda: running.view.shadows.inputs == 0)
        running.view.routing.router.flush()
    assert status(workspace)["state"] == "ended"


def test_shadows_are_shed_when_there_is_no_room_for_them_and_answers_go_on(begin, workspace, until) -> None:
    running = begin((), shadows="a@3", engine={"limits": RequestLimits(shadow_inputs=2)})
    client = running.client()
    body = {"model": "a", "input": ["x"] * 3}
    assert client.post("/v1/classify", json=body).status_code == 200
    assert running.engine.priorities.count(-1) == 0
    assert 'arm="shadow",experiment="a#1",what="shed"} 1.0' in client.get("/metrics").text
    assert client.post("/v1/classify", json={"model": "a", "input": ["x"] * 2}).status_code == 200
    until(lambda: running.engine.priorities.count(-1) == 2 and running.view.shadows.inputs == 0)


@pytest.mark.slow
def test_a_server_that_ends_takes_its_shadows_back_and_writes_the_last_of_its_log(begin, workspace) -> None:
    running = begin("a@2", share=0.5, shadows="a@3", engine={"pace": 0.05})
    client = running.client()
    long = " ".join("w" for _ in range(200))
    body = {"model": "a", "prompt": "x", "user": "ann"}
    assert client.post("/v1/completions", json=body).status_code == 200
    body = {"model": "a", "prompt": long, "max_tokens": 200, "stream": True, "user": "bob"}
    with client.stream("POST", "/v1/completions", json=body) as got:
        next(got.iter_lines())
    running.stop()
    assert sum(arms(workspace, "units").values()) == 2
    assert sum(arms(workspace, "answers")[arm] for arm in ("control", "candidate")) == 1
    assert running.view.shadows.inputs == 0
