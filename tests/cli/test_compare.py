"""The options of `turret compare`, without a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simulated_comparison import made

from turret.cli.main import run
from turret.cli.options import numbers
from turret.cli.studies import _print
from turret.errors import BadExperiment, RecipeError
from turret.experiments.experiment import read_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400), ("2 h", 7200), ("7D", 604800)],
)
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5w", "-3m", "3m!", "m", "1e3", "nan", "1.2.3h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(BadExperiment, match="expected a number with s, m, h or d, such as 30m"):
        read_duration(text)


def test_fractions_are_numbers() -> None:
    assert numbers("fractions", "0.05, 0.25,1", "numbers") == [0.05, 0.25, 1.0]
    with pytest.raises(RecipeError, match="--fractions 'a': expected numbers such as"):
        numbers("fractions", "a,b", "numbers such as 0.5")


def test_an_unknown_method_is_one_line_and_status_two(tmp_path, capsys) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "".join(f"some words {n},{'ab'[n % 2]}\n" for n in range(20)))
    status = run(["compare", str(table), "--base", "none", "--methods", "full,qlora", "--store", str(tmp_path / "s")])
    assert status == 2
    assert "qlora is not a method to compare" in capsys.readouterr().err


def reviews(folder: Path) -> Path:
    table = folder / "t.csv"
    table.write_text("text,label\n" + "".join(f"some words {n},{'ab'[n % 2]}\n" for n in range(100)))
    return table


@pytest.mark.slow
def test_the_end_of_a_comparison_says_what_the_plain_name_answers_and_how_to_keep_a_version(capsys) -> None:
    found = made("full,lora", seeds=4, count=1500, margin=2)
    _print(found)
    out = capsys.readouterr().out
    assert f"turret promote {found.promotion.version} production" in out
    assert (
        "tiny answers as before: the 8 trainings here are versions of the comparison. Keep one: turret promote" in out
    )


def test_the_plan_says_what_the_design_can_decide_before_anything_is_trained(tmp_path, capsys) -> None:
    asked = ["compare", str(reviews(tmp_path)), "--base", "none", "--plan", "--store", str(tmp_path / "s")]
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert "25 runs, judged against full" in said
    assert "5 seeds and 20 test examples show that they are within 1 point in " in said
    assert "more test examples would decide within 1 point" in said
    assert not (tmp_path / "s").exists()


def test_the_plan_as_json_is_one_object(tmp_path, capsys) -> None:
    asked = ["compare", str(reviews(tmp_path)), "--base", "none", "--plan", "--store", str(tmp_path / "s")]
    assert run([*asked, "--seeds", "3", "--margin", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"name", "methods", "against", "trainings", "missing", "power"} <= set(said)
    assert (said["trainings"], said["missing"]) == (15, 15)
    assert 0 <= said["power"]["within"] <= said["power"]["at_ten_times"] <= 1
    assert (said["power"]["seeds"], said["power"]["examples"], said["power"]["margin"]) == (3, 20, 2)


def test_one_seed_can_still_be_planned(tmp_path, capsys) -> None:
    asked = ["compare", str(reviews(tmp_path)), "--base", "none", "--plan", "--store", str(tmp_path / "s")]
    assert run([*asked, "--seeds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["power"]["decides"] is None
