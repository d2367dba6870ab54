"""Drafts and plans for the clients of a server, in processes that end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.patience import until
from small_models import save_base

from turret.access import Access
from turret.errors import DataError, NotFound, RecipeError
from turret.recipe import Recipe
from turret.workspace import Workspace
from turret.workspace.data_readers import DataReaders
from turret.workspace.previewing import Previews

CSV = b"comment,topic\n" + b"".join(
    b"the %s number %d,%s\n" % ((b"bill", n, b"a") if n % 2 else (b"post", n, b"b")) for n in range(40)
)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "store")


@pytest.fixture
def previews(workspace: Workspace) -> Iterator[Previews]:
    made = Previews(workspace.store)
    yield made
    made.close()


@pytest.mark.slow
def test_a_reader_without_work_ends_and_the_next_question_starts_another(workspace: Workspace, tmp_path: Path) -> None:
    readers = DataReaders(workspace.store, 30, idle=0.2)
    (tmp_path / "a.csv").write_bytes(CSV)
    for started in (1, 2):
        assert readers.inspect("a.csv", tmp_path, {})["guess"]["kind"] == "classify"
        assert readers._idle[0].started == started
        until(lambda: readers._idle[0].process is None)
    readers.close()


@pytest.mark.slow
def test_a_draft_opens_what_was_sent_and_nothing_else(previews: Previews, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_bytes(CSV)
    for source in (str(secret), "secret.csv", "../secret.csv", f"{'0' * 32}/secret.csv", "-"):
        with pytest.raises(DataError, match="is not in files"):
            previews.draft(source, {"a.csv": CSV}, {})
    for key in ("data", "data.source"):
        with pytest.raises(DataError, match=f"settings: {key} is not a setting of a draft"):
            previews.draft("a.csv", {"a.csv": CSV}, {key: str(secret)})
    with pytest.raises(DataError, match="unknown key 'data"):
        previews.draft("a.csv", {"a.csv": CSV}, {"data.nothing": "x"})
    with pytest.raises(DataError, match="the Hub did not give it"):  # nothing is downloaded
        previews.draft("org/data", {}, {})
    assert previews.draft("a.csv", {"a.csv": secret}, {})["guess"]["labels"] == {"b": 20, "a": 20}


@pytest.mark.slow
def test_a_plan_is_that_of_the_workspace_and_knows_only_what_its_caller_sees(
    workspace: Workspace, previews: Previews, tmp_path: Path
) -> None:
    base = str(save_base("bert", tmp_path / "bert"))
    text = f'name = "a"\nbase = {json.dumps(base)}\n[data]\nsource = "a.csv"\n[train]\nmax_steps = 4\nlr = 0.001\n'
    recipe = Recipe.from_toml(text)
    with pytest.raises(RecipeError, match="expected a Hub id or pypi:package, not a path"):
        previews.plan(workspace.store, recipe, {"a.csv": CSV})
    found = previews.plan(workspace.store, recipe, {"a.csv": CSV}, base)
    (tmp_path / "a.csv").write_bytes(CSV)
    here = workspace.plan(recipe.with_overrides({"data.source": str(tmp_path / "a.csv")})).as_json()
    assert (found["plan"]["steps"], found["plan"]["parameters"]) == (4, here["plan"]["parameters"])
    assert {each["name"] for each in found["plan"]["checks"]} >= {"labels", "splits", "memory", "time"}
    assert found["plan"]["seconds"] > 0
    assert Recipe.from_toml(found["toml"]).data.label == "topic"
    started = recipe.with_overrides({"train.init_from": "mine@1"})
    with pytest.raises(NotFound):
        previews.plan(workspace.with_access(Access("legal")).store, started, {"a.csv": CSV}, base)
