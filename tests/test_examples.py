"""Every file in examples/ is short, is listed, and runs as a user would run it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_a_notebook_is_stored_with_the_outputs_of_one_run_from_top_to_bottom() -> None:
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), path.name
        kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
        assert kinds <= {"execute_result", "display_data", "stream"}, path.name
        assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"], path.name
        assert len(text) < 200_000, path.name
        for place in ("/root", "/home", "/work", "site-packages"):
            assert place not in text, f"{path.name} has {place}"


def shown_by(cell: Any) -> set[str]:
    """The kinds of what a cell shows: stream, or a type such as text/html."""
    return {kind for output in cell.get("outputs", ()) for kind in output.get("data", {"stream": None})}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_shows_what_is_stored(path: Path, tmp_path: Path) -> None:
    needed = ["nbclient", *(["matplotlib"] if ".plot()" in path.read_text(encoding="utf-8") else [])]
    for package in needed:
        if importlib.util.find_spec(package) is None and "CI" not in os.environ:
            pytest.skip(f"{package} is not installed: run `make setup`")
    import nbformat
    from nbclient import NotebookClient

    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    for cell, before in zip(notebook.cells, stored.cells, strict=True):
        assert shown_by(cell) == shown_by(before), cell["source"]
    lines = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "opacity:.8" in output.get("data", {}).get("text/html", "")
    ]
    assert any(re.match(r"(?:step )?(\d+) of \1", line) for line in lines), lines  # the progress arrived
