"""Trainings through the queue: real ones, by worker processes that are killed, stopped and replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workspace.test_comparing import recipe_in
from workspace.test_other_machine import forget_machine, until

from turret import kernels
from turret.cli.main import run as command
from turret.errors import DataError, NotFound, RecipeError
from turret.recipe import Recipe
from turret.store import leases
from turret.workspace import Workspace

FLEET = [pytest.mark.slow, pytest.mark.fleet]
STEPS = {"train.epochs": "3", "train.checkpoint_every": "1", "train.max_steps": "none"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "store")


# --- submitting -------------------------------------------------------------------------------------------------------


def test_the_command_line_submits_lists_shows_and_cancels(tmp_path, workspace, capsys) -> None:
    (tmp_path / "bert").mkdir()  # a base, as far as the queue is concerned
    recipe_in(tmp_path)
    store = ["--store", str(workspace.store.root)]
    data = ["train", str(tmp_path / "reviews.csv"), "--name", "reviews", "--base", str(tmp_path / "bert")]
    assert command([*data, "--queue", "--priority", "3", *store, "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert (run["state"], run["queue"]["priority"], run["queue"]["tries"]) == ("waiting", 3, 0)
    assert command(["runs", *store]) == 0
    listed = capsys.readouterr().out
    assert run["id"] in listed
    assert "waiting" in listed
    assert command(["runs", "list", *store]) == 0
    assert capsys.readouterr().out == listed
    assert command([*data, "--queue", "--priority", "4", *store, "--json"]) == 0
    capsys.readouterr()
    assert command(["runs", "show", run["id"], *store]) == 0
    assert "place 2 of the 2 that wait" in capsys.readouterr().out
    assert command(["runs", "delete", run["id"], *store]) == 1
    assert "is not deleted, because it waits" in capsys.readouterr().err
    assert command(["runs", "cancel", run["id"], *store]) == 0
    assert command(["runs", "show", run["id"], *store, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (shown["state"], shown["log"]) == ("cancelled", [])
    assert 'name = "reviews"' in shown["recipe"]
    assert command(["runs", "delete", run["id"], *store]) == 0
    assert command(["runs", "show", run["id"], *store]) == 1
    assert f"no run '{run['id']}'" in capsys.readouterr().err
    assert command(["runs", "limit", "default", "--waiting", "0", *store]) == 0
    assert command([*data, "--queue", *store]) == 1
    assert "1 trainings of tenant default wait already, and 0 may" in capsys.readouterr().err


def test_the_store_gets_a_copy_of_the_data_under_a_name_that_every_machine_has(tmp_path, new_url) -> None:
    (tmp_path / "bert").mkdir()
    workspace, recipe = Workspace(new_url(str(tmp_path / "files"))), recipe_in(tmp_path)
    first = workspace.queue.submit(recipe)
    kept = Recipe.from_toml(str(workspace.run(first["id"])["recipe"]))
    assert kept.data.source.endswith("/reviews.csv")
    assert not Path(kept.data.source).is_absolute()
    content = workspace.store.artifacts.read(f"queued/{kept.data.source}")
    assert content == (tmp_path / "reviews.csv").read_bytes()
    again = workspace.queue.submit(recipe.with_overrides({"seed": "2"}))
    assert Recipe.from_toml(str(workspace.run(again["id"])["recipe"])).data.source == kept.data.source
    assert len(workspace.store.artifacts.listed("queued/")) == 1


@pytest.mark.parametrize("source", ["/etc/passwd", "runs/../../x.csv", "-", "missing.csv", "~/x.csv", f"{'0' * 32}/x"])
def test_a_client_cannot_name_a_file_of_the_server(workspace, source) -> None:
    recipe = Recipe(name="a", base="auto", data={"source": source})
    with pytest.raises(DataError, match="is not in files"):
        workspace.queue.submit_texts(recipe, {"reviews.csv": b"text,label\n"})
    with pytest.raises(RecipeError, match="expected a Hub id or pypi:package, not a path"):
        workspace.queue.submit_texts(
            Recipe(name="a", base="/models/secret", data={"source": "reviews.csv"}), {"reviews.csv": b"text,label\n"}
        )
    for name in ("../reviews.csv", "a\0.csv", "a\n.csv", "a\\b.csv", "é" * 120 + ".csv", "\ud800.csv", ".csv"):
        named = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": name})})
        with pytest.raises(DataError, match="is not a plain file name"):
            workspace.queue.submit_texts(named, {name: b"text,label\n"})


def test_data_that_is_missing_or_from_stdin_is_refused_when_it_is_submitted(workspace) -> None:
    for source, said in (("./nothing.csv", "there is no file or folder"), ("-", "data from stdin cannot wait")):
        with pytest.raises(DataError, match=said):
            workspace.queue.submit(Recipe(name="a", base="auto", data={"source": source}))
    with pytest.raises(NotFound):
        workspace.queue.log("20260101-000000-aaaaaa")


# --- working ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(new_url: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The URL of one store as a machine of this name uses it, with a folder of its own."""
    monkeypatch.setenv(leases.VARIABLE, "4")
    kernels.library()  # compiled before the workers start, which would each compile them
    url = new_url()
    return lambda name: url.replace(str(tmp_path / "local"), str(tmp_path / name))


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *more: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-m", "turret", "worker", "--store", url, *more], subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd="/"))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


