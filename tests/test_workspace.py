"""A workspace on a two-layer base: train, prove, store, answer; and its state after kills, stops and faults."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_training as tiny
from small_disk import mounted_disk
from transformers import PreTrainedModel

from turret.errors import (
    Corrupt,
    DataError,
    Interrupted,
    LossNotFinite,
    NotFound,
    PreflightRefused,
    RecipeError,
    TurretError,
    WrongBase,
)
from turret.recipe import Recipe
from turret.train.curve import StepRecord, read_curve
from turret.workspace import RunResult, Workspace

GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")


def write_reviews(folder: Path) -> Path:
    """A folder with an easy train.csv and test.csv."""
    folder.mkdir()
    for split, rows in (("train", range(24)), ("test", range(24, 32))):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for row in rows:
                words = (GOOD if row % 2 else BAD)[row // 2 % 3]
                table.writerow([f"{words}, number {row}", "good" if row % 2 else "bad"])
    return folder


@dataclass
class Trained:
    """One training and everything it reported."""

    folder: Path
    recipe: Recipe
    workspace: Workspace
    result: RunResult
    records: list[Any]
    plans: list[Any]
    stages: list[str]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("workspace")
    base = small_models.save_base("bert", folder / "bert")
    recipe = Recipe(
        name="reviews",
        base=str(base),
        data=str(write_reviews(folder / "reviews")),
        train={"epochs": 4, "checkpoint_every": 2, "lr": 1e-3},
    )
    workspace = Workspace(folder / "store")
    records, plans, stages = [], [], []
    result = workspace.train(recipe, on_record=records.append, on_plan=plans.append, on_stage=stages.append)
    return Trained(folder, recipe, workspace, result, records, plans, stages)


def test_a_result_has_the_documented_keys_and_honest_numbers(trained) -> None:
    said = json.loads(json.dumps(trained.result.as_json(), allow_nan=False))
    assert {"version", "digest", "base", "metrics", "parameters", "timing", "memory", "bundle_bytes", "run"} <= set(
        said
    )
    assert said["version"] == "reviews@1"
    assert said["digest"].startswith("sha256:")
    assert set(said["base"]) == {"id", "fingerprint"}
    assert {"accuracy", "loss"} <= set(said["metrics"]["test"])
    assert 0 < said["parameters"]["trainable"] < said["parameters"]["total"]
    assert said["timing"]["steps"] == 12
    assert all(value > 0 for value in said["timing"].values())
    assert set(said["memory"]) == {"base_bytes", "peak_bytes", "above_base_bytes", "predicted_bytes"}
    assert said["memory"]["peak_bytes"] > said["memory"]["base_bytes"] > 0
    assert said["bundle_bytes"] == trained.workspace.resolve("reviews").bytes


@pytest.mark.slow
def test_the_same_recipe_makes_the_same_version_in_a_store_by_url(trained, new_url, tmp_path) -> None:
    """The run is stopped and resumed here; catalog and files are on two servers."""
    workspace = Workspace(new_url())

    def stop(record: StepRecord) -> None:
        if record.step == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        workspace.train(trained.recipe, on_record=stop)
    result = workspace.train(trained.recipe)
    assert result.digest == trained.result.digest
    assert [path.name for path in workspace.store.root.iterdir()] == ["runs"]
    assert workspace.store.root.parent == tmp_path / "local"
    assert {each["label"] for each in workspace.predict("reviews@1", [*GOOD, *BAD])} <= {"good", "bad"}
    assert workspace.verify().ok


def test_every_step_is_reported_and_kept_with_the_run(trained) -> None:
    assert [record.step for record in trained.records] == list(range(1, 13))
    run = trained.workspace.store.root / "runs" / trained.result.run
    assert list(read_curve(run / "curve.jsonl")) == trained.records
    assert not (run / "checkpoint").exists()
    assert len(trained.plans) == 1
    assert any("proving" in words for words in trained.stages)


def test_the_recipe_kept_with_the_run_says_what_was_guessed(trained) -> None:
    run = trained.workspace.store.root / "runs" / trained.result.run
    kept = Recipe.load(run / "recipe.toml")
    assert kept.task.kind == "classify"
    assert (kept.data.text, kept.data.label) == ("text", "label")
    assert any("guessed" in note for note in trained.result.notes)
    assert trained.workspace.show("reviews")["run"]["state"] == "finished"


def test_the_stored_version_measures_as_the_trained_model_did(trained) -> None:
    found = trained.workspace.evaluate("reviews", trained.recipe.data.source)
    measured = dict(trained.result.metrics["test"])
    assert found.metrics["loss"] == pytest.approx(measured.pop("loss"), abs=1e-6)
    assert {name: found.metrics[name] for name in measured} == measured
    assert found.data["examples"] == 8


def test_the_stored_version_answers(trained) -> None:
    answers = trained.workspace.predict("reviews@1", ["great film, number 3", "dull story, number 4", ""])
    assert len(answers) == 3
    for answer in answers:
        assert set(answer) == {"label", "probabilities"}
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)


@pytest.mark.slow
def test_a_filled_recipe_killed_on_its_way_ends_with_the_same_version(trained, tmp_path) -> None:
    """The child trains the stored recipe of the first run and kills itself after step 7."""
    recipe = trained.workspace.store.root / "runs" / trained.result.run / "recipe.toml"
    child = (
        "import os, signal, sys; from turret import Recipe, Workspace\n"
        "def kill(record):\n"
        "    if record.step == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Workspace(sys.argv[1]).train(Recipe.load(sys.argv[2]), on_record=kill)\n"
    )
    command = [sys.executable, "-c", child, str(tmp_path / "store"), str(recipe)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workspace = Workspace(tmp_path / "store")
    assert list(workspace.list()) == []
    result = workspace.train(Recipe.load(recipe))
    assert result.resumed_from == 6
    assert result.digest == trained.result.digest
    curve = list(read_curve(workspace.store.root / "runs" / result.run / "curve.jsonl"))
    assert [tiny.repeatable(each) for each in curve] == [tiny.repeatable(each) for each in trained.records]
    assert len(list((workspace.store.root / "runs").iterdir())) == 1


class EnoughError(Exception):
    """Ends a training that the test needs no longer."""


def first_step(workspace: Workspace, recipe: Recipe, *, fresh: bool = False) -> int:
    """The first step of a new or resumed training."""
    seen = []

    def look(record) -> None:
        seen.append(record.step)
        raise EnoughError

    with pytest.raises(EnoughError):
        workspace.train(recipe, on_record=look, fresh=fresh)
    return seen[0]


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_the_same_recipe_goes_on_unless_fresh(trained, tmp_path) -> None:
    workspace = Workspace(tmp_path / "store")

    def stop(record) -> None:
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 3 of 12: start the same command again"):
        workspace.train(trained.recipe, on_record=stop)
    assert first_step(workspace, trained.recipe) == 4
    assert first_step(workspace, trained.recipe.with_overrides({"seed": "7"})) == 1
    assert first_step(workspace, trained.recipe, fresh=True) == 1
    assert list(workspace.list()) == []


@pytest.mark.slow
def test_a_disk_that_fills_while_training_is_named_and_the_run_goes_on_once_there_is_room(trained, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "size=4m") as disk:
        workspace = Workspace(disk / "store")

        def fill(record) -> None:
            if record.step == 5:
                with suppress(OSError), (disk / "filler").open("wb") as filler:
                    while True:
                        filler.write(bytes(4096))
                        filler.flush()

        with pytest.raises(TurretError, match=r"disk full|No space left") as error:
            workspace.train(trained.recipe, on_record=fill)
        assert str(disk) in str(error.value)
        (disk / "filler").unlink()
        assert first_step(workspace, trained.recipe) in (3, 5)  # after the checkpoint of step 2 or 4


@pytest.mark.slow
def test_a_plan_that_refuses_trains_nothing_and_writes_nothing(trained, tmp_path) -> None:
    recipe = trained.recipe.with_overrides({"method.target_modules": "qury"})
    workspace = Workspace(tmp_path / "store")
    with pytest.raises(PreflightRefused, match="did you mean query"):
        workspace.train(recipe)
    assert workspace.plan(recipe).plan.refused
    assert not workspace.store.root.exists()


@pytest.mark.parametrize("verb", ["plan", "compare"])
def test_a_setting_that_the_task_does_not_read_is_refused_before_a_base_is_loaded(verb, tmp_path) -> None:
    reviews = write_reviews(tmp_path / "data")
    recipe = Recipe(name="x", base=str(tmp_path / "none"), data=str(reviews), task={"max_new_tokens": 8})
    with pytest.raises(RecipeError, match=r"task\.max_new_tokens = 8 is not read by the task classify, only by chat"):
        getattr(Workspace(tmp_path / "store"), verb)(recipe)


def test_a_loss_that_is_not_finite_fails_the_run_and_stores_nothing(trained, tmp_path) -> None:
    recipe = trained.recipe.with_overrides({"train.lr": "1e30", "train.warmup": "0", "train.gradient_clip": "1e30"})
    workspace = Workspace(tmp_path / "store")
    with pytest.raises(LossNotFinite, match="at step"):
        workspace.train(recipe)
    assert list(workspace.list()) == []
    with pytest.raises(LossNotFinite, match="at step"):  # it would fail again, so a new run is started
        workspace.train(recipe)
    assert len(list((workspace.store.root / "runs").iterdir())) == 2


def test_a_base_that_changed_under_its_name_is_refused(trained, tmp_path) -> None:
    base = Path(trained.recipe.base)
    kept = shutil.copytree(base, tmp_path / "kept")
    shutil.rmtree(base)
    try:
        small_models.save_base("bert", base, seed=1)
        with pytest.raises(WrongBase, match="load that base, or retrain"):
            trained.workspace.predict("reviews", ["a great film"])
    finally:
        shutil.rmtree(base)
        shutil.copytree(kept, base)


@pytest.mark.slow
def test_after_a_training_its_base_is_not_in_memory(trained, tmp_path, monkeypatch) -> None:
    def models() -> list[PreTrainedModel]:
        return [each for each in gc.get_objects() if isinstance(each, PreTrainedModel)]

    def kept(large: int) -> int:
        monkeypatch.setattr("turret.bases.base.LARGE", large)
        before = len(models())
        Workspace(tmp_path / str(large)).train(trained.recipe.with_overrides({"train.epochs": "1"}))
        return len(models()) - before

    gc.collect()
    gc.disable()
    try:
        assert kept(0) == 0
        assert kept(1 << 40) > 0  # the control
    finally:
        gc.enable()


@pytest.fixture
def flipped(trained, tmp_path) -> Workspace:
    """A copy of the store with one bit of the adapter's weights flipped."""
    store = tmp_path / "store"
    shutil.copytree(trained.workspace.store.root, store)
    workspace = Workspace(store)
    path = workspace.store.files("reviews")["adapter_model.safetensors"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)
    return workspace


