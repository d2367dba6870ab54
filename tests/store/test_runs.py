"""A run belongs to one living process; a dead or interrupted run can be resumed with the same recipe and data."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from turret.errors import BadReference
from turret.store import Store

RECIPE, DATA = "name = 'a'\n", "sha256:data"


def test_a_run_has_a_sortable_id_and_a_folder_with_its_recipe(store) -> None:
    run = store.new_run("a", RECIPE, DATA)
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", run.id)
    assert run.folder == store.root / "runs" / run.id
    assert run.recipe.read_text() == RECIPE
    assert run.lease.fence == 1
    store.end_run(run, "finished")


def test_an_interrupted_run_is_taken_up_by_the_same_recipe_and_data_only(store) -> None:
    run = store.new_run("a", RECIPE, DATA)
    store.end_run(run, "interrupted", error="stopped")
    assert store.unfinished_run(RECIPE + "seed = 2\n", DATA) is None
    assert store.unfinished_run(RECIPE, "sha256:other") is None
    again = store.unfinished_run(RECIPE, DATA)
    assert again is not None
    assert again.id == run.id
    assert again.lease.fence > run.lease.fence
    store.end_run(again, "finished")


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_an_ended_run_is_not_taken_up(store, state) -> None:
    store.end_run(store.new_run("a", RECIPE, DATA), state)
    assert store.unfinished_run(RECIPE, DATA) is None


def test_a_running_run_is_left_to_its_process(store) -> None:
    run = store.new_run("a", RECIPE, DATA)
    assert Store(store.location).unfinished_run(RECIPE, DATA) is None
    store.end_run(run, "interrupted")


def test_the_run_of_a_killed_process_is_taken_up(store, where) -> None:
    child = (
        "import os, signal, sys; from turret.store import Store\n"
        f"run = Store(sys.argv[1]).new_run('a', {RECIPE!r}, {DATA!r})\n"
        "print(run.id, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", child, where], capture_output=True, text=True, check=False)
    assert killed.returncode == -9
    run = store.unfinished_run(RECIPE, DATA)
    assert run is not None
    assert run.id == killed.stdout.strip()
    store.end_run(run, "finished")


def test_the_newest_of_several_unfinished_runs_is_taken_up_first(store) -> None:
    held = [store.new_run("a", RECIPE, DATA) for _ in range(3)]
    for run in held:
        store.end_run(run, "interrupted")
    newest = max(run.id for run in held)
    first = store.unfinished_run(RECIPE, DATA)
    second = store.unfinished_run(RECIPE, DATA)
    assert first is not None
    assert second is not None
    assert first.id == newest
    assert second.id != newest
    store.end_run(first, "finished")
    store.end_run(second, "finished")


@pytest.mark.slow
def test_a_run_of_a_bad_name_is_refused(store) -> None:
    with pytest.raises(BadReference):
        store.new_run("../a", RECIPE, DATA)
