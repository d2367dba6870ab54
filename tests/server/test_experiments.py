"""Experiments on live traffic: the arm of each request, and control over HTTP."""

from __future__ import annotations

import pytest
from server.arms import UNITS, arms, asked, of, status
from server.echo import probabilities

from turret.experiments import Guards
from turret.workspace import Workspace

# --- the arm of a request ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_unit_is_answered_by_its_arm_which_the_receipt_names_with_its_probability(begin, workspace) -> None:
    running = begin(share=0.3)
    client, router, seen = running.client(), workspace.router(), set()
    for unit in UNITS:
        found = router.choose(router.running("a"), unit)
        got = asked(client, unit)
        assert (got.status_code, got.json()["model"]) == (200, found.version)
        headers = got.headers
        assert (headers["turret-experiment"], headers["turret-arm"]) == ("a#1", found.arm)
        assert float(headers["turret-probability"]) == pytest.approx(found.probability)
        assert headers["turret-digest"] == workspace.resolve(found.version).digest
        seen.add(found.arm)
    assert seen == {"control", "candidate"}


@pytest.mark.slow
def test_a_unit_is_the_same_in_a_header_in_the_body_and_in_every_kind_of_answer(begin, workspace) -> None:
    running = begin(share=0.5)
    unit = of("candidate", workspace) + ""
    client, other = running.client(), of("control", workspace)
    said = {"turret-unit": unit}
    assert asked(client, None, **said).headers["turret-arm"] == "candidate"
    assert asked(client, other, **said).headers["turret-arm"] == "candidate"  # the header overrides the body
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
    ):
        for whose, arm, version in ((unit, "candidate", "2"), (other, "control", "1")):
            got = client.post(path, json={"model": "a", "user": whose, **body})
            assert (got.headers["turret-arm"], got.headers["turret-version"]) == (arm, version), path
    utf8 = client.post("/v1/classify", json={"model": "a", "input": "x"}, headers=[(b"turret-unit", "Zoë".encode())])
    assert utf8.headers["turret-arm"] == asked(client, "Zoë").headers["turret-arm"]
    for letters, wanted in (("ж" * 1024, 200), ("ж" * 1025, 400)):  # characters, not bytes
        said = [(b"turret-unit", letters.encode())]
        assert client.post("/v1/classify", json={"model": "a", "input": "x"}, headers=said).status_code == wanted


@pytest.mark.slow
def test_only_the_alias_under_experiment_is_routed_and_a_version_never(begin, workspace) -> None:
    running = begin(share=1.0)
    workspace.promote("a@3", "beta")
    running.view.refresh()
    client = running.client()
    for model, version, arm in (
        ("a", "a@2", "candidate"),
        ("a@production", "a@2", "candidate"),
        ("a@1", "a@1", None),
        ("a@2", "a@2", None),
        ("a@beta", "a@3", None),
    ):
        got = asked(client, "ann", model=model)
        assert (got.json()["model"], got.headers.get("turret-arm")) == (version, arm), model
    assert "turret-arm" not in client.post("/v1/completions", json={"model": "echo", "prompt": "x"}).headers


@pytest.mark.slow
def test_an_experiment_on_another_alias_leaves_plain_names_alone(begin, workspace) -> None:
    running = begin(share=1.0, alias="beta", control="a@1")
    got = asked(running.client(), "ann")
    assert (got.json()["model"], "turret-arm" in got.headers) == ("a@1", False)
    got = asked(running.client(), "ann", model="a@beta")
    assert (got.json()["model"], got.headers["turret-arm"]) == ("a@2", "candidate")


def test_who_says_no_unit_is_answered_by_the_alias_and_not_counted(begin, workspace) -> None:
    running = begin(share=1.0)
    for unit in (None, ""):
        got = asked(running.client(), unit)
        assert (got.json()["model"], got.headers["turret-arm"]) == ("a@1", "none")
        assert "turret-probability" not in got.headers
    running.view.routing.router.flush()
    assert sum(arms(workspace, "units").values()) == sum(arms(workspace, "answers").values()) == 0
    assert 'turret_experiment_uncounted_total{experiment="a#1"} 2.0' in running.client().get("/metrics").text


@pytest.mark.slow
def test_where_requests_are_the_unit_each_is_assigned_for_itself_whatever_it_says(begin, workspace) -> None:
    running = begin(share=0.5, unit="request")
    client = running.client()
    seen = {asked(client, unit).headers["turret-arm"] for unit in ["ann"] * 20 + [None] * 20}
    assert seen == {"control", "candidate"}
    got = asked(client)
    told = {"adapter": "a", "unit": got.headers["x-request-id"], "value": 1}
    assert client.post("/api/outcomes", json=told).json()["outcomes"][0]["status"] == "counted"
    assert sum(arms(workspace, "units").values()) == 41


