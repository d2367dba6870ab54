"""One failure names every problem, and nothing heavy is loaded before the table is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_tables import POLES, labelled, load, write_csv, write_jsonl

from turret.errors import DataError


def test_problems_of_columns_splits_and_groups_are_told_together(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", POLES)
    with pytest.raises(DataError) as caught:
        load(path, text="txt", label="lable", test="dev", group="user")
    said = str(caught.value)
    for words in ("data.test = 'dev'", "'txt', 'lable'", "no column 'user'"):
        assert words in said


def test_problems_of_cells_and_labels_are_told_together_and_counted(tmp_path: Path) -> None:
    rows = labelled(["Good", "good", "bad", 0.5, 1.5] * 3)
    with pytest.raises(DataError) as caught:
        load(write_jsonl(tmp_path / "t.jsonl", rows))
    said = str(caught.value)
    for words in ("line 4, column 'label': the label 0.5", "(6 such rows)", "'Good' and 'good'"):
        assert words in said
    one = [*labelled(["good", "bad"] * 3), {"text": ["a"], "label": 0.5}]
    with pytest.raises(DataError) as caught:
        load(write_jsonl(tmp_path / "one.jsonl", one))
    assert "column 'text': expected text, found list" in str(caught.value)
    assert "such rows" not in str(caught.value)  # the control: a single row is not counted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "txt", "--base", "x"], "no column 'txt'"),
        (["--set", "data.test=dev", "--base", "x"], "data.test = 'dev'"),
    ],
)
def test_a_wrong_column_is_told_before_torch_is_loaded(arguments: list[str], said: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", POLES)
    code = (
        "import sys; from turret.cli.main import run; status = run(sys.argv[1:]); "
        "print(status, sorted({'torch', 'transformers', 'peft', 'sklearn', 'datasets'} & set(sys.modules)))"
    )
    for verb in ("plan", "train"):
        command = [sys.executable, "-c", code, verb, str(path), *arguments, "--store", str(tmp_path / "store")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said in done.stderr
        assert done.stdout.splitlines()[-1] == "1 []"