def test_a_flipped_bit_is_never_answered_from(trained, flipped) -> None:
    with pytest.raises(Corrupt):
        flipped.predict("reviews", ["a great film"])
    with pytest.raises(Corrupt):
        flipped.evaluate("reviews", trained.recipe.data.source)


def test_in_float32_the_engine_and_predict_give_the_same_probabilities(trained, monkeypatch) -> None:
    """So the difference that the next test allows is that of rounding to bfloat16."""
    monkeypatch.setattr("turret.bases.device.native_bfloat16", lambda device: False)  # as on older processors
    texts = ["a great film", "a dull story"]
    with trained.workspace.engine(trained.recipe.base, dtype="float32") as engine:
        answers = engine.classify(texts, "reviews")
    for answer, wanted in zip(answers, trained.workspace.predict("reviews", texts), strict=True):
        assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)


def test_the_engine_answers_from_the_store_as_predict_does(trained) -> None:
    texts = ["a great film", "a dull story"]
    with trained.workspace.engine(trained.recipe.base) as engine:
        for answer, wanted in zip(
            engine.classify(texts, "reviews"), trained.workspace.predict("reviews", texts), strict=True
        ):
            assert answer["label"] == wanted["label"]
            # In bfloat16, and a head that starts at its solution has larger logits than one that starts at random.
            assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-2)
        ticket = engine.submit("classify", texts[0], "reviews@1")
        assert ticket.receipt.digest == trained.result.digest
        assert ticket.receipt.base == trained.result.base["fingerprint"]
        with pytest.raises(NotFound):
            engine.submit("classify", "x", "other")
        assert ticket.result(30)