def test_where_an_alias_is_moved_by_a_person_that_is_what_answers(begin, workspace) -> None:
    running = begin(share=1.0)
    client = running.client()
    assert asked(client, "ann").json()["model"] == "a@2"
    workspace.promote("a@3", "production")
    running.view.refresh()
    got = asked(client, "ann")
    assert (got.json()["model"], got.headers["turret-arm"]) == ("a@3", "none")
    shown = client.get("/api/experiments/a").json()["serving"]
    assert shown["in_force"] is False
    assert "a@production names a@3, not the control a@1" in shown["paused"]
    workspace.rollback("a")
    running.view.refresh()
    assert asked(client, "ann").json()["model"] == "a@2"


@pytest.mark.slow
def test_many_answers_are_each_of_the_arm_that_the_receipt_says_while_shares_move(begin, workspace) -> None:
    """Another process ramps during requests: every answer comes from the version in its receipt."""
    running = begin(share=0.1)
    client, other, seen = running.client(), Workspace(workspace.store.root), {"1": set(), "2": set()}
    for step in range(60):
        if step % 20 == 10:
            other.experiment("a").ramp(0.1 + step / 100)
            running.view.refresh()
        got = asked(client, f"u{step % 30}", "some text")
        version = got.headers["turret-version"]
        assert got.json()["data"][0]["probabilities"] == probabilities(got.headers["turret-digest"], "some text")
        assert got.headers["turret-arm"] == {"1": "control", "2": "candidate"}[version]
        seen[version].add(got.headers["turret-probability"])
    assert len(seen["1"]) > 1


# --- versions that load, and versions that do not --------------------------------------------------------------------


@pytest.mark.slow
def test_arms_are_loaded_before_they_answer_and_nobody_waits_for_them(serve, put, workspace, until) -> None:
    for _ in range(3):
        put()
    workspace.promote("a@1", "production")
    running = serve(load_seconds=0.3)
    client = running.client()
    until(lambda: client.get("/readyz").status_code == 200)
    Workspace(workspace.store.root).experiment("a").start("a@2", share=1.0, shadows="a@3")
    until(lambda: asked(client, "ann").json()["model"] == "a@2", seconds=5)
    assert running.engine.cold == []
    assert {"a@2", "a@3"} <= set(running.engine.loads)


@pytest.mark.slow
def test_a_server_that_begins_is_ready_once_the_arms_of_what_runs_are_loaded(put, workspace, serve, until) -> None:
    for _ in range(2):
        put()
    workspace.promote("a@1", "production")
    workspace.experiment("a").start("a@2", share=1.0)
    running = serve()
    client = running.client()
    until(lambda: client.get("/readyz").status_code == 200)
    assert asked(client, "ann").json()["model"] == "a@2"
    assert running.engine.cold == []


@pytest.mark.slow
def test_an_arm_that_cannot_be_loaded_is_an_error_of_the_arm_and_nobody_answers_for_it(begin, put, workspace) -> None:
    running = begin(share=0.5, guards=Guards(max_errors=0.02))
    running.engine.broken.add("a@2")
    running.engine.unload("a@2")
    client, bad, good = running.client(), of("candidate", workspace), of("control", workspace)
    for number in range(12):
        got = asked(client, bad, f"x {number}")
        assert (got.status_code, got.headers["turret-arm"], got.headers["turret-version"]) == (409, "candidate", "2")
        assert "secret" not in got.text
        assert asked(client, good).json()["model"] == "a@1"
    running.view.routing.router.flush()
    assert arms(workspace, "errors") == {"control": 0, "candidate": 12}
    assert arms(workspace, "units") == {
        "control": 1,
        "candidate": 1,
    }  # its assignment is logged: no sample-ratio mismatch
    metrics = client.get("/metrics").text
    assert 'turret_experiment_failures_total{adapter="a@2",arm="candidate",experiment="a#1"} 12.0' in metrics
    running.served._apply_guards()
    assert "answers were errors" in status(workspace)["verdict"]["why"]
    assert asked(client, bad).json()["model"] == "a@1"


@pytest.mark.slow
def test_an_arm_that_cannot_be_loaded_is_told_by_its_experiment(put, workspace, serve) -> None:
    for _ in range(2):
        put()
    workspace.promote("a@1", "production")
    running = serve()
    running.engine.broken.add("a@2")
    workspace.experiment("a").start("a@2", share=1.0)
    running.view.refresh()
    shown = running.client().get("/api/experiments/a").json()["serving"]
    assert shown["in_force"] is True
    assert "cannot be mounted: (a file)" in shown["problems"]["candidate"]


