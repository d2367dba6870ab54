"""Every file in examples/ is short, is listed, and runs as a user would run it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
LAST_LINES = {  # what a program must have said at its end
    "ab_test": r"production is now news@\d",
    "classifier_from_csv": r"-> sports \(\d+%\)",
    "compare_methods": r"report: .*report\.html",
    "headline_writer": r"the bare base: ",
    "hf_trainer": r"largest difference between Turret and PEFT: ",
    "merge": r"tech +adapter 0\.\d{4}  merged 0\.\d{4}",
    "own_training_loop": r"accuracy \d+%",
    "server_and_clients": r"after the promote: \w+ +from news@2",
}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_has_less_than_60_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_every_example_is_listed_and_no_other() -> None:
    listed = re.findall(r"^\| \[[^\]]+\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (*PROGRAMS, *NOTEBOOKS))
    assert {path.stem for path in PROGRAMS} == set(LAST_LINES)


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(LAST_LINES[path.stem], done.stdout), done.stdout


def test_a_notebook_is_stored_without_outputs() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        assert not re.search(r'"outputs": \[[^\]]|"execution_count": \d', path.read_text(encoding="utf-8")), path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_shows_its_progress(path: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("nbclient") is None and "CI" not in os.environ:
        pytest.skip("nbclient is not installed: run `make setup`")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    assert shown, "the notebook shows no progress"
    assert all(text != "starting" for text in shown), "the progress never moved"
