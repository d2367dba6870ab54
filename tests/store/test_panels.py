"""Panels: versions that never change, a plain name that moves forward and back, and nothing of another tenant."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from turret import audit
from turret.access import Access
from turret.errors import AdapterError, BadArgument, BadReference, DataError, InUse, NotFound, TurretError
from turret.store import Panel, Question, Store
from turret.store.panels import PanelMove

TOPIC = {"kind": "classify", "labels": ["bill", "bug", "other"]}
SIDES = {"kind": "classify", "labels": ["yes", "no"]}
GRADES = {"kind": "score", "labels": ["low", "middle", "high"]}
HEADS = {"kind": "questions", "labels": ["topic: bill", "topic: bug", "urgent: no", "urgent: yes"], "multi_label": True}
MANY = {"kind": "classify", "labels": ["rude", "spam"], "multi_label": True}


@pytest.fixture
def known(put):
    """Versions of `topic`, `urgent`, `grade`, `heads` and `many`."""
    tasks = {"topic": TOPIC, "urgent": SIDES, "grade": GRADES, "heads": HEADS, "many": MANY}
    return {name: put(name, said={"task": task}) for name, task in tasks.items()}


def said(panel: Panel) -> list[tuple]:
    return [(each.name, each.reference, each.type, each.labels) for each in panel.questions]


def test_a_question_gets_type_and_labels_from_its_adapter(store, known) -> None:
    asked = {"topic": "topic", "urgent": "urgent@1", "grade": "grade", "head": "heads#urgent", "spam": "many#spam"}
    panel = store.panels.create("tickets", asked)
    assert str(panel) == "tickets@1"
    assert said(panel) == [
        ("topic", "topic", "choice", ("bill", "bug", "other")),
        ("urgent", "urgent@1", "predicate", ("no", "yes")),
        ("grade", "grade", "score", ("low", "middle", "high")),
        ("head", "heads#urgent", "predicate", ("no", "yes")),
        ("spam", "many#spam", "predicate", ("no", "yes")),
    ]
    assert store.panels.show("tickets") == panel


def test_type_labels_and_threshold_are_kept_as_they_were_given(store, known) -> None:
    asked = Question("topic", "topic@1", "score", ("other", "bug", "bill"), 0.9)
    assert store.panels.create("tickets", [asked]).questions == (asked,)
    assert Store(store.location).panels.show("tickets@1").questions == (asked,)


def test_an_adapter_without_a_name_of_a_question_asks_all_that_it_decides(store, known) -> None:
    panel = store.panels.create("tickets", [Question("", "heads@1"), Question("", "grade"), Question("", "many#spam")])
    assert [(each.name, each.reference) for each in panel.questions] == [
        ("topic", "heads@1#topic"),
        ("urgent", "heads@1#urgent"),
        ("grade", "grade"),
        ("spam", "many#spam"),
    ]


def test_the_same_questions_keep_their_version_and_others_get_the_next(store, known) -> None:
    first = store.panels.create("tickets", {"topic": "topic"})
    assert store.panels.create("tickets", {"topic": "topic"}) == first
    assert store.panels.create("tickets", {"topic": "topic@1"}).number == 2
    assert said(store.panels.show("tickets@1")) == said(first)
    assert [str(each) for each in store.panels.list()] == ["tickets@1", "tickets@2"]


def test_the_plain_name_means_what_was_promoted_and_goes_back(store, known) -> None:
    panels = store.panels
    for reference in ("topic", "topic@1", "grade"):
        panels.create("tickets", {"q": reference})
    assert str(panels.show("tickets")) == "tickets@3"
    assert panels.find("tickets@production") is None
    moves = [panels.promote(f"tickets@{number}") for number in (1, 2, 2, 3)]
    assert [(each.panel, each.before, each.changed) for each in moves] == [
        ("tickets@1", None, True),
        ("tickets@2", "tickets@1", True),
        ("tickets@2", "tickets@2", False),
        ("tickets@3", "tickets@2", True),
    ]
    assert [panels.rollback("tickets").panel for _ in range(2)] == ["tickets@2", "tickets@1"]
    assert str(panels.show("tickets")) == str(panels.show("tickets@production")) == "tickets@1"
    with pytest.raises(NotFound, match=r"nothing to roll back to: tickets@1 was the first; `turret panel promote"):
        panels.rollback("tickets")
    panels.promote("tickets@3")
    assert panels.rollback("tickets").panel == "tickets@1"
    assert [each["verb"] for each in panels.moves("tickets")] == ["promote"] * 3 + ["rollback"] * 2 + [
        "promote",
        "rollback",
    ]


def test_every_change_is_in_the_audit_log(store, known) -> None:
    store.panels.create("tickets", {"topic": "topic"})
    store.panels.create("tickets", {"topic": "topic@1"})
    store.panels.promote("tickets@1")
    store.panels.promote("tickets@2")
    store.panels.rollback("tickets")
    with store.database().reading() as connection:
        found = [each for each in audit.read_actions(connection) if each.what.startswith("tickets")][::-1]
    assert [(each.verb, each.what) for each in found] == [
        ("panel", "tickets@1"),
        ("panel", "tickets@2"),
        ("promote", "tickets@production"),
        ("promote", "tickets@production"),
        ("rollback", "tickets@production"),
    ]
    assert found[0].after == {"questions": {"topic": "topic"}}
    assert (found[-1].before, found[-1].after) == ({"version": 2}, {"version": 1})


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({}, DataError, "a panel of 0 questions: expected 1 to 400"),
        ([Question("a", "topic"), Question("a", "grade")], DataError, "question 'a' is there twice"),
        ({" a": "topic"}, DataError, "expected at most 100 printable characters"),
        ({"a": "nobody"}, NotFound, "no adapter named 'nobody'"),
        ({"a": "topic@7"}, NotFound, "no topic@7"),
        ({"a": "../topic"}, BadReference, "bad adapter name"),
        ({"a": "topic#b"}, DataError, "topic@1 answers one question: leave #b out"),
        ({"a": "heads"}, DataError, "heads@1 answers 'topic', 'urgent': name one of them, such as heads@1#topic"),
        ([Question("a", "topic", labels=("bill", "x", "bug"))], DataError, "no label 'x', topic@1 has 'bill', 'bug'"),
        ([Question("a", "topic", labels=("bill", "bug"))], DataError, "the labels lack 'other'"),
        ([Question("a", "topic", "score")], DataError, "is a score: give the labels of topic@1 from the lowest"),
        ([Question("a", "topic", "predicate", ("bill", "bug", "other"))], DataError, "has 3 labels: expected 2"),
        ([Question("a", "topic", "poem")], DataError, "expected predicate, choice, score"),
        ([Question("a", "topic", threshold=1.5)], DataError, "expected a number between 0 and 1"),
        ([Question("a", "topic", threshold=float("nan"))], DataError, "expected a number between 0 and 1"),
        ({str(number): "topic" for number in range(401)}, DataError, "a panel of 401 questions"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_stored(folder_store, put, asked, error, says) -> None:
    for name, task in {"topic": TOPIC, "heads": HEADS, "grade": GRADES}.items():
        put(name, said={"task": task})
    with pytest.raises(error) as raised:
        folder_store.panels.create("tickets", asked)
    assert says in str(raised.value)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)
    assert folder_store.panels.list() == []


def test_adapters_without_probabilities_of_labels_and_those_for_two_texts_are_refused(folder_store, put) -> None:
    put("tags", said={"task": {"kind": "token_classification", "labels": ["O", "B-x"]}})
    put("words", said={"task": {"kind": "generate"}})
    put("number", said={"task": {"kind": "regression"}})
    put("pairs", said={"task": {**TOPIC, "kind": "text_pairs", "pairs": True}})
    for name in ("tags", "words", "number", "pairs"):
        with pytest.raises(AdapterError, match="needs a version that classifies one text"):
            folder_store.panels.create("tickets", {"a": name})


def test_a_panel_is_not_called_like_an_adapter(store, known) -> None:
    with pytest.raises(InUse, match="an adapter is called topic: give the panel another name, such as topic-panel"):
        store.panels.create("topic", {"topic": "topic"})


def test_a_version_that_a_panel_asks_by_number_is_not_deleted_unless_forced(store, known, put) -> None:
    put("topic", said={"task": TOPIC})
    store.panels.create("tickets", {"topic": "topic@1", "other": "topic"})
    with pytest.raises(InUse, match="panel tickets@1 asks it"):
        store.delete("topic@1")
    store.delete("topic@2")  # no panel asks it by its number
    store.delete("topic@1", force=True)
    with pytest.raises(NotFound, match="no topic@1"):
        store.panels.promote("tickets@1")


def test_a_panel_whose_adapter_answers_otherwise_now_is_not_promoted(store, known, put) -> None:
    store.panels.create("tickets", {"topic": "topic"})
    put("topic", said={"task": {**TOPIC, "labels": ["bill", "bug", "praise"]}})
    with pytest.raises(DataError, match="no label 'other', topic@2 has 'bill', 'bug', 'praise'"):
        store.panels.promote("tickets@1")


def test_panels_of_another_tenant_do_not_exist(store, known) -> None:
    store.panels.create("tickets", {"topic": "topic"})
    other = store.with_access(Access("legal")).panels
    assert other.list() == []
    assert other.find("tickets") is None
    with pytest.raises(NotFound) as missing:
        other.show("tickets")
    with pytest.raises(NotFound) as never:
        other.show("nothing")
    assert str(missing.value).replace("tickets", "nothing") == str(never.value)
    for verb in (other.promote, other.rollback, other.moves):
        with pytest.raises(NotFound):
            verb("tickets")
    with pytest.raises(NotFound, match="no adapter named 'topic'"):
        other.create("tickets", {"topic": "topic"})


def test_a_limited_token_sees_a_panel_only_with_all_its_adapters(store, known) -> None:
    store.panels.create("t-one", {"topic": "topic"})
    store.panels.create("t-two", {"topic": "topic", "grade": "grade"})
    names = lambda *adapters: [str(each) for each in store.with_access(Access(adapters=adapters)).panels.list()]
    assert names("t-*", "topic") == ["t-one@1"]
    assert names("t-*", "topic", "grade") == ["t-one@1", "t-two@1"]
    assert names("topic", "grade") == []


def test_a_limited_token_makes_no_panel_of_a_name_that_it_does_not_see(store, known, put) -> None:
    store.panels.create("p", {"grade": "grade"})
    store.panels.create("t-two", {"topic": "topic", "grade": "grade"})
    store.panels.create("t-two", {"topic": "topic"})  # the token sees this version alone
    limited = store.with_access(Access(adapters=("t-*", "topic"))).panels
    errors = set()
    for name in ("p", "grade", "nobody", "echo", "t-two"):
        with pytest.raises(NotFound, match="that you may make: choose another name, of 't-\\*', 'topic'") as refused:
            limited.create(name, {"topic": "topic@1"})
        errors.add(str(refused.value).replace(f"'{name}'", "NAME"))
    assert len(errors) == 1
    assert [str(each) for each in store.panels.list()] == ["p@1", "t-two@1", "t-two@2"]
    assert [str(limited.create("t-one", {"topic": each})) for each in ("topic", "topic@1")] == ["t-one@1", "t-one@2"]
    with pytest.raises(InUse, match="an adapter is called topic"):
        limited.create("topic", {"topic": "topic"})


def test_a_token_limited_to_a_base_makes_no_panel_of_a_name_on_another(store, put) -> None:
    for name, base in (("mine", "echo"), ("theirs", "other")):
        put(name, said={"base": {"id": base, "fingerprint": "sha256:x"}, "task": TOPIC})
    store.panels.create("p", {"topic": "theirs"})
    limited = store.with_access(Access(bases=("echo",))).panels
    for name in ("p", "theirs"):
        with pytest.raises(NotFound, match=f"no panel '{name}' that you may make"):
            limited.create(name, {"topic": "mine"})
    assert str(limited.create("q", {"topic": "mine"})) == "q@1"


def test_panels_made_at_once_get_numbers_of_their_own(store, known) -> None:
    made: list[str | TurretError] = []

    def make(number: int) -> None:
        panels = Store(store.location).panels
        try:
            made.append(str(panels.create("tickets", [Question("q", "topic", threshold=number / 10)])))
        except TurretError as error:
            made.append(error)

    threads = [threading.Thread(target=make, args=[number]) for number in range(1, 7)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(map(str, made)) == [f"tickets@{number}" for number in range(1, 7)]
    assert {each.questions[0].threshold for each in store.panels.list()} == {n / 10 for n in range(1, 7)}


def test_a_question_is_found_by_its_name_or_is_the_only_one(folder_store, put) -> None:
    put("topic", said={"task": TOPIC})
    panel = folder_store.panels.create("tickets", {"topic": "topic"})
    assert panel.question("topic") is panel.question(None) is panel.questions[0]
    with pytest.raises(BadArgument, match="no question 'x': panel tickets@1 asks 'topic'"):
        panel.question("x")
    two = replace(panel, questions=(*panel.questions, Question("b", "topic")))
    with pytest.raises(BadArgument, match="a question has no name: panel tickets@1 asks 'topic', 'b'"):
        two.question(None)


def test_json_has_everything_that_was_given(folder_store, put) -> None:
    put("topic", said={"task": TOPIC})
    found = json.loads(json.dumps(folder_store.panels.create("tickets", {"topic": "topic"}).as_json()))
    assert found["questions"] == [
        {
            "name": "topic",
            "reference": "topic",
            "type": "choice",
            "labels": ["bill", "bug", "other"],
            "threshold": None,
        }
    ]
    assert (found["panel"], found["production"]) == ("tickets@1", False)


def test_a_token_limited_to_a_base_moves_a_panel_among_versions_that_it_sees(store, put) -> None:
    for base in ("echo", "other"):
        put("topic", said={"task": TOPIC, "base": {"id": base, "fingerprint": f"sha256:{base}"}})
    for threshold, number in ((0.5, 1), (0.5, 2), (0.6, 1)):
        store.panels.create("p", [Question("q", f"topic@{number}", threshold=threshold)])
    limited = store.with_access(Access(bases=("echo",))).panels
    assert [str(each) for each in limited.list()] == ["p@1", "p@3"]
    for number in (1, 2):
        store.panels.promote(f"p@{number}")
    for missing in (2, 9):
        with pytest.raises(NotFound, match=f"^no panel 'p@{missing}': it has '1', '3'$"):
            limited.promote(f"p@{missing}")
    assert (limited.find("p@production"), str(limited.show("p"))) == (None, "p@3")
    assert limited.promote("p@3") == PanelMove("p@3", None, changed=True)
    assert limited.rollback("p") == PanelMove("p@1", "p@3", changed=True)
    assert [each["number"] for each in limited.moves("p")] == [1, 3, 1]
    store.panels.promote("p@2")
    assert limited.rollback("p") == PanelMove("p@1", None, changed=True)
    with pytest.raises(NotFound, match="nothing to roll back to: p@1 was the first"):
        limited.rollback("p")


def test_a_token_limited_to_adapters_rolls_a_panel_back_past_versions_that_it_does_not_see(store, known) -> None:
    for number, name in enumerate(("topic", "urgent", "topic"), start=1):
        store.panels.create("t-panel", [Question("q", f"{name}@1", threshold=number / 10)])
        store.panels.promote(f"t-panel@{number}")
    limited = store.with_access(Access(adapters=("t*",))).panels
    assert limited.rollback("t-panel") == PanelMove("t-panel@1", "t-panel@3", changed=True)


def test_a_token_limited_to_adapters_reads_no_questions_of_a_panel_that_shares_a_name(store, known, put) -> None:
    store.panels.create("t-one", {"q": "urgent"})
    put("t-one")
    with store.with_access(Access(adapters=("t-*",))).database().reading() as connection:
        assert [each.what for each in audit.read_actions(connection)] == ["t-one@1"]
        assert [each.verb for each in audit.read_actions(connection)] == ["put"]
