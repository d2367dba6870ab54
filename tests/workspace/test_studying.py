"""Comparisons and sweeps that wait in the queue: a worker conducts them, and no command waits."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from workspace.test_cells_on_workers import judged
from workspace.test_comparing import recipe_in
from workspace.test_other_machine import until

from turret.access import Access
from turret.errors import InUse, NotFound, RecipeError
from turret.recipe import Recipe
from turret.workspace import Workspace, sweeping
from turret.workspace.queueing import ComparisonRequest, Order, SweepOrder, as_spec, order_of

METHODS = ComparisonRequest(methods="base,lora", against="lora", seeds=2)


def put(workspace: Workspace, recipe: Recipe, order: Order) -> dict[str, Any]:
    """Into the queue, as a server does."""
    files = {"reviews.csv": Path(recipe.data.source)}
    sent = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": "reviews.csv"})})
    return workspace.queue.submit_sent(sent, files, own_base=recipe.base, study=as_spec(order, "reviews.csv"))


def test_an_order_is_what_was_written() -> None:
    for order in (METHODS, SweepOrder({"train.lr": "1e-4..1e-2"}, trials=4)):
        assert order_of(as_spec(order, "a.csv")) == order


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.source": "/etc/passwd,/etc/hosts"}, "a sweep searches settings of method and train"),
        ({"base": "/a,/b"}, "a sweep searches settings"),
        ({"train.init_from": "a@1,b@2"}, "a sweep searches settings"),
        ({"train.trackers": "wandb,mlflow"}, "a sweep searches settings"),
        ({"method.r": "4,many"}, "method.r"),
        ({"train.lr": "1e-3"}, "nothing to search"),
        ({"method.r": ",".join(map(str, range(1, 40))), "train.lr": ",".join(map(str, range(1, 40)))}, "at most 500"),
    ],
)
def test_what_a_client_may_search(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        sweeping.split(SweepOrder(settings), Recipe(name="a", base="b", data="a.csv"))


@pytest.mark.slow
def test_a_worker_conducts_what_commands_would(tmp_path: Path) -> None:
    """A comparison and a sweep end with what the same calls find here, and their cells are in the row."""
    recipe = recipe_in(tmp_path, **{"data.validation": "10", "train.checkpoint_every": "1"})
    alone, there = Workspace(tmp_path / "alone"), Workspace(tmp_path / "there")
    searched = SweepOrder({"train.lr": "1e-5,1e-2", "train.max_steps": "4"})
    ids = [put(there, recipe, order)["id"] for order in (METHODS, searched)]
    there.queue.work(until_empty=True)
    comparison, sweep = map(there.queue.study, ids)
    assert [each["state"] for each in (comparison, sweep)] == ["finished"] * 2, (comparison["error"], sweep["error"])
    assert [each["id"] for each in there.queue.studies()] == ids[::-1]

    expected = alone.compare(recipe, methods="base,lora", against="lora", seeds=2)
    result = comparison["result"]
    assert (result["metric"], result["planned"], result["missing"]) == (expected.metric, 4, 0)
    assert [(each["title"], each["state"]) for each in result["cells"]] == [
        ("base", "finished"),
        ("lora", "finished"),
    ] * 2
    (report,) = there.comparisons()
    assert report["key"] == result["report"]
    assert judged(report["rows"]) == judged(expected.as_json()["rows"])
    of_lora = [each["score"] for each in result["cells"] if each["title"] == "lora"]
    mean = next(row.score.mean for row in expected.rows if row.kind == "lora" and row.score)
    assert 100 * sum(of_lora) / 2 == pytest.approx(mean)

    found = alone.sweep(recipe, searched.settings)
    assert [each["score"] for each in sweep["result"]["cells"]] == [each.value for each in found.trials]
    best = tomllib.loads(sweep["result"]["recipe"])
    assert (best["data"]["source"], best["train"]["lr"]) == ("reviews.csv", found.best.train.lr)
    assert all(version.comparison for version in there.list()), "a plain name never means one of them"
    with pytest.raises(InUse, match="is finished"):
        there.queue.cancel(ids[0])


@pytest.mark.slow
def test_a_comparison_goes_on_after_its_worker_and_ends_with_its_cells(tmp_path: Path, start: Any) -> None:
    recipe = recipe_in(tmp_path, **{"train.max_steps": "4000", "train.epochs": "2000"})
    there = Workspace(tmp_path / "there")
    id = put(there, recipe, ComparisonRequest(methods="lora,head", against="lora", seeds=1))["id"]
    states = lambda: [each["state"] for each in (there.queue.study(id)["result"] or {}).get("cells", [])]
    first = start(str(tmp_path / "there"))
    until(lambda: "running" in states(), 120)
    first.terminate()
    first.communicate(timeout=100)
    assert there.queue.study(id)["state"] == "waiting"
    second = start(str(tmp_path / "there"))
    until(lambda: there.queue.study(id)["state"] == "running" and "running" in states(), 120)
    there.queue.cancel(id)
    until(lambda: there.queue.study(id)["state"] == "cancelled", 120)
    until(lambda: all(each["state"] != "running" for each in there.runs()), 120)
    second.terminate()
    second.communicate(timeout=100)
    assert there.queue.work(until_empty=True) == 0, "no cell is left in the queue"
    with pytest.raises(NotFound, match="no comparison or sweep"):
        there.with_access(Access("legal")).queue.study(id)
    assert there.queue.resume(id)["state"] == "waiting"