@pytest.mark.slow
def test_what_is_not_the_versions_doing_counts_for_nobody(begin, workspace) -> None:
    running = begin(share=1.0, engine={"waiting": 0})
    client = running.client()
    assert asked(client, "ann").status_code == 429
    assert client.post("/v1/completions", json={"model": "a", "user": "ann", "prompt": [-1]}).status_code == 400
    running.view.routing.router.flush()
    assert arms(workspace, "answers")["candidate"] == 0
    assert arms(workspace, "units")["candidate"] == 0


# --- control over HTTP -----------------------------------------------------------------------------------------------


def test_an_experiment_is_begun_ramped_looked_at_and_ended_over_http(serve, put, workspace) -> None:
    for _ in range(3):
        put()
    workspace.promote("a@1", "production")
    running = serve()
    client = running.client()
    body = {"candidates": ["a@2"], "shadows": ["a@3"], "steps": [0.2, 0.5], "guards": {"max_errors": 0.1}}
    begun = client.post("/api/experiments/a/start", json=body)
    assert begun.status_code == 200, begun.text
    assert begun.json()["serving"] == {"in_force": True, "paused": None, "problems": {}}
    assert begun.json()["guards"]["worse_by"] == 0
    assert set(running.engine.loads) == {"a@1", "a@2", "a@3"}
    assert client.post("/api/experiments/a/start", json=body).status_code == 409  # one at a time
    before = {unit: asked(client, unit).headers["turret-arm"] for unit in UNITS}
    ramped = client.post("/api/experiments/a/ramp").json()
    assert {each["arm"]: each["share"] for each in ramped["arms"]}["candidate"] == pytest.approx(0.5)
    after = {unit: asked(client, unit).headers["turret-arm"] for unit in UNITS}
    assert {unit for unit in UNITS if before[unit] == "candidate"} <= {u for u in UNITS if after[u] == "candidate"}
    assert client.post("/api/experiments/a/ramp").status_code == 409  # no further step is planned
    assert client.post("/api/experiments/a/ramp", json={"share": {"candidate": 0.6}}).status_code == 200
    listed = client.get("/api/experiments").json()
    assert [each["experiment"] for each in listed["experiments"]] == ["a#1"]
    assert listed["alpha"] == 0.05
    ended = client.post("/api/experiments/a/stop", json={"promote": "candidate"}).json()
    assert (ended["state"], ended["alias_names"]) == ("ended", "a@2")
    got = asked(client, "ann")
    assert (got.json()["model"], "turret-arm" in got.headers) == ("a@2", False)
    assert client.get("/api/experiments/a", params={"number": 1}).json()["state"] == "ended"
    client.post("/api/experiments/a/start", json={"candidates": ["a@3"]})
    assert client.post("/api/experiments/a/stop", json={"rollback": True}).json()["alias_names"] == "a@2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "verb", "body", "code"),
    [
        ("nobody", "start", {"candidates": ["nobody@1"]}, 404),
        ("..", "start", {"candidates": ["a@1"]}, 404),
        ("a", "start", {"candidates": ["a@9"]}, 404),
        ("a", "start", {"candidates": []}, 400),
        ("a", "start", {"candidates": ["a@2"], "metric": "5..1"}, 400),
        ("a", "start", {"candidates": ["a@2"], "steps": [0.5, 0.2]}, 400),
        ("a", "start", {"candidates": ["a@2"], "unit": "planet"}, 400),
        ("a", "start", {"candidates": ["a@2"], "weights": 1}, 400),
        ("a", "start", {"candidates": ["a@1"]}, 400),
        ("a", "ramp", {"share": 0.5}, 404),
        ("a", "stop", {}, 404),
        ("a", "stop", {"promote": "candidate", "rollback": True}, 400),
    ],
)
def test_what_cannot_be_meant_over_http_is_4xx_and_begins_nothing(
    serve, put, workspace, name, verb, body, code
) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    got = serve().client().post(f"/api/experiments/{name}/{verb}", json=body)
    assert got.status_code == code, got.text
    assert list(workspace.experiments()) == []


def test_an_experiment_does_not_begin_with_a_version_that_cannot_be_loaded(serve, put, workspace) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    running = serve()
    running.engine.broken.add("a@2")
    got = running.client().post("/api/experiments/a/start", json={"candidates": ["a@2"]})
    assert got.status_code == 409
    assert "secret" not in got.text
    assert list(workspace.experiments()) == []
