"""What was begun on one machine goes on on another: two folders, one store on PostgreSQL and S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from workspace.test_comparing import recipe_in

from turret.store import Store, leases
from turret.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.fleet]
SECONDS = "4"  # of a lease, so that a machine waits no longer for another one
STEPS = ["--set", "train.epochs=3", "--set", "train.checkpoint_every=1", "--set", "data.test=20", "--json"]


@pytest.fixture
def machine(new_url: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The URL of one store as a machine of this name uses it, with a folder of its own."""
    monkeypatch.setenv(leases.VARIABLE, SECONDS)
    url = new_url()
    return lambda name: url.replace(str(tmp_path / "local"), str(tmp_path / name))


def start(url: str, verb: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "turret", verb, str(folder / "reviews.csv"), "--base", str(folder / "bert")]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *STEPS, *more, "--store", url], stdout=pipe, stderr=pipe, text=True)


def forget_machine(url: str) -> None:
    """Make its processes invisible, as those of another machine are: nobody can tell that they are dead."""
    from sqlalchemy import update

    with Store(url).database().writing() as connection:
        connection.execute(update(leases.leases).values(process="other-boot/1/1/1", host="far"))


def until(check: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def test_a_training_that_was_killed_goes_on_on_another_machine_to_the_same_last_bit(machine, tmp_path) -> None:
    recipe_in(tmp_path)
    store = Store(machine("one"))
    whole = start(machine("two"), "train", tmp_path, "--name", "whole")
    out, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    first = start(machine("one"), "train", tmp_path, "--name", "cut")
    until(lambda: any("/checkpoint/" in each.path for each in store.artifacts.list_files("runs/")))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    forget_machine(machine("one"))
    second = start(machine("two"), "train", tmp_path, "--name", "cut")
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    said = json.loads(out)
    assert said["resumed_from"] > 0
    names = {each: Workspace(machine("three")).show(each) for each in ("whole", "cut")}
    tensors = {each: shown["files"]["adapter_model.safetensors"]["digest"] for each, shown in names.items()}
    assert tensors["whole"] == tensors["cut"]
    (run,) = [each for each in store.runs() if each["name"] == "cut"]
    assert run["state"] == "finished"
    curve = Workspace(machine("three")).curve(run["id"])
    assert [record.step for record in curve] == list(range(1, said["timing"]["steps"] + 1))
    assert store.verify().ok


def test_a_comparison_that_was_killed_goes_on_on_another_machine(machine, tmp_path) -> None:
    recipe_in(tmp_path)
    store, more = Store(machine("one")), ("--methods", "full,lora", "--seeds", "1", "--set", "train.max_steps=3")
    first = start(machine("one"), "compare", tmp_path, *more)
    until(lambda: any(each.path.endswith("/result.json") for each in store.artifacts.list_files("comparisons/")))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    time.sleep(3)  # its training ends, because its parent did
    forget_machine(machine("one"))
    kept = {each.path: each.blob for each in store.artifacts.list_files("comparisons/") if "result" in each.path}
    assert len(kept) == 1
    second = start(machine("two"), "compare", tmp_path, *more)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    said = json.loads(out)
    assert said["missing"] == 0
    assert len(Workspace(machine("three")).list()) == 2, "what was trained is not trained again"
    after = {each.path: each.blob for each in store.artifacts.list_files("comparisons/")}
    assert kept.items() <= after.items()
    (report,) = Workspace(machine("three")).comparisons()
    assert "reviews" in Workspace(machine("three")).report(report["key"])
    assert not {each["state"] for each in store.runs()} & {"running"}


def test_two_machines_do_not_conduct_one_comparison(machine, tmp_path) -> None:
    recipe_in(tmp_path)
    more = ("--methods", "full,lora", "--seeds", "1", "--set", "train.max_steps=3")
    store, first = Store(machine("one")), start(machine("one"), "compare", tmp_path, *more)

    def held() -> bool:
        if not store.exists():
            return False
        with store.database().reading() as connection:
            return bool(leases.held_leases(connection, "comparisons/"))

    until(held)
    second = start(machine("two"), "compare", tmp_path, *more)
    _, err = second.communicate(timeout=100)
    assert second.returncode == 1
    assert "another process runs the comparison comparisons/reviews-" in err
    _, err = first.communicate(timeout=200)
    assert first.returncode == 0, err
    assert len(store.list()) == 2
