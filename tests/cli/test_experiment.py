"""`turret experiment`: `status` says what to do, `--json` is one object, an error one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from experiments.conftest import filled

from turret.cli.main import run


@pytest.fixture
def stored(tmp_path) -> str:
    return str(filled(tmp_path / "store", tmp_path / "bundles").store.root)


@pytest.fixture
def said(stored, capsys):
    """Runs a command, checks its exit status, and returns what it prints."""

    def said(*arguments: str, status: int = 0) -> str:
        assert run(["experiment", *arguments, "--store", stored]) == status
        out, err = capsys.readouterr()
        assert (err if status == 0 else out) == ""
        return out if status == 0 else err

    return said


def told(out: str) -> Any:
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.mark.slow
def test_an_experiment_from_its_start_to_its_end(said, tmp_path) -> None:
    assert "no experiments yet: turret experiment start" in said("list")
    begun = said("start", "news", "--candidate", "news@2", "--ramp", "20%,0.5", "--max-errors", "0.02")
    assert "traffic   control 80%, candidate 20% (planned 20% → 50%)" in begun
    assert "rolled back automatically when worse, or over 2% errors and more than control; promoted only by a" in begun
    assert "promoted only by a person" in begun
    assert "next: send outcomes: `turret experiment outcome`" in begun
    assert "control 50%, candidate 50%" in said("ramp", "news")
    assert "is at its end: give a share" in said("ramp", "news", status=1)
    version, arm = said("assign", "news", "ann", "--receipt", "r1").split()[:2]
    assert (version, arm) in (("news@1", "(control,"), ("news@2", "(candidate,"))
    assert said("outcome", "news", "1", "--receipt", "r1").startswith("counted for c")
    assert said("outcome", "news", "1", "--unit", "ann").startswith("this answer already has the outcome 1")
    table = tmp_path / "outcomes.csv"
    table.write_text("receipt,unit,value\nr1,,1\n,ann,0\n,bob,1\n")
    lines = said("outcome", "news", "--file", str(table)).splitlines()
    assert lines[0] == "3 outcomes: 2 repeated, 1 unknown"
    assert "not decided yet; the highest evidence was" in said("status", "news")
    assert "count for 7 days after the first answer; after that a unit without one is missing" in said("status", "news")
    ended = said("stop", "news", "--rollback")
    assert "nothing: it has ended (asked for)" in ended
    assert "news#1" in said("list")
    assert ", ended 20" in said("status", "news", "--number", "1")


def test_json_has_stable_keys(said) -> None:
    begun = told(said("start", "news", "--candidate", "news@2", "--shadow", "news@3", "--share", "50%", "--json"))
    keys = """
        experiment adapter number state alias metric unit alpha guards steps outcome_ttl missing_bound created who ended
        verdict alias_names arms sample_ratio void verdicts decision done next history
    """
    assert set(begun) == set(keys.split())
    assert set(begun["arms"][1]) == {
        "arm", "role", "version", "digest", "live", "share", "units", "outcomes", "missing", "half_within", "mean",
        "answers", "errors", "slow", "mean_seconds", "compared", "agreed", "against_control",
    }  # fmt: skip
    assert set(begun["arms"][1]["against_control"]) == {
        "verdict", "if_missing_are_alike", "missing", "difference", "interval", "evidence", "since_verdict",
    }  # fmt: skip
    assert set(begun["sample_ratio"]) == {"ok", "units", "outcomes", "delays", "needed"}
    assert set(told(said("assign", "news", "ann", "--json"))) == {"version", "arm", "probability"}
    outcome = told(said("outcome", "news", "1", "--unit", "ann", "--json"))
    assert set(outcome) == {"outcomes", "counts", "done"}
    assert set(outcome["outcomes"][0]) == {"status", "text", "experiment", "arm"}
    for verb in (["ramp", "news", "10%"], ["status", "news"], ["settle", "news"], ["stop", "news"]):
        assert set(told(said(*verb, "--json"))) == set(begun)
    (listed,) = told(said("list", "--json"))["experiments"]
    assert {"experiment", "arms", "outcomes", "log_evidence", "discovery", "verdicts"} <= set(listed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["start", "news"], 2, "needs two versions"),
        (["start", "news", "--candidate", "news@2", "--share", "20"], 2, "share '20': expected a share of the traffic"),
        (["start", "news", "--candidate", "news@2", "--share", "candidate=x"], 2, "share 'x'"),
        (["start", "other", "--candidate", "news@2"], 1, "no adapter named 'other'"),
        (["start", "../x", "--candidate", "news@2"], 2, "bad adapter name"),
        (["status", "news"], 1, "no experiment on news: `turret experiment start` starts one"),
        (["outcome", "news", "1"], 2, "needs the receipt of its answer or its unit"),
        (["outcome", "news"], 2, "give one value with --receipt or --unit, or a table"),
        (["outcome", "news", "--file", "none.csv"], 1, "there is no file 'none.csv'"),
        (["stop", "news", "--promote", "x", "--rollback"], 2, "not both"),
        (["replay", "news@1", "news@1", "x.csv"], 1, "are the same version, news@1"),
        (["replay", "news@1", "news@2"], 1, "nothing to replay: news@production requires no golden examples"),
        (["list", "--alpha", "2"], 2, "level 2.0"),
        (
            ["start", "news", "--candidate", "news@2", "--outcome-ttl", "soon"],
            2,
            "duration 'soon': expected a number with",
        ),
        (
            ["start", "news", "--candidate", "news@2", "--outcome-ttl", "0s"],
            2,
            "outcome_ttl of 0.0 s: expected",
        ),
        (["ramp"], 2, "Missing argument 'name'"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_what_cannot_be_is_one_line(said, arguments, status, complaint) -> None:
    err = said(*arguments, status=status)
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("receipt,value\n,1\n", "line 2: expected a receipt or a unit"),
        ("receipt,unit,value\na,b,1\n", "line 2: expected a receipt or a unit, and one of them only"),
        ("value\n1\n", "needs the columns value, and receipt or unit: it has value"),
        ("unit,score\nann,1\n", "it has unit, score"),
    ],
)
def test_a_table_of_outcomes_that_cannot_be_meant_is_one_line(said, tmp_path, content, complaint) -> None:
    said("start", "news", "--candidate", "news@2")
    (tmp_path / "o.csv").write_text(content)
    assert complaint in said("outcome", "news", "--file", str(tmp_path / "o.csv"), status=1)
