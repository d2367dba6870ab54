"""`turret panel`: lines of text, one JSON object, one line for an error."""

from __future__ import annotations

import json

import pytest
from store.bundles import tensors, write_bundle

from turret.cli.main import run
from turret.store import Store

TASKS = {
    "topic": {"kind": "classify", "labels": ["bill", "bug"]},
    "heads": {"kind": "questions", "labels": ["urgent: no", "urgent: yes", "tone: calm", "tone: angry"]},
}


@pytest.fixture
def said(tmp_path, capsys):
    """Runs a command on a store with `topic` and `heads`, checks its exit status, and returns what it prints."""
    store = Store(tmp_path / "store")
    for seed, (name, task) in enumerate(TASKS.items()):
        store.put(name, write_bundle(tmp_path, tensors(seed), said={"task": task}))

    def said(*arguments: str, status: int = 0) -> str:
        assert run(["panel", *arguments, "--store", str(store.root)]) == status
        out, err = capsys.readouterr()
        assert (err if status == 0 else out) == ""
        return out if status == 0 else err

    return said


def test_a_panel_is_made_shown_listed_promoted_and_rolled_back(said) -> None:
    assert said("list").startswith("no panels yet: turret panel create")
    made = said("create", "tickets", "--ask", "topic=topic@1", "--ask", "heads", "--threshold", "topic=0.9")
    first, *table = made.splitlines()
    assert first.startswith("tickets@1  ")
    assert [line.split()[:3] for line in table[1:4]] == [
        ["topic", "topic@1", "choice"],
        ["urgent", "heads#urgent", "predicate"],
        ["tone", "heads#tone", "choice"],
    ]
    assert table[1].endswith("0.9")
    assert said("show", "tickets").splitlines()[1:] == table[:4]
    said("create", "tickets", "--ask", "tone=heads#tone", "--type", "tone=predicate", "--labels", "tone=calm, angry")
    assert [line.split()[0] for line in said("list").splitlines()[1:]] == ["tickets@1", "tickets@2"]
    assert said("promote", "tickets@1") == "tickets means tickets@1 now; it meant the newest version before\n"
    assert said("promote", "tickets@1") == "tickets means tickets@1 already: nothing moved\n"
    assert said("promote", "tickets@2") == "tickets means tickets@2 now; it meant tickets@1 before\n"
    assert said("rollback", "tickets") == "tickets means tickets@1 now; it meant tickets@2 before\n"
    assert "production" in said("show", "tickets").splitlines()[0]


def test_json_has_stable_keys(said) -> None:
    made = json.loads(said("create", "t", "--ask", "tone=heads#tone", "--type", "tone=score",
                           "--labels", "tone=angry,calm", "--threshold", "tone=0.8", "--json"))  # fmt: skip
    assert made.pop("created") <= "9"
    assert made.pop("who")
    question = {
        "name": "tone",
        "reference": "heads#tone",
        "type": "score",
        "labels": ["angry", "calm"],
        "threshold": 0.8,
    }
    assert made == {"panel": "t@1", "production": False, "questions": [question]}
    assert json.loads(said("show", "t@1", "--json"))["questions"] == [question]
    assert [each["panel"] for each in json.loads(said("list", "--json"))["panels"]] == ["t@1"]
    assert json.loads(said("promote", "t", "--json")) == {"panel": "t@1", "before": None, "changed": True}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["create", "t", "--ask", "x=nobody"], 1, "no adapter named 'nobody'"),
        (["create", "t", "--ask", "x=topic", "--type", "y=score"], 2, "--type y=…: no --ask y=REF"),
        (["create", "t", "--ask", "x=topic", "--threshold", "x=high"], 2, "expected a number such as 0.9"),
        (["create", "t", "--ask", "x=topic", "--threshold", "0.9"], 2, "expected QUESTION=VALUE"),
        (["create", "topic", "--ask", "x=topic"], 1, "an adapter is called topic"),
        (["show", "t"], 1, "no panel 't': there is none: `turret panel create` makes one"),
        (["rollback", "t"], 1, "no panel 't'"),
    ],
)
def test_a_mistake_is_one_line(said, arguments, status, says) -> None:
    line = said(*arguments, status=status)
    assert says in line
    assert line.count("\n") == 1
    assert len(line) < 300
