"""Tables as strangers keep them: `init` finds what a person would, and with at most one answer all goes to the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import small_models
from command_line import typed
from strange_tables import HELD_OUT, MORE, TUNED, Strange, broken_chats, portuguese_unicode

from turret.data.dataset import read_dataset
from turret.data.source import open_table
from turret.recipe import Recipe
from turret.tasks import schemas

Maker = Callable[[Path], Strange]
MAKERS = (*TUNED, *HELD_OUT, *MORE)
# Of the 15 whose rules were written before them, `english_codes` and four of HELD_OUT were right at first; what mended
# `tracker_export` and the others holds for any table: tests/data/test_tables.py has each rule alone, with controls.


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a small base for each kind of task."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("bert", "llama"):
        small_models.save_base(kind, folder / kind)
    return {"classify": str(folder / "bert"), "chat": str(folder / "llama")}


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_the_columns_that_a_person_means_are_found_and_the_mess_is_said(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = make(tmp_path)
    status, out, err = typed("init", table.path.name, *table.answer, "--json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    recipe = Recipe.load(said["file"])
    data = read_dataset(recipe.data, schemas(recipe.task), recipe.split_seed)
    assert data.kind == table.kind
    assert next(iter(data.columns.values())) == table.input
    if table.label:
        assert data.columns["label"] == table.label
        assert set(data.labels) == set(table.classes)
    assert len(data.train) + len(data.test) >= 70
    told = "\n".join([said["recipe"], *said["notes"], *data.notes])
    assert [word for word in table.words if word not in told] == []
    assert "unnamed" not in " ".join(data.columns.values())


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_strange_table_goes_to_answers_in_a_file(
    make: Maker, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = make(tmp_path)
    short = ("--base", bases[table.kind], "--set", "train.epochs=1", "--set", "train.evaluate=never")
    short += ("--set", "task.max_tokens=512") if table.kind == "chat" else ()
    status, out, err = typed("init", table.path.name, *table.answer, *short, "--json")
    assert status == 0, err
    made = json.loads(out)["file"]
    status, out, err = typed("plan", made)
    assert status == 0, out + err
    status, out, err = typed("train", made, "--json")
    assert status == 0, err
    version = json.loads(out)["version"]
    status, out, err = typed("evaluate", version, table.path.name, "--set", "data.test=20", "--json")
    assert status == 0, err
    assert json.loads(out)["data"]["examples"] == 20
    status, out, err = typed("predict", version, table.path.name, "--out", "answers.csv", "--json")
    assert status == 0, err
    answers = open_table(Path("answers.csv"))
    rows = [cells for _, cells in answers.read(["predicted", table.input])]
    assert len(rows) >= 70
    assert sum(bool(predicted) for predicted, asked in rows if asked) >= 70


def test_control_without_the_answer_two_columns_that_fit_are_one_line_with_both_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = portuguese_unicode(tmp_path)
    status, out, err = typed("init", table.path.name)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert len(err) < 300
    for label in ("Assunto", "Sentimento"):
        assert f"`turret init mensagens.tsv --label {label}`" in err
    assert not list(tmp_path.glob("*.toml"))


def test_control_without_the_answer_all_broken_lines_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = typed("init", broken_chats(tmp_path).path.name)
    assert status == 1
    assert err.count("\n") == 1
    for words in (
        "line 12 is not JSON (it is cut off)",
        "line 13",
        "line 51",
        "line 61: expected an object, found list",
    ):
        assert words in err
    assert 'data.bad_lines = "skip"' in err