def test_the_engine_never_answers_from_a_flipped_bit(trained, flipped) -> None:
    with flipped.engine(trained.recipe.base) as engine, pytest.raises(Corrupt):
        engine.classify(["a great film"], "reviews")


def test_answers_need_a_version_and_texts(trained) -> None:
    with pytest.raises(NotFound):
        trained.workspace.predict("other", ["x"])
    with pytest.raises(DataError, match="nothing to answer"):
        trained.workspace.predict("reviews", [])


def test_texts_of_a_file_come_in_order(trained, tmp_path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    (tmp_path / "rows.csv").write_text("id,body\n1,one\n2,two\n")
    assert list(trained.workspace.inputs("reviews", str(tmp_path / "lines.txt"))) == ["one", "two"]
    assert list(trained.workspace.inputs("reviews", str(tmp_path / "rows.csv"), columns={"text": "body"})) == [
        "one",
        "two",
    ]


@pytest.mark.slow
def test_a_prefix_on_a_decoder_goes_the_whole_way(tmp_path) -> None:
    base = small_models.save_base("llama", tmp_path / "llama")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for row in range(20):
            file.write(json.dumps({"document": f"the market fell, {row}", "summary": f"shares {row}"}) + "\n")
    recipe = Recipe(
        name="short",
        base=str(base),
        data={"source": str(tmp_path / "pairs.jsonl"), "test": 4},
        task={"max_tokens": 40, "max_target_tokens": 8},
        method={"kind": "prefix", "num_virtual_tokens": 4, "encoder_hidden_size": 16},
        train={"epochs": 1},
    )
    workspace = Workspace(tmp_path / "store")
    result = workspace.train(recipe)
    assert {"rougeL", "loss", "perplexity"} <= set(result.metrics["test"])
    (answer,) = workspace.predict("short", ["the market fell, 3"])
    assert set(answer) == {"text", "finish_reason", "tokens"}
    assert answer["finish_reason"] in ("stop", "length")
    with workspace.engine(str(base), dtype="float32") as engine:
        assert set(engine.generate(["the market fell, 3"], "short")[0]) == {*answer, "prompt_tokens"}
    found = workspace.evaluate("short", str(tmp_path / "pairs.jsonl"))
    assert found.data["examples"] == 20
