"""`promote`, `rollback`, `gate`: a line of text, one JSON object, one line for an error."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from store.bundles import tensors, write_bundle

from turret.cli.main import run
from turret.store import Store


@pytest.fixture
def stored(tmp_path) -> str:
    store = Store(tmp_path / "store")
    for seed, accuracy in enumerate((0.5, 0.953)):
        store.put("news", write_bundle(tmp_path, tensors(seed)), metrics={"test": {"accuracy": accuracy, "loss": 0.18}})
    return str(store.root)


@pytest.fixture
def said(stored, capsys):
    """Runs a command, checks its exit status, and returns what it prints."""

    def said(*arguments: str, status: int = 0) -> str:
        assert run([*arguments, "--store", stored]) == status
        out, err = capsys.readouterr()
        assert (err if status == 0 else out) == ""
        return out if status == 0 else err

    return said


def told(out: str) -> Any:
    assert out.count("\n") == 1
    return json.loads(out)


def test_promote_and_rollback_say_what_the_alias_names_and_named(said) -> None:
    first, *offered = said("promote", "news@1", "production").splitlines()
    assert first == "news@production names news@1 now; it named nothing before"
    assert [line.split()[:2] for line in offered] == [["try"], ["turret", "predict"], ["turret", "rollback"]]
    assert said("promote", "news@2", "production").startswith(
        "news@production names news@2 now; it named news@1 before\n"
    )
    assert said("promote", "news@2", "production") == "news@production names news@2 already: nothing moved\n"
    assert said("rollback", "news") == "news@production names news@1 now; it named news@2 before\n"
    err = said("rollback", "news", status=1)
    assert err.startswith("turret: nothing to roll back to: news@production names news@1 and named nothing before")
    assert err.count("\n") == 1


def test_a_version_that_reads_two_texts_is_asked_about_two(said, stored, tmp_path) -> None:
    for name, task in {
        "mood": {"kind": "classify", "labels": ["a", "b"]},
        "rank": {"kind": "rerank", "pairs": True},
    }.items():
        Store(stored).put(name, write_bundle(tmp_path, name.encode(), said={"task": task}))
    assert '"a text of your own" --store' in said("promote", "mood", "production")
    assert '"a text of your own" "another text" --store' in said("promote", "rank", "production")


def test_promote_and_rollback_json_have_stable_keys(said) -> None:
    said("promote", "news@1", "candidate")
    moved = told(said("promote", "news@2", "candidate", "--json"))
    assert moved == {
        "name": "news", "alias": "candidate", "version": "news@2", "before": "news@1", "changed": True, "skipped": [],
        "replays": [],
    }  # fmt: skip
    assert set(told(said("rollback", "news", "candidate", "--json"))) == set(moved)


@pytest.mark.slow
def test_rollback_says_what_it_passed_over(said) -> None:
    for number in (1, 2, 1):
        said("promote", f"news@{number}", "production")
    said("promote", "news@2", "other")
    said("delete", "news@1", "--force")
    assert "skipped, because deleted: news@1" in said("rollback", "news")


def test_list_and_show_tell_the_aliases_and_their_moves(said) -> None:
    for number in (1, 2):
        said("promote", f"news@{number}", "production")
    said("promote", "news@2", "candidate")
    _, first, second = said("list").splitlines()
    assert "production" not in first
    assert "candidate production" in second
    said("rollback", "news")
    shown = said("show", "news")
    lines = [line.split() for line in shown.splitlines() if line.startswith(("  promote", "  rollback"))]
    assert [line[:4] for line in lines] == [
        ["promote", "production", "to", "1,"],
        ["promote", "production", "to", "2,"],
        ["promote", "candidate", "to", "2,"],
        ["rollback", "production", "to", "1,"],
    ]
    said("delete", "news@2", "--force")
    assert "production to 2, deleted later" in said("show", "news")
    assert "candidate removed" in said("show", "news")


@pytest.mark.slow
def test_show_tells_the_last_moves_of_many(said) -> None:
    for number in range(15):
        said("promote", f"news@{1 + number % 2}", "production")
    lines = said("show", "news").splitlines()
    assert sum(line.startswith("  promote") for line in lines) == 12
    assert any("3 earlier ones" in line for line in lines)


def test_a_gate_is_kept_shown_asked_and_removed(said) -> None:
    assert said("gate", "news") == "no gate on news\n"
    assert "news@production  test.accuracy>=0.9" in said("gate", "news", "production", "accuracy>=0.9", "loss<1")
    assert "production names no version yet" in said("gate", "news")
    err = said("promote", "news@1", "production", status=1)
    assert "news@1 may not become news@production: test.accuracy>=0.9 is required, found 0.5" in err
    said("promote", "news@2", "production")
    listed = told(said("gate", "news", "--json"))
    assert listed["name"] == "news"
    assert [gate["gate"] for gate in listed["gates"]] == ["test.accuracy>=0.9", "test.loss<1"]
    assert set(listed["gates"][0]) == {
        "alias", "split", "metric", "relation", "threshold", "gate", "holder", "passes", "found",
    }  # fmt: skip
    said("gate", "news", "production", "--remove", "accuracy", "--remove", "test.loss<1")
    assert said("gate", "news", "production") == "no gate on news@production\n"


def test_promote_can_require_for_this_time(said) -> None:
    err = said("promote", "news@1", "production", "--require", "accuracy>=0.9", "--require", "loss<1", status=1)
    assert "test.accuracy>=0.9 is required, found 0.5" in err
    assert "loss" not in err
    said("promote", "news@2", "production", "--require", "accuracy>=0.9", "--require", "loss<1")


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["promote", "other", "production"], 1, "no adapter named 'other'"),
        (["promote", "news", "3"], 2, "bad alias '3'"),
        (["promote", "news"], 2, "Missing argument"),
        (["promote", "news", "production", "--require", "accuracy"], 2, "bad gate 'accuracy'"),
        (["rollback", "news"], 1, "no news@production to roll back: news has versions 1 to 2 and no alias"),
        (["gate", "news", "production", "accuracy=1"], 2, "bad gate 'accuracy=1'"),
        (["gate", "news", "production", "--remove", "f1"], 1, "no gate 'f1' on news@production: it has none"),
    ],
)
def test_what_cannot_be_is_one_line(said, arguments, status, complaint) -> None:
    err = said(*arguments, status=status)
    assert complaint in err
    assert err.count("\n") == 1


def test_a_gate_says_at_once_whether_the_present_holder_passes(said) -> None:
    said("promote", "news@1", "production")
    shown = said("gate", "news", "production", "accuracy>=0.9", "loss<1")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "news@production test.accuracy>=0.9 news@1 fails, found 0.5" in lines
    assert any(line.startswith("news@production test.loss<1 news@1") for line in lines)
    found = {gate["metric"]: (gate["holder"], gate["passes"]) for gate in told(said("gate", "news", "--json"))["gates"]}
    assert found["accuracy"] == ("news@1", False)
    said("promote", "news@2", "production")
    assert "news@2 passes, found 0.9" in " ".join(said("gate", "news").split())
    said("gate", "news", "production", "f1>0.1")
    assert "news@2 fails, test has no such metric" in " ".join(said("gate", "news").split())


def test_golden_examples_are_kept_shown_refused_and_removed(said, tmp_path) -> None:
    """The versions of this store generate, so labels are refused before a base is loaded."""
    (tmp_path / "golden.csv").write_text("text,label\nx,good\ny,bad\n")
    shown = said("gate", "news", "production", "loss<1", "--golden", str(tmp_path / "golden.csv"), "--share", "0.95")
    assert re.search(r"news@production +golden:\w{12}>=0\.95 +2 golden examples", shown)
    assert "production names no version yet" in shown
    metric, golden = told(said("gate", "news", "--json"))["gates"]
    assert set(golden) == {
        "alias", "golden", "kind", "examples", "share", "gate", "holder", "passes", "found",
    }  # fmt: skip
    assert (metric["gate"], golden["examples"], golden["share"]) == ("test.loss<1", 2, 0.95)
    err = said("promote", "news@2", "production", "--replay", status=1)
    assert f"{golden['gate'].partition('>')[0]} expects labels, but news@2 generates texts" in err
    assert err.count("\n") == 1
    said("gate", "news", "production", "--remove", golden["gate"])
    assert told(said("gate", "news", "--json"))["gates"] == [metric]
    assert "a fraction above 0" in said(
        "gate", "news", "production", "--golden", str(tmp_path / "golden.csv"), "--share", "95", status=2
    )
    assert "add --golden FILE" in said("gate", "news", "production", "--share", "0.5", status=2)
