"""`turret serve --train`: a real server trains what is in the queue on the base that answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import save_base

from turret.recipe import Recipe
from turret.store import Store
from turret.workspace import Workspace, training
from turret.workspace.resident import ALONE, read_adapter

pytestmark = pytest.mark.slow
TEXTS = ["a great film", "a dull story", "the market in london"]
Start = Callable[..., str]


def recipe(folder: Path, seed: int, family: str = "bert", **train: Any) -> Recipe:
    base, data = folder / family, folder / "rows.jsonl"
    if not base.exists():
        save_base(family, base)
    if not data.exists():
        rows = [{"text": f"{TEXTS[number % 2]} {number}", "label": ("good", "bad")[number % 2]} for number in range(48)]
        data.write_text("\n".join(map(json.dumps, rows)))
    return Recipe(
        name=f"news-{seed}",
        base=str(base),
        data={"source": str(data), "test": 8, "validation": 8},
        task={"kind": "classify"},
        method={"kind": "lora", "r": 4},
        train={"max_steps": 6, "batch_size": 8, "lr": 1e-3, "dtype": "float32"} | train,
        seed=seed,
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def serve(*more: str) -> str:
        command = [sys.executable, "-m", "turret", "serve", "--base", str(tmp_path / "bert"), "--dtype", "float32"]
        command += ["--port", "0", "--store", str(tmp_path / "store"), "--json", "--train", *more]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout is not None
        serve.process = processes[-1]  # type: ignore[attr-defined]
        return str(json.loads(processes[-1].stdout.readline())["url"])

    yield serve
    for each in processes:
        each.kill()
        each.communicate()


def ask(url: str, version: str, text: str) -> Any:
    body = json.dumps({"model": version, "input": text}).encode()
    request = urllib.request.Request(f"{url}/v1/classify", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def until(true: Callable[[], Any], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


def trained_alone(folder: Path, recipe: Recipe) -> str:
    """The version that a process of its own makes, in the store `own`."""
    return training.train(Store(folder / "own"), recipe, training.Callbacks(), fresh=True, place=ALONE).version


def tensors(store: Store, version: str) -> dict[str, list[float]]:
    adapter = read_adapter(store, version)[1]
    return {name: each.flatten().tolist() for name, each in {**adapter.tensors, **adapter.head}.items()}


def states(workspace: Workspace, runs: list[str]) -> list[str]:
    return [str(workspace.run(run)["state"]) for run in runs]


def test_a_server_trains_what_is_queued_and_answers_as_before(tmp_path: Path, start: Start) -> None:
    """The versions are those of `turret train`. Meanwhile every answer is the same, bit for bit."""
    workspace = Workspace(tmp_path / "store")
    first = workspace.train(recipe(tmp_path, 0))
    alone = [trained_alone(tmp_path, recipe(tmp_path, seed)) for seed in (1, 2)]
    url = start("--train-pass-ms", "60000")
    before = [ask(url, first.version, text) for text in TEXTS]
    runs = [str(workspace.queue.submit(recipe(tmp_path, seed))["id"]) for seed in (1, 2)]
    other = str(workspace.queue.submit(recipe(tmp_path, 3, family="roberta"))["id"])
    meanwhile: list[list[Any]] = []

    end = time.monotonic() + 240
    while states(workspace, runs) != ["finished"] * 2:
        assert time.monotonic() < end
        meanwhile.append([ask(url, first.version, text) for text in TEXTS])
        assert not set(states(workspace, runs)) & {"failed", "cancelled"}

    assert len(meanwhile) > 1
    assert all(each == before for each in meanwhile)
    own = Store(tmp_path / "own")
    assert [tensors(workspace.store, f"news-{seed}@1") for seed in (1, 2)] == [tensors(own, each) for each in alone]
    assert tensors(own, alone[0]) != tensors(own, alone[1])  # another seed gives other numbers
    assert ask(url, "news-1@1", TEXTS[0]) != before[0]  # the new version answers too
    assert states(workspace, [other]) == ["waiting"]  # its base does not serve here: another worker takes it


def test_a_server_that_ends_returns_its_trainings_and_one_that_dies_costs_them_no_try(
    tmp_path: Path, start: Start
) -> None:
    workspace = Workspace(tmp_path / "store")
    long = {"max_steps": 60, "epochs": 60, "checkpoint_every": 1}
    whole = trained_alone(tmp_path, recipe(tmp_path, 1, **long))
    run = str(workspace.queue.submit(recipe(tmp_path, 1, **long))["id"])

    def stepped(more: int) -> Callable[[], bool]:
        folder = workspace.store.root / "runs" / run
        return lambda: (folder / "curve.jsonl").exists() and (folder / "curve.jsonl").read_text().count("\n") >= more

    start("--train-pass-ms", "60000")
    until(stepped(5))
    start.process.send_signal(signal.SIGTERM)  # type: ignore[attr-defined]
    assert start.process.wait(120) == 0  # type: ignore[attr-defined]
    assert states(workspace, [run]) == ["waiting"]

    start("--train-pass-ms", "60000")
    until(stepped(15))
    start.process.kill()  # type: ignore[attr-defined]
    start.process.wait()  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "turret", "worker", "--until-empty", "--store", str(tmp_path / "store")]
    until(lambda: subprocess.run(command, check=True) and states(workspace, [run]) == ["finished"])

    assert tensors(workspace.store, "news-1@1") == tensors(Store(tmp_path / "own"), whole)
    assert int(workspace.run(run)["queue"]["tries"]) <= 2  # the death of the server was not the run's


def test_passes_are_as_short_as_asked_for_and_another_worker_goes_on_with_them(tmp_path: Path, start: Start) -> None:
    workspace = Workspace(tmp_path / "store")
    one = recipe(tmp_path, 1)
    start("--train-pass-ms", "1", "--train-percent", "20", "--train-slots", "1")
    run = str(workspace.queue.submit(one)["id"])
    until(lambda: states(workspace, [run]) == ["finished"])
    stored = workspace.run(run)["recipe"]
    assert "micro_batch_tokens = 64" in str(stored)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_server_that_ends_while_a_training_begins_leaves_it_in_the_queue_and_it_is_published_once(
    how: signal.Signals, tmp_path: Path, start: Start
) -> None:
    """At several moments after the server has taken the run, before its first step."""
    workspace, runs, begun = Workspace(tmp_path / "store"), list[str](), list[bool]()
    for seed, pause in enumerate((0.0, 0.1, 0.5)):
        runs.append(str(workspace.queue.submit(recipe(tmp_path, seed))["id"]))
        start("--train-pass-ms", "60000")
        until(lambda: states(workspace, runs[-1:]) == ["running"])
        time.sleep(pause)
        begun.append(not (workspace.store.root / "runs" / runs[-1] / "curve.jsonl").exists())
        start.process.send_signal(how)  # type: ignore[attr-defined]
        status = start.process.wait(120)  # type: ignore[attr-defined]
        if how == signal.SIGTERM:
            assert status == 0
            assert set(states(workspace, runs)) <= {"waiting", "finished"}, "none stays running"
            assert states(workspace, runs[-1:]) == ["waiting"] or not begun[-1]
    assert any(begun), "the control: a stop came before the first step"
    command = [sys.executable, "-m", "turret", "worker", "--until-empty", "--store", str(tmp_path / "store")]
    until(lambda: subprocess.run(command, check=True) and states(workspace, runs) == ["finished"] * 3)
    assert [len(workspace.list(f"news-{seed}")) for seed in range(3)] == [1, 1, 1]
    assert all(int(workspace.run(run)["queue"]["tries"]) <= 2 for run in runs)
