"""`--on ray://HOST:PORT`: comparisons and sweeps on two nodes of Ray, with folders of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from workspace.test_cells_on_workers import digests, judged
from workspace.test_comparing import recipe_in
from workspace.test_other_machine import until
from workspace.test_sweeping import films

from turret.database import jobs
from turret.errors import RecipeError
from turret.store import leases
from turret.workspace import Workspace

# Ray's test cluster leaves its log files open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = recipe_in(tmp_path)
    with pytest.raises(RecipeError, match=r"needs Ray .*pip install 'turret\[ray\]'") as error:
        Workspace(tmp_path / "store").compare(recipe, methods="lora", against="lora", seeds=1, on="ray://head:10001")
    assert len(str(error.value)) < 300


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of two nodes, which do a job each at a time."""
    pytest.importorskip("ray", reason="needs turret[ray]")
    pytest.importorskip("grpc", reason="needs turret[ray]")
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(leases.VARIABLE, "4")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else its workers wait behind every other process here
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "ray_client_server_port": port})
    nodes.add_node(**node)
    try:
        yield f"ray://127.0.0.1:{port}"
    finally:
        nodes.shutdown()


def trainings() -> list[psutil.Process]:
    """The processes that train for tasks of Ray."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        words = each.info["cmdline"] or []
        if any(word in words for word in ("turret.workspace.job_process", "turret.workspace.resident_trainer")):
            found.append(each)
    return found


@pytest.mark.slow
@pytest.mark.fleet
def test_a_comparison_on_ray_with_a_lost_worker_and_a_killed_driver_says_what_a_local_one_says(
    tmp_path: Path, cluster: str, new_url: Callable[..., str]
) -> None:
    recipe = recipe_in(tmp_path, **{"train.max_steps": "40", "train.epochs": "20", "train.checkpoint_every": "1"})
    how: dict[str, Any] = {"methods": "base,lora,head", "against": "lora", "seeds": 1}
    expected = Workspace(tmp_path / "here").compare(recipe, **how)
    url = new_url(str(tmp_path / "files"))
    there = Workspace(url)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    words = [sys.executable, "-m", "turret", "compare", str(tmp_path / "recipe.toml"), "--on", cluster, "--store", url]
    words += ["--methods", "base,lora,head", "--against", "lora", "--seeds", "1", "--json"]
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def checkpoint() -> bool:
        return there.store.exists() and any("/checkpoint/" in e.path for e in there.store.artifacts.list_files("runs/"))

    until(checkpoint, 400)
    for each in trainings():  # the worker of Ray and all that it started
        each.parent().kill()
        each.kill()
    until(lambda: bool(trainings()), 200)  # Ray has started a task again
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert judged(found["rows"]) == judged(json.loads(json.dumps(expected.as_json()))["rows"])
    assert digests(Path(found["folder"])) == digests(Path(expected.folder))
    assert [each["state"] for each in there.runs()] == ["finished"] * 2, "each cell was trained once"
    assert any(each["result"]["resumed_from"] for each in there.runs())


@pytest.mark.slow
@pytest.mark.fleet
def test_a_sweep_on_ray_equals_a_local_one_and_a_mistake_is_not_tried_again(
    tmp_path: Path, cluster: str, new_url: Callable[..., str]
) -> None:
    recipe = films(tmp_path)
    lists = {"train.lr": "1e-5,1e-2"}
    expected = Workspace(tmp_path / "here").sweep(recipe, lists)
    there = Workspace(new_url(str(tmp_path / "files")))
    found = there.sweep(recipe, lists, on=cluster)
    assert [each.value for each in found.trials] == [each.value for each in expected.trials]
    assert len(there.list()) == 2
    wrong = there.sweep(recipe, {"data.text": "text,nothing"}, on=cluster)
    assert [each.state for each in wrong.trials] == ["finished", "failed"]
    with there.store.database().reading() as connection:
        assert set(connection.execute(select(jobs.c.tries).where(jobs.c.state == "failed")).scalars()) == {1}
