"""`--device` on every verb that loads a base; what is not there is one line; `doctor` says what will be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_models
import torch
from exchange.foreign import peft_folder
from small_tables import films, write_csv

from turret.cli.main import run
from turret.workspace import Workspace

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a table, and a store with one version."""
    folder = tmp_path_factory.mktemp("device")
    small_models.save_base("bert", folder / "bert")
    write_csv(folder / "films.csv", films())
    adapter = peft_folder("bert", "classify", folder / "peft")
    labels = ["bad", "fair", "good"]
    Workspace(folder / "store").import_adapter(adapter, "films", base=str(folder / "bert"), labels=labels)
    return folder


def said(folder: Path, verb: str, *words: str) -> list[str]:
    return [verb, *(word.format(folder=folder) for word in words), "--store", str(folder / "store")]


VERBS = [
    ("train", "{folder}/films.csv", "--base", "{folder}/bert"),
    ("plan", "{folder}/films.csv", "--base", "{folder}/bert"),
    ("predict", "films", "a great film"),
    ("evaluate", "films", "{folder}/films.csv"),
    ("suggest", "films", "{folder}/films.csv"),
    ("serve", "--port", "0"),
]


@WITHOUT_GPU
@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_a_gpu_that_is_not_there_is_one_line_without_a_fallback(made: Path, words: tuple[str, ...], capsys) -> None:
    assert run([*said(made, *words), "--device", "cuda:1"]) == 2
    told = capsys.readouterr()
    last = told.err.strip().splitlines()[-1]
    assert "device cuda:1 is not there: " in last
    assert "give --device cpu" in last
    assert "Traceback" not in told.err
    assert told.out == ""


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_a_word_that_names_no_device_is_one_line(made: Path, words: tuple[str, ...], capsys) -> None:
    assert run([*said(made, *words), "--device", "gpu"]) == 2
    assert "expected auto, cpu, cuda, cuda:1 or mps" in capsys.readouterr().err.strip().splitlines()[-1]


@WITHOUT_GPU
@pytest.mark.slow
def test_compare_names_the_gpu_that_its_trainings_lack(made: Path, capsys) -> None:
    words = ["{folder}/films.csv", "--base", "{folder}/bert", "--methods", "head", "--against", "head", "--seeds", "1"]
    run([*said(made, "compare", *words), "--device", "cuda:1"])
    told = capsys.readouterr()
    assert "device cuda:1 is not there" in " ".join((told.out + told.err).split())


@WITHOUT_GPU
def test_import_checks_on_the_device_that_is_named(made: Path, tmp_path: Path, capsys) -> None:
    assert run(["export", "films", str(tmp_path / "out"), "--store", str(made / "store")]) == 0
    words = ["import", str(tmp_path / "out"), "--name", "again", "--store", str(made / "store")]
    assert run([*words, "--device", "cuda"]) == 2
    assert "device cuda is not there" in capsys.readouterr().err
    assert run([*words, "--device", "cpu"]) == 0


@pytest.mark.slow
def test_a_training_says_where_it_was_made(made: Path, capsys) -> None:
    words = said(made, "train", "{folder}/films.csv", "--base", "{folder}/bert", "--set", "train.epochs=1")
    assert run([*words, "--device", "cpu", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "cpu" or told["device"].startswith("cuda")
    assert run([*said(made, "show", there["version"]), "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["manifest"]["lineage"]["recipe"]
    assert 'device = "cpu"' in recipe
    assert run([*said(made, "show", told["version"]), "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["manifest"]["lineage"]["recipe"]
    assert "device =" not in recipe  # the text of an older recipe stays as it was


@pytest.mark.slow
def test_a_plan_says_which_device_and_why(made: Path, capsys) -> None:
    assert run([*said(made, "plan", "{folder}/films.csv", "--base", "{folder}/bert"), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["plan"]["checks"]}
    assert rows["device"]["level"] == "ok"
    if not torch.cuda.is_available():
        assert rows["device"]["text"].startswith("cpu: ")
        assert "without CUDA" in rows["device"]["text"] or "finds no GPU" in rows["device"]["text"]


def test_doctor_says_what_auto_will_use(tmp_path: Path, capsys) -> None:
    assert run(["doctor", "--store", str(tmp_path), "--json"]) == 0
    processor = json.loads(capsys.readouterr().out)["processor"]
    assert processor["device"] == "cpu" or processor["device"].startswith("cuda")
    assert processor["device_reason"]
    assert run(["doctor", "--store", str(tmp_path)]) == 0
    assert processor["device"] in capsys.readouterr().out


def test_a_server_does_not_start_on_mps(made: Path, capsys) -> None:
    assert run([*said(made, "serve", "--port", "0"), "--device", "mps"]) == 2
    assert "an engine does not run on mps" in capsys.readouterr().err
