"""`turret init`: from a foreign table to a trained version, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small_models
from command_line import typed
from foreign_tables import CLASSES, MAKERS, stdin_of
from small_tables import POLES, write_csv
from strange_tables import german_quarter, portuguese_unicode
from table_bytes import PLAIN, csv, jsonl

from turret.data.dataset import read_dataset
from turret.recipe import Recipe
from turret.tasks import schemas

Maker = Callable[[Path], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A folder with a small base that reads, and one that writes."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("bert", "llama"):
        small_models.save_base(kind, folder / kind)
    return {False: str(folder / "bert"), True: str(folder / "llama")}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_the_recipe_of_a_foreign_table_reads_it(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    status, out, err = typed("init", path.name, "--json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    recipe = Recipe.load(said["file"])
    assert recipe.base == "auto"
    assert all(line.startswith(("#", "[")) or " = " in line or not line for line in said["recipe"].splitlines())
    data = read_dataset(recipe.data, schemas(recipe.task), recipe.split_seed)
    assert data.labels == CLASSES.get(make.__name__, ())
    assert len(data.train) > 80
    assert len(data.test) > 20


@pytest.mark.slow
def test_the_german_table_goes_all_the_way_without_a_page_being_read(
    bases: dict[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _all_the_way(MAKERS[0], bases, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS[1:], ids=lambda make: make.__name__)
def test_every_foreign_table_goes_all_the_way(
    make: Maker, bases: dict[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _all_the_way(make, bases, tmp_path, monkeypatch)


def _all_the_way(make: Maker, bases: dict[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """init, plan, train, and evaluate on the same table without naming anything again."""
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    base = bases[make.__name__ not in CLASSES]
    status, out, err = typed("init", path.name, "--base", base, "--set", "train.epochs=1", "--json")
    assert status == 0, err
    made = json.loads(out)["file"]
    status, out, err = typed("plan", made)
    assert status == 0, out + err
    status, out, err = typed("train", made, "--set", "train.epochs=1", "--set", "train.evaluate=never", "--json")
    assert status == 0, err
    version = json.loads(out)["version"]
    status, out, err = typed("evaluate", version, path.name, "--set", "data.test=20", "--json")
    assert status == 0, err
    assert json.loads(out)["data"]["examples"] == 20


def test_a_recipe_says_what_it_saw_in_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = MAKERS[0](tmp_path)
    status, out, _ = typed("init", path.name, "--out", "-")
    assert status == 0
    for words in (
        'encoding = "cp1252"',
        'delimiter = ";"',
        'text = "Kommentar"',
        'label = "Stimmung"  # 2 classes: ',
        "normalize_labels = true",
        "stratify = true",
        '# group = "Kunde"',
        "not used: 'Nr.', 'Datum', 'Kunde'",
    ):
        assert words in out, words
    assert not list(tmp_path.glob("*.toml"))


@pytest.mark.parametrize("settings", [(), ("--set", "data.separator=;")])
def test_a_separator_that_is_named_gives_each_text_several_labels(settings: tuple[str, ...], tmp_path: Path) -> None:
    rows = "".join(f"text {i},{('a;b', 'a', 'b')[i % 3]}\n" for i in range(60))
    (tmp_path / "t.csv").write_text("text,label\n" + rows)
    recipe = Recipe.from_toml(typed("init", str(tmp_path / "t.csv"), *settings, "--out", "-")[1])
    assert (recipe.data.separator, recipe.task.multi_label) == (";", True)
    ordered = ("--set", "task.kind=score", "--set", "data.separator=;", "--out", "-")
    recipe = Recipe.from_toml(typed("init", str(tmp_path / "t.csv"), *ordered)[1])
    assert (recipe.data.separator, recipe.task.multi_label) == (";", False), "each text has one level"


@pytest.mark.parametrize(("task", "offered"), [("classify", True), ("score", False)])
def test_weights_of_classes_are_offered_to_tasks_that_read_them(task: str, offered: bool, tmp_path: Path) -> None:
    rows = [{"text": f"a film as it is, number {i}", "label": "5" if i % 10 else "1"} for i in range(60)]
    (tmp_path / "t.jsonl").write_bytes(jsonl(rows))
    status, out, err = typed("init", str(tmp_path / "t.jsonl"), "--set", f"task.kind={task}", "--out", "-")
    assert (status, "# class_weights" in out) == (0, offered), err


def test_lengths_of_conversations_and_references_are_measured(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "why? " * 300}, {"role": "assistant", "content": "because. " * 50}]
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(jsonl([{"messages": turns} for _ in range(12)]))
    recipe = Recipe.from_toml(typed("init", str(chats), "--out", "-")[1])
    assert (recipe.task.kind, recipe.data.messages, recipe.task.max_tokens) == ("chat", "messages", 1024)
    asked = tmp_path / "asked.jsonl"
    asked.write_bytes(jsonl([{"instruction": "sum up", "input": "word " * 80, "output": f"o {i}"} for i in range(12)]))
    recipe = Recipe.from_toml(typed("init", str(asked), "--out", "-")[1])
    assert (recipe.task.kind, recipe.task.max_tokens, recipe.task.max_target_tokens) == ("chat", 128, 64)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_bytes(jsonl([{"source": f"s {i}", "references": ["word " * 80, "word"]} for i in range(12)]))
    recipe = Recipe.from_toml(typed("init", str(pairs), "--out", "-")[1])
    assert (recipe.task.max_tokens, recipe.task.max_target_tokens) == (64, 128)


def test_named_columns_win_over_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "t.csv", [{**row, "other": "x" if i % 3 else "y"} for i, row in enumerate(POLES)])
    status, out, err = typed("init", "t.csv", "--label", "OTHER", "--name", "mine", "--out", "-")
    assert status == 0, err
    recipe = Recipe.from_toml(out)
    assert (recipe.name, recipe.data.text, recipe.data.label) == ("mine", "text", "other")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n3,4\n", "shows no column of texts"),
        ("text,label\n", "has columns and no rows"),
        ("question,context,answers\na,b,c\n", "the task question_answering"),
    ],
)
def test_a_table_with_nothing_to_learn_from_is_one_line(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    status, out, err = typed("init", str(path))
    assert (status, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_on_a_terminal_the_label_is_asked_for(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    table = portuguese_unicode(tmp_path).path
    above, below = pty.openpty()
    command = [sys.executable, "-c", "from turret.cli.main import main; main()", "init", table.name]
    with subprocess.Popen(command, cwd=tmp_path, stdin=below, stdout=below, stderr=below, close_fds=True) as child:
        os.close(below)
        seen = b""
        while b"number" not in seen:
            seen += os.read(above, 1000)
        os.write(above, b"2\n")
        while chunk := _read(above):
            seen += chunk
        assert child.wait(timeout=60) == 0, seen
    os.close(above)
    assert b"Which column is the label?" in seen
    assert Recipe.load(tmp_path / "mensagens.toml").data.label == "Sentimento"


def _read(above: int) -> bytes:
    try:
        return os.read(above, 1000)
    except OSError:  # Linux, when the child has closed its side
        return b""


def test_other_candidates_and_renaming_are_in_the_recipe_as_comments(tmp_path: Path) -> None:
    status, out, err = typed("init", str(german_quarter(tmp_path).path), "--out", "-")
    assert status == 0, err
    for words in (
        '# label = "Kanal"  # 3 classes: Telefon (30), Filiale (30), E-Mail (30); from the text: hardly (kappa ',
        "# rename = {\"Rechnug\" = \"Rechnung\"}  # 'Rechnug' (2) looks like 'Rechnung'",
        "header_row = 3",
        'sheet = "Rohdaten"',
    ):
        assert words in out, words
    assert "class_weights" not in out
    meant = out.replace("# rename", "rename")
    recipe = Recipe.from_toml(meant)
    assert recipe.data.rename == {"Rechnug": "Rechnung"}
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_recipe_that_exists_is_replaced_only_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "t.csv", POLES)
    (tmp_path / "t.toml").write_text("mine")
    status, _, err = typed("init", "t.csv")
    assert status == 2
    assert "exists: give --force" in err
    assert (tmp_path / "t.toml").read_text() == "mine"
    assert typed("init", "t.csv", "--force")[0] == 0
    assert Recipe.load(tmp_path / "t.toml").data.source == "t.csv"


def test_a_table_is_read_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from turret.data import source

    source._stdin.cache_clear()
    monkeypatch.setattr("sys.stdin", stdin_of(csv(PLAIN, ";").encode("cp1252")))
    recipe = Recipe.model_validate({"data": {"source": "-"}})
    data = read_dataset(recipe.data, schemas(recipe.task))
    assert data.labels == ("bad", "good")
    assert len(data.train) + len(data.test) == 12
    source._stdin.cache_clear()
    monkeypatch.setattr("sys.stdin", stdin_of(b""))
    status, _, err = typed("plan", "-", "--base", "x", "--store", str(tmp_path / "store"))
    assert status == 1
    assert "stdin is empty" in err
    source._stdin.cache_clear()
