"""`train`, `plan`, `predict` and `evaluate`: output on stdout and stderr, and exit status."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import command_line
import pytest
import small_models
from small_tables import films, write_csv

from turret.cli.main import run
from turret.cli.train import Progress


@dataclass
class Typed:
    """The output of one `turret train`."""

    folder: Path
    arguments: list[str]
    status: int
    out: str
    err: str

    @property
    def store(self) -> list[str]:
        return ["--store", str(self.folder / "store")]


@pytest.fixture(scope="session")
def typed(tmp_path_factory) -> Typed:
    folder = tmp_path_factory.mktemp("cli")
    small_models.save_base("bert", folder / "bert")
    write_csv(folder / "Film Reviews.csv", films("review", "sentiment"))
    arguments = [str(folder / "Film Reviews.csv"), "--base", str(folder / "bert"), "--set", "train.epochs=1"]
    told = command_line.typed("train", *arguments, "--json", "--store", str(folder / "store"))
    return Typed(folder, arguments, *told)


def test_train_json_is_one_object_on_stdout_and_all_else_is_on_stderr(typed) -> None:
    assert typed.status == 0
    said = json.loads(typed.out)
    assert typed.out.count("\n") == 1
    assert list(said)[:9] == [
        "version", "digest", "base", "metrics", "parameters", "timing", "memory", "bundle_bytes", "run",
    ]  # fmt: skip
    assert said["version"] == "film-reviews@1"
    for words in ("note  guessed: classify", "plan", "step 1/", "proving the bundle"):
        assert words in typed.err


def test_predict_prints_a_line_a_text(typed, capsys) -> None:
    assert run(["predict", "film-reviews", "great film", "dull story", *typed.store]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("great film")
    assert lines[0].split()[0] in ("good", "bad")


def test_predict_reads_a_file_a_column_and_stdin(typed, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "lines.txt").write_text("great film\ndull story\n")
    (tmp_path / "rows.csv").write_text("id,body\n1,great film\n2,dull story\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("great film\ndull story\n"))
    answers = []
    for inputs in (
        ["great film", "dull story"],
        [str(tmp_path / "lines.txt")],
        [str(tmp_path / "rows.csv"), "--text", "body"],
        ["-"],
    ):
        assert run(["predict", "film-reviews@1", *inputs, *typed.store, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert set(answers[0][0]) == {"label", "probabilities"}
    assert all(answer == answers[0] for answer in answers)


def test_evaluate_prints_metrics_and_one_object(typed, capsys) -> None:
    data = typed.arguments[0]
    assert run(["evaluate", "film-reviews", data, *typed.store]) == 0
    assert "accuracy" in capsys.readouterr().out
    named = ["--set", "data.text=review", "--set", "data.label=sentiment", "--set", "data.test=10"]
    assert run(["evaluate", "film-reviews", data, *named, *typed.store, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"version", "digest", "data", "metrics", "seconds", "notes", "details"}
    assert set(said["details"]) == {"confusion", "reliability", "coverage", "wrong", "mistakes"}
    assert said["data"]["examples"] == 10


@pytest.mark.slow
def test_plan_prints_checks_and_stores_nothing(typed, tmp_path, capsys) -> None:
    store = ["--store", str(tmp_path / "store")]
    assert run(["plan", *typed.arguments, *store]) == 0
    out = capsys.readouterr().out
    assert "LoRA of rank 8" in out
    assert "are trained" in out
    assert run(["plan", *typed.arguments, *store, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"recipe", "plan", "notes"}
    assert said["recipe"]["name"] == "film-reviews"
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_plan_that_refuses_has_status_1_and_train_says_the_same_in_one_line(typed, tmp_path, capsys) -> None:
    wrong = [*typed.arguments, "--set", "method.target_modules=qury", "--store", str(tmp_path / "store")]
    assert run(["plan", *wrong]) == 1
    assert "refuse" in capsys.readouterr().out
    assert run(["train", *wrong]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("turret: ")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_version_that_learnt_nothing_is_stored_with_a_warning(typed, tmp_path, capsys) -> None:
    assert json.loads(typed.out)["warnings"] == []  # the control
    where, chance = ["--store", str(tmp_path / "store")], random.Random(0)
    with (tmp_path / "chance.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for row in range(240):  # the label does not depend on the text
            table.writerow([f"{'great film' if row % 2 else 'dull story'}, number {row}", chance.choice(["a", "b"])])
    settings = ["--set", "train.epochs=1", "--set", "train.lr=1e-4", "--set", "train.evaluate=never"]
    data = [str(tmp_path / "chance.csv"), "--base", typed.arguments[2]]
    assert run(["train", *data, *settings, "--json", *where]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["flat_loss"]["guessing"] == pytest.approx(0.693, abs=0.01)
    assert said["warnings"][0].startswith("nothing was learnt")
    for words in (", guessing 0.6", "storing, with a warning"):
        assert words in err
    assert err.count("the loss is no better than guessing (") == 1, "at once, and once"
    assert "leave train.lr out (it is 0.0001, usual is 0.001)" in said["warnings"][0]
    with Progress(as_json=False) as shown:
        from turret.workspace import RunResult

        shown.show_result(RunResult(**said), "elsewhere")
    assert run(["show", "chance", *where]) == 0
    assert capsys.readouterr().out.count("nothing was learnt") == 2


def test_people_are_told_what_was_stored_and_what_to_try(typed, capsys, monkeypatch) -> None:
    from turret.workspace import RunResult

    with Progress(as_json=False) as shown:
        shown.show_result(RunResult(**json.loads(typed.out)), "elsewhere")
    out = capsys.readouterr().out
    for words in (
        "film-reviews@1",
        "sha256:",
        "accuracy",
        "peak",
        'turret predict film-reviews@1 "a text of your own" --store elsewhere',
        "turret evaluate film-reviews@1 OTHER.csv --report page.html --store elsewhere",
        "turret promote film-reviews@1 production --store elsewhere",
        f"turret serve --base {json.loads(typed.out)['base']['id']} --store elsewhere",
    ):
        assert words in out
    monkeypatch.setenv("TURRET_STORE", "elsewhere")
    with Progress(as_json=False) as shown:
        shown.show_result(RunResult(**json.loads(typed.out)), "elsewhere")
    assert "--store" not in capsys.readouterr().out, "the shell says it already"


def test_the_lines_after_a_verb_offer_the_next_step(typed, tmp_path, capsys) -> None:
    data, store = str(typed.folder / "Film Reviews.csv"), str(tmp_path / "store")
    shutil.copytree(typed.folder / "store", store)
    where = f" --store {store}"
    assert run(["evaluate", "film-reviews", data, "--store", store]) == 0
    out = capsys.readouterr().out
    assert f"  turret evaluate film-reviews '{data}' --out wrong.csv --report page.html{where}" in out
    assert f"  turret promote film-reviews@1 production{where}" in out
    assert run(["promote", "film-reviews@1", "production", "--store", store]) == 0
    out = capsys.readouterr().out
    assert f'  turret predict film-reviews "a text of your own"{where}' in out
    assert f"  turret rollback film-reviews production{where}" in out
    assert run(["promote", "film-reviews@1", "production", "--store", store]) == 0
    assert "turret rollback" not in capsys.readouterr().out  # the control: nothing moved
    assert run(["promote", "film-reviews@1", "candidate", "--store", store, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert run(["plan", *typed.arguments, "--store", store]) == 0
    words = shlex.join(["turret", "train", *typed.arguments, "--store", store])
    assert capsys.readouterr().out.splitlines()[-1] == f"start it with  {words}"


def test_progress_without_a_terminal_says_the_last_score_and_the_time_left(capsys) -> None:
    from turret.train.curve import StepRecord

    with Progress(as_json=False) as shown:
        for step in (1, 2, 3):
            scored = {"accuracy": 0.5} if step == 1 else None
            shown.record(StepRecord(step, 10, step / 10, 0.7, 1e-3, 1.0, 8, 80, 2.0, 40.0, 10**8, scored, "validation"))
    lines = capsys.readouterr().err.splitlines()
    assert "18 s left" in lines[0]
    assert "14 s left" in lines[-1]
    assert "validation accuracy 0.500" in lines[-1]


@pytest.mark.slow
def test_the_bar_keeps_the_time_at_80_columns_and_drops_the_memory_then_the_rate() -> None:
    """In a terminal of that width; a wide one shows all of it."""
    code = (
        "from turret.cli.train import Progress; from turret.train.curve import StepRecord\n"
        "with Progress(as_json=False) as shown:\n"
        "    for step in range(1, 40):\n"
        "        scored = {'accuracy': 0.5} if step == 1 else None\n"
        "        record = StepRecord(step, 1000, 0.1, 0.7, 1e-3, 1.0, 8, 80, 2.0, 40.0, 10**8, scored, 'validation')\n"
        "        shown.record(record)\n"
        "        shown._bar.refresh()\n"
    )
    lines = {}
    for width in (80, 160):
        said = _on_terminal(code, width)
        lines[width] = [line for line in re.split(r"[\r\n]", said) if "39/1000" in line][-1]
    for line in lines.values():
        assert re.search(r"[╸━]{16} 39/1000  loss 0\.700  validation accuracy 0\.500 .*\d:\d\d:\d\d left", line), line
    assert "MB" not in lines[80]
    assert "40 tokens/s  100 MB" in lines[160]


def _on_terminal(code: str, width: int) -> str:
    """What a Python program prints on a terminal of that many columns, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(width), "LINES": "24"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 1 << 16)
            except OSError:  # the program has ended
                break
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["missing.csv", "--base", "x"], 1, "there is no file"),
        (["missing.csv"], 1, "there is no file"),
        (["missing.toml"], 2, "cannot be read"),
        (["a.csv", "--base", "x", "--data", "b.csv"], 2, "two sources of data"),
        (["a.csv", "--base", "x", "--set", "train.epoch=1"], 2, "did you mean 'train.epochs'"),
        (["a.csv", "--base", "x", "--set", "train.epochs"], 2, "expected KEY=VALUE"),
        (["a.csv", "--base", "x", "--set", "train.epochs=many"], 2, "train.epochs"),
        (["a.csv", "--base", "x", "--method", "lore"], 2, "expected lora, prefix"),
        (["a.csv", "--base", "x", "--name", "../a"], 2, "bad adapter name"),
        (["quick-classify", "--seed", "-1"], 2, "seed"),
    ],
)
def test_a_mistake_in_train_and_plan_costs_one_line(
    arguments, status, complaint, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("train", "plan"):
        assert run([verb, *arguments]) == status
        out, err = capsys.readouterr()
        assert out == ""
        last = err.splitlines()[-1]
        assert last.startswith("turret: ")
        assert complaint in last
        assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["predict", "other", "x"], 1, "no adapter named 'other'"),
        (["predict", "film-reviews@9", "x"], 1, "no film-reviews@9"),
        (["predict", "../x", "x"], 2, "bad adapter name"),
        (["predict", "film-reviews", "nothing.csv"], 1, "there is no file 'nothing.csv'"),
        (["predict", "film-reviews", "a", "b", "--text", "c"], 1, "needs one table"),
        (["evaluate", "film-reviews", "nothing.csv"], 1, "there is no file"),
        (["evaluate", "film-reviews", "x.csv", "--set", "train.lr=1"], 2, "expected a key of [data]"),
    ],
)
def test_a_mistake_in_predict_and_evaluate_costs_one_line(typed, arguments, status, complaint, capsys) -> None:
    assert run([*arguments, *typed.store]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err.splitlines()[-1]
