"""Trainings over HTTP: into the queue, listed, shown with their log, cancelled."""

from __future__ import annotations

import asyncio

import pytest
from store.bundles import tensors, write_bundle

import turret
from turret.compare.results import Confusions, Details, Reliability, RunReport
from turret.errors import DataError, InUse, NotFound, QueueFull
from turret.store import JobQueue
from turret.tasks import Mistake
from turret.tasks.calibration import Bin

RECIPE = 'name = "reviews"\nbase = "echo/base"\n[data]\nsource = "reviews.csv"\n'
FILES = {"reviews.csv": "text,label\ngood,1\nbad,0\n"}


@pytest.mark.slow
def test_a_client_submits_watches_and_cancels_a_training(serve, workspace) -> None:
    running = serve()

    async def clients() -> None:
        async with turret.AsyncClient(running.url) as client:
            run = await client.train(RECIPE, FILES, priority=2)
            assert (run["state"], run["queue"]["priority"]) == ("waiting", 2)
            assert [each["id"] for each in await client.runs()] == [run["id"]]
            assert (await client.run(run["id"]))["place"] == {"place": 1, "of": 1}
            with pytest.raises(InUse):
                await client.delete_run(run["id"])
            taken = JobQueue.of(workspace.store).take()
            assert taken is not None
            JobQueue.of(workspace.store).write_log(taken, ["reading /home/me/reviews.csv"])
            shown = await client.run(run["id"])
            assert shown["state"] == "running"
            assert [each["line"] for each in shown["log"]] == ["reading (a file)"]
            assert 'name = "reviews"' in shown["recipe"]
            assert (await client.cancel_run(run["id"]))["state"] == "running"
            with pytest.raises(NotFound):
                await client.run("20260101-000000-aaaaaa")
            with pytest.raises(DataError):
                await client.train(RECIPE)
            workspace.queue.limit("default", waiting=0)
            with pytest.raises(QueueFull):
                await client.train(RECIPE, FILES)

    asyncio.run(clients())
    assert "running" in running.client().get("/runs").text


CONFUSED = Confusions(("bad", "good"), ((7, 1), (0, 4)))
WRONG = Mistake(3, "<b>not</b> bad at all", "good", "bad", 0.0, 0.97, "0.97")
BINS = (Bin(0.8, 0.9, 5, 0.86, 0.8), Bin(0.9, 1.0, 7, 0.97, 1.0))


@pytest.mark.slow
def test_the_page_of_a_version_shows_what_its_training_got_wrong(serve, workspace, tmp_path) -> None:
    run = workspace.store.new_run("a", 'name = "a"', "sha256:x")
    details = Details((WRONG,), "classify", CONFUSED, {"": Reliability(0.05, BINS, 0.1, 1.4, 60)})
    workspace.store.training_runs().write_report(run, RunReport.of("test", 12, details).to_json())
    metrics = {"test": {"accuracy": 11 / 12, "loss": 0.2}}
    workspace.store.put("a", write_bundle(tmp_path, tensors(1)), run=run, metrics=metrics, result=lambda v: {})
    plain = workspace.store.put("a", write_bundle(tmp_path / "b", tensors(2)), metrics=metrics)
    client = serve().client()
    page = client.get("/adapters/a/1").text
    for words in (
        "On 12 test examples",
        "Right class by answered class",
        '<td class="good l5">7</td><td class="bad l1">1</td>',
        "&lt;b&gt;not&lt;/b&gt; bad at all",
        "5 answers with 0.80 to 0.90: 80% right",
        "with the temperature 1.4 that was fitted on 60 validation examples",
        "All 1.",
    ):
        assert words in page, words
    assert "<b>not" not in page
    got = client.get(f"/api/runs/{run.id}/report").json()
    assert (got["split"], got["examples"], got["wrong"]) == ("test", 12, 1)
    assert got["details"]["mistakes"][0]["asked"] == "<b>not</b> bad at all"
    assert "On 12 test" not in client.get(f"/adapters/a/{plain.number}").text
    bare = workspace.store.new_run("b", 'name = "b"', "sha256:x")
    missing = client.get(f"/api/runs/{bare.id}/report")
    assert (missing.status_code, "has no report" in missing.text) == (404, True)


def test_a_training_that_has_ended_is_deleted_and_its_version_stays(serve, put, workspace) -> None:
    run = workspace.store.new_run("a", 'name = "a"\n', "sha256:x")
    folder = run.folder
    client = serve().client()
    assert client.delete(f"/api/runs/{run.id}").status_code == 409
    version = put()
    workspace.store.end_run(run, "finished", result={"version": str(version)})
    assert client.delete(f"/api/runs/{run.id}").json() == {"deleted": run.id}
    assert client.get(f"/api/runs/{run.id}").status_code == 404
    assert client.delete(f"/api/runs/{run.id}").status_code == 404
    assert not folder.exists()
    assert workspace.resolve("a") == version


def test_a_request_that_makes_no_sense_is_said_in_one_line(serve) -> None:
    client = serve().client()
    for body, said in (
        ({"recipe": "name ="}, "is not TOML"),
        ({"recipe": RECIPE, "files": FILES, "priority": 200}, "priority"),
        ({"recipe": RECIPE, "file": FILES}, "unknown key"),
        ({"recipe": RECIPE.replace("reviews.csv", "/etc/passwd"), "files": FILES}, "is not in files"),
    ):
        got = client.post("/api/runs", json=body)
        assert got.status_code == 400, got.text
        assert said in got.json()["error"]["message"]