@pytest.mark.slow
def test_a_worker_of_a_folder_store_trains_what_waits_and_keeps_the_log(tmp_path, workspace, start) -> None:
    recipe = recipe_in(tmp_path)
    good, bad = workspace.queue.submit(recipe), workspace.queue.submit(recipe.with_overrides({"data.text": "nothing"}))
    worker = start(str(workspace.store.root), "--until-empty")
    _, err = worker.communicate(timeout=200)
    assert worker.returncode == 0, err
    assert workspace.run(good["id"])["state"] == "finished"
    assert [str(version) for version in workspace.list()] == ["reviews@1"]
    assert workspace.show("reviews@1")["run"]["id"] == good["id"]
    lines = [each["line"] for each in workspace.queue.log(good["id"])]
    assert any(line.startswith("step 3 of 3, loss") for line in lines)
    assert [record.step for record in workspace.curve(good["id"])] == [1, 2, 3]
    failed = workspace.run(bad["id"])
    assert (failed["state"], failed["queue"]["tries"]) == ("failed", 1)
    assert "nothing" in failed["error"]
    assert workspace.queue.log(bad["id"])[-1]["line"] == failed["error"]


def checkpointed(workspace: Workspace, run: str) -> Callable[[], bool]:
    return lambda: any("/checkpoint/" in each.path for each in workspace.store.artifacts.listed(f"runs/{run}/"))


class TestFleet:
    pytestmark = FLEET

    def test_a_killed_workers_training_goes_on_from_its_checkpoint_on_another_machine(
        self, machine, start, tmp_path
    ) -> None:
        workspace = Workspace(machine("desk"))
        run = workspace.queue.submit(recipe_in(tmp_path, **STEPS))["id"]
        first = start(machine("one"))
        until(checkpointed(workspace, run))
        os.kill(first.pid, signal.SIGKILL)
        time.sleep(3)  # its training ends, because its worker did
        forget_machine(machine("one"))
        second = start(machine("two"), "--until-empty")
        until(lambda: workspace.run(run)["state"] == "finished", 150)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 0, err
        done = workspace.run(run)
        assert done["result"]["resumed_from"] > 0
        assert [record.step for record in workspace.curve(run)] == list(range(1, done["result"]["timing"]["steps"] + 1))
        assert [str(version) for version in workspace.list()] == ["reviews@1"]

    def test_a_worker_that_is_stopped_returns_its_training_which_does_not_count_as_a_try(
        self, machine, start, tmp_path
    ) -> None:
        workspace = Workspace(machine("desk"))
        run = workspace.queue.submit(recipe_in(tmp_path, **STEPS))["id"]
        first = start(machine("one"))
        until(lambda: workspace.run(run)["state"] == "running" and bool(workspace.queue.log(run)))
        first.terminate()
        _, err = first.communicate(timeout=60)
        assert first.returncode == 0, err
        assert (workspace.run(run)["state"], workspace.run(run)["queue"]["tries"]) == ("waiting", 0)
        second = start(machine("two"), "--until-empty")
        _, err = second.communicate(timeout=150)
        assert second.returncode == 0, err
        assert workspace.run(run)["state"] == "finished"

    def test_a_running_training_that_is_cancelled_ends_after_its_step(self, machine, start, tmp_path) -> None:
        workspace = Workspace(machine("desk"))
        run = workspace.queue.submit(recipe_in(tmp_path, **STEPS | {"train.epochs": "2000"}))["id"]
        start(machine("one"))
        until(lambda: any(each["line"].startswith("step") for each in workspace.queue.log(run)))
        assert workspace.queue.cancel(run)["state"] == "running"
        until(lambda: workspace.run(run)["state"] == "cancelled", 30)
        assert list(workspace.list()) == []

    def test_two_workers_share_the_trainings_of_two_tenants(self, machine, start, tmp_path) -> None:
        recipe = recipe_in(tmp_path)
        tenants = {name: Workspace(machine("desk"), name) for name in ("legal", "sales")}
        runs = {
            name: [workspace.queue.submit(recipe.with_overrides({"seed": str(seed)}))["id"] for seed in range(2)]
            for name, workspace in tenants.items()
        }
        workers = [start(machine(name), "--until-empty") for name in ("one", "two")]
        for each in workers:
            _, err = each.communicate(timeout=230)
            assert each.returncode == 0, err
        for name, workspace in tenants.items():
            found = [workspace.run(run) for run in runs[name]]
            assert [(each["state"], each["queue"]["tries"]) for each in found] == [("finished", 1)] * 2
            assert sorted(each["result"]["version"] for each in found) == ["reviews@1", "reviews@2"]
            assert [str(version) for version in workspace.list()] == ["reviews@1", "reviews@2"]
            assert {each["id"] for each in workspace.runs()} == set(runs[name])
