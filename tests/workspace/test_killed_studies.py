"""`turret compare` and `turret control`, killed at random moments and started again, end like an undisturbed run."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_models

from turret.recipe import Recipe
from turret.workspace import Workspace

KILLS = 2
# What differs between two undisturbed runs too: times, memory, the folder's own name and what names it.
MEASURED = {"made", "folder", "report", "command", "costs", "created", "wall_seconds"}
LABELS = ("great film", "dull story")


def recipe_of(folder: Path, kind: str) -> Path:
    """The file of a recipe: a classifier, or summaries with one column per aspect."""
    small_models.save_base("bert", folder / "bert")
    small_models.save_base("llama", folder / "llama")
    with (folder / "films.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label", "good", "bad"])
        table.writerows([f"{LABELS[n % 2]}, number {n}", "yn"[n % 2], *LABELS] for n in range(40))
    told = {"data.test": "10", "train.epochs": "1", "train.max_steps": "2"}
    if kind == "control":
        told |= {"data.document": "text", "data.summary": "{aspect}", "task.kind": "summarize"}
        told |= {"task.max_target_tokens": "8"}
    base = folder / ("llama" if kind == "control" else "bert")
    recipe = Recipe(name="films", base=str(base), data=str(folder / "films.csv")).with_overrides(told)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return folder / "recipe.toml"


def words_of(kind: str, recipe: Path, store: Path) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "turret",
        kind,
        str(recipe),
        "--json",
        "--store",
        str(store),
        "--methods",
        "base,lora",
    ]
    if kind == "control":
        return [*words, "--aspects", "good,bad", "--judge", str(recipe.parent / "bert")]
    return [*words, "--seeds", "2", "--against", "lora"]


def result_of(words: Sequence[str]) -> Any:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_measured(each)
            for key, each in value.items()
            if key not in MEASURED and not key.endswith("seconds")
        }
    return [without_measured(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compare", "control"])
def test_a_study_that_is_killed_again_and_again_ends_like_an_undisturbed_one(kind, tmp_path) -> None:
    recipe, draw = recipe_of(tmp_path, kind), random.Random(kind)
    started = time.monotonic()
    expected = result_of(words_of(kind, recipe, tmp_path / "calm"))
    whole = time.monotonic() - started
    words, killed = words_of(kind, recipe, tmp_path / "killed"), 0
    for turn in range(KILLS):
        quiet = subprocess.DEVNULL
        with subprocess.Popen(words, stdout=quiet, stderr=quiet, start_new_session=True) as process:
            try:
                process.wait(timeout=draw.uniform(0.2, 0.7) * whole)
            except subprocess.TimeoutExpired:
                killed += 1
                if turn % 2:
                    process.kill()  # its child ends by itself
                else:
                    os.killpg(process.pid, signal.SIGKILL)
    assert killed
    found = result_of(words)
    assert without_measured(found) == without_measured(expected)
    versions = [[(str(each), each.digest) for each in Workspace(tmp_path / name).list()] for name in ("calm", "killed")]
    assert [name for name, _ in versions[0]] == [name for name, _ in versions[1]]
    assert Workspace(tmp_path / "killed").verify().problems == ()
    assert result_of(words) == found  # and once more, which trains nothing
