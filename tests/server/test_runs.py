"""Trainings over HTTP: into the queue, listed, shown with their log, cancelled."""

from __future__ import annotations

import asyncio

import pytest

import turret
from turret.errors import DataError, InUse, NotFound, QueueFull
from turret.store import JobQueue

RECIPE = 'name = "reviews"\nbase = "echo/base"\n[data]\nsource = "reviews.csv"\n'
FILES = {"reviews.csv": "text,label\ngood,1\nbad,0\n"}


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
