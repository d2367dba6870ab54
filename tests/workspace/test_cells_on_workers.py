"""Cells that `turret worker`s take from the queue: killed workers, a killed driver, and one job at a time."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from workspace.test_comparing import recipe_in
from workspace.test_other_machine import until

from turret.database import CELL, jobs
from turret.errors import RecipeError
from turret.recipe import Recipe
from turret.store import leases
from turret.workspace import Workspace

# What differs between two comparisons that do the same; the numbers of versions tell which training ended first.
MEASURED = {"versions", "made", "folder", "report", "command", "costs", "created", "wall_seconds"}


def kill_all(process: subprocess.Popen[str]) -> None:
    """A machine that is lost: the worker and all that it started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()


def judged(value: Any) -> Any:
    """What a comparison says, without times and memory."""
    if isinstance(value, dict):
        return {key: judged(each) for key, each in value.items() if key not in MEASURED and not key.endswith("seconds")}
    return [judged(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.slow
def test_a_comparison_on_workers_says_what_a_local_one_says_and_trains_each_cell_once(
    tmp_path: Path, start: Any
) -> None:
    """One of two workers is killed in a training, and so is the driver."""
    recipe = recipe_in(tmp_path, **{"train.max_steps": "40", "train.epochs": "20", "train.checkpoint_every": "1"})
    how = {"methods": "base,lora,head", "against": "lora", "seeds": 2}
    local = Workspace(tmp_path / "local")
    expected = local.compare(recipe, **how)
    there = Workspace(tmp_path / "there")
    command = [sys.executable, "-m", "turret", "compare", str(tmp_path / "recipe.toml"), "--on", "workers"]
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    command += ["--methods", how["methods"], "--against", "lora", "--seeds", "2", "--store", str(tmp_path / "there")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    lost, other = (start(str(tmp_path / "there"), "--slots", "1") for _ in range(2))
    until(lambda: any(len(list(there.curve(each["id"]))) > 1 for each in there.runs() if lives(there, each, lost)), 400)
    kill_all(lost)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    found = there.compare(recipe, **how, on="workers")
    other.terminate()
    other.communicate(timeout=100)
    assert judged(found.as_json()) == judged(expected.as_json())
    assert digests(Path(found.folder)) == digests(Path(expected.folder))
    assert len(there.list()) == 4
    runs = there.runs()
    assert [each["state"] for each in runs] == ["finished"] * 4
    assert any(each["result"]["resumed_from"] for each in runs), "the killed worker's cell went on"


@pytest.mark.slow
@pytest.mark.fleet
def test_a_comparison_and_a_sweep_through_three_workers_in_a_storm_say_what_local_ones_say(
    tmp_path: Path, start: Any, new_url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One PostgreSQL and S3, a folder for each machine; a worker that has a job is lost again and again."""
    monkeypatch.setenv(leases.VARIABLE, "3")
    url, draw, lost = new_url(), random.Random(42), 0
    machine = lambda name: url.replace(str(tmp_path / "local"), str(tmp_path / name))
    steps = {"train.max_steps": "60", "train.epochs": "20", "train.checkpoint_every": "2", "data.validation": "10"}
    recipe = recipe_in(tmp_path, **steps)
    how, settings = {"methods": "base,lora,head", "against": "lora", "seeds": 2}, {"train.lr": "1e-5,1e-3,1e-2"}
    alone = Workspace(tmp_path / "alone")
    expected, searched = alone.compare(recipe, **how), alone.sweep(recipe, settings)
    there = Workspace(machine("desk"))
    assert not there.list()
    workers = [start(machine(f"worker{place}"), "--slots", "1") for place in range(3)]
    with ThreadPoolExecutor(2) as drivers:
        compared = drivers.submit(there.compare, recipe, **how, on="workers")
        swept = drivers.submit(Workspace(machine("other desk")).sweep, recipe, settings, on="workers")
        while not (compared.done() and swept.done()):
            time.sleep(draw.uniform(0.2, 1))
            place = draw.randrange(3)
            running = select(jobs.c.id, jobs.c.tries).where(jobs.c.kind == CELL, jobs.c.state == "running")
            with there.store.database().reading() as connection:
                cells = connection.execute(running).all()
            tries = [each.tries for each in cells if lives(there, {"id": each.id}, workers[place])]
            if lost < 6 and tries and max(tries) == 1:  # a job is tried three times
                kill_all(workers[place])
                workers[place], lost = start(machine(f"worker{place}{lost}"), "--slots", "1"), lost + 1
        found, again = compared.result(), swept.result()
    for each in workers:
        each.terminate()
        each.communicate(timeout=100)
    assert lost >= 3
    assert judged(found.as_json()) == judged(expected.as_json())
    assert digests(Path(found.folder)) == digests(Path(expected.folder))
    assert [each.value for each in again.trials] == [each.value for each in searched.trials]
    assert again.ranked[0].settings == searched.ranked[0].settings
    assert [each["state"] for each in there.runs()] == ["finished"] * 7, "4 trainings and 3 trials, each once"
    assert len(there.list()) == 7
    assert there.store.verify().problems == ()


def digests(folder: Path) -> dict[str, str | None]:
    """Cell -> the digest of its version."""
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("cells/*/result.json")}
    return {key: each["digest"] if each["version"] else None for key, each in results.items()}


def lives(workspace: Workspace, run: Any, process: subprocess.Popen[str]) -> bool:
    """Whether a process, or one that it started, has a run."""
    ours = {process.pid, *(each.pid for each in psutil.Process(process.pid).children(recursive=True))}
    with workspace.store.database().reading() as connection:
        rows = connection.execute(leases.leases.select().where(leases.leases.c.name == f"jobs/{run['id']}")).all()
    return any(int(row.process.split("/")[2]) in ours for row in rows)


@pytest.mark.slow
def test_a_worker_does_one_job_and_ends_with_its_state(tmp_path: Path, start: Any) -> None:
    recipe, workspace = recipe_in(tmp_path), Workspace(tmp_path / "store")
    where = str(tmp_path / "store")
    good, other = (
        workspace.queue.submit(recipe)["id"],
        workspace.queue.submit(recipe.with_overrides({"seed": "2"}))["id"],
    )
    bad = workspace.queue.submit(recipe.with_overrides({"data.text": "nothing"}))["id"]

    def ended(*words: str) -> tuple[int, str]:
        process = start(where, *words)
        _, err = process.communicate(timeout=300)
        return process.returncode, err

    for _ in range(2):  # idempotent
        assert ended("--job", other, "--exit")[0] == 0
    assert [workspace.run(each)["state"] for each in (good, other, bad)] == ["waiting", "finished", "waiting"]
    assert ended("--job", bad, "--exit")[0] == 1
    assert ended("--exit")[0] == 0
    assert [workspace.run(each)["state"] for each in (good, bad)] == ["finished", "failed"]
    assert len(workspace.list()) == 2
    status, err = ended("--job", "nothing", "--exit")
    assert (status, err.strip().splitlines()[-1][:25]) == (1, "turret: no job 'nothing':")
    assert ended("--exit")[0] == 0, "nothing is due"


def test_who_can_run_cells_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--on somewhere: expected workers"):
        Workspace(tmp_path / "store").compare(Recipe(name="a", base="b", data="c.csv"), on="somewhere")
