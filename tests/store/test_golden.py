"""An alias with golden examples accepts a version only after its content has passed them."""

from __future__ import annotations

import json

import pytest
from store import by_hand

from turret.errors import BadReference, Corrupt, DataError, GateFailed, NotFound, ReplayNeeded
from turret.store import Golden
from turret.store.golden import Example, GoldenReplay, GoldenSet

CLASSIFIES = {"task": {"kind": "classify", "labels": ["bad", "good"]}}
WRITES = {"task": {"kind": "generate"}}
READS_TWO = {"task": {"kind": "text_pairs", "labels": ["bad", "good"], "pairs": True}}
RERANKS = {"task": {"kind": "rerank", "pairs": True}}
MARKS = {"task": {"kind": "token_classification", "labels": ["bad", "good"]}}
MEASURES = {"task": {"kind": "regression", "pairs": False}}
EMBEDS = {"task": {"kind": "embedding"}}


def labelled(*labels: str) -> GoldenSet:
    return GoldenSet(tuple(Example(f"text {number}", "label", label) for number, label in enumerate(labels)))


def replay(wanted: GoldenSet, passed: int, **first: object) -> GoldenReplay:
    total = len(wanted.examples)
    said = {"example": 1, "text": "text 0", "expected": "label 'good'", "given": "bad", **first}
    return GoldenReplay(wanted.digest, passed, total, said if passed < total else None, "2026-01-02T03:04:05.000Z")


def test_a_set_is_known_by_its_content_and_reads_back_equal() -> None:
    wanted = GoldenSet(
        (
            Example("é\u2028\ud800", "equals", "x"),
            Example("b", "contains", ("one", "two")),
            Example("c", "expected", "a long text", 0.5),
        )
    )
    again = GoldenSet.of_content(wanted.content)
    assert again == wanted
    assert again.digest == wanted.digest != GoldenSet(wanted.examples[::-1]).digest
    assert all(json.loads(line)["text"] for line in wanted.content.splitlines())


def test_a_set_is_of_one_kind_and_of_a_size_that_is_kept() -> None:
    with pytest.raises(DataError, match="no golden example"):
        GoldenSet(())
    with pytest.raises(DataError, match="in one set of golden examples: keep them in two sets"):
        GoldenSet((Example("a", "label", "b"), Example("a", "equals", "b")))
    many = tuple(Example(str(number), "label", "b") for number in range(10_001))
    assert len(GoldenSet(many[1:]).examples) == 10_000
    with pytest.raises(DataError, match="more than 10000 golden examples"):
        GoldenSet(many)
    with pytest.raises(DataError, match="a set may have at most 4000000"):
        GoldenSet((Example("a" * 4_000_000, "label", "b"),))


def test_a_version_that_was_never_asked_is_not_promoted_by_the_store_alone(store, put) -> None:
    put(said=CLASSIFIES)
    wanted = labelled("good", "bad")
    (gate,) = store.gate("a", "production", examples=wanted)
    assert gate == Golden("production", wanted.digest, "label", 2, 1.0)
    with pytest.raises(ReplayNeeded, match=r"golden examples golden:\w{12} were never replayed on it") as needed:
        store.promote("a", "production")
    assert needed.value.sets == (wanted.digest,)
    assert store.examples(wanted.digest) == wanted
    store.promote("a", "candidate")  # which requires nothing


@pytest.mark.slow
def test_what_was_asked_is_asked_once_and_shown(store, put) -> None:
    version = put(said=CLASSIFIES)
    wanted = labelled("good", "bad")
    store.gate("a", "production", examples=wanted)
    store.keep_replay(version, replay(wanted, 2))
    move = store.promote("a", "production")
    assert [str(each) for each in move.replays] == [f"golden:{wanted.digest[7:19]} 2 of 2"]
    (shown,) = store.show("a")["replays"]
    assert shown == {
        "golden": wanted.digest,
        "passed": 2,
        "total": 2,
        "first": None,
        "replayed": "2026-01-02T03:04:05.000Z",
    }


def test_a_replay_is_of_a_digest_and_not_of_a_number_or_a_name(store, put, tmp_path) -> None:
    """Another version of the name was not replayed; the same content under another name was."""
    first, second = put(said=CLASSIFIES), put(said=CLASSIFIES)
    wanted = labelled("good")
    store.gate("a", "production", examples=wanted)
    store.keep_replay(first, replay(wanted, 1))
    with pytest.raises(ReplayNeeded):
        store.promote(str(second), "production")
    store.materialize("a@1", tmp_path / "same")
    store.put("b", tmp_path / "same")
    store.gate("b", "production", examples=wanted)
    assert store.promote("b@1", "production").changed


def test_too_few_right_answers_are_refused_with_the_first_wrong_one(store, put) -> None:
    version = put(said=CLASSIFIES)
    wanted = labelled(*["good"] * 20)
    store.gate("a", "production", examples=wanted)
    store.keep_replay(version, replay(wanted, 19))
    with pytest.raises(
        GateFailed,
        match=r"a@1 may not become a@production: 1 of 20 golden examples failed "
        r"\(golden:\w+>=1 is required, replayed 2026-01-02 03:04 UTC\), first: "
        r"example 1 'text 0', expected label 'good', given 'bad': promote another version, or change the gate",
    ) as refused:
        store.promote("a", "production")
    assert "\n" not in str(refused.value)
    assert not isinstance(refused.value, ReplayNeeded)
    store.gate("a", "production", examples=wanted, share=0.95)
    assert store.promote("a", "production").changed
    store.gate("a", "production", examples=wanted, share=0.96)
    with pytest.raises(GateFailed, match="1 of 20"):
        store.promote("a", "production")


def test_the_newest_replay_counts(store, put) -> None:
    version, wanted = put(said=CLASSIFIES), labelled("good")
    store.gate("a", "production", examples=wanted)
    store.keep_replay(version, replay(wanted, 1))
    store.keep_replay(version, replay(wanted, 0))
    with pytest.raises(GateFailed, match="1 of 1 golden examples failed"):
        store.promote("a", "production")
    assert len(store.show("a")["replays"]) == 1


def test_metrics_and_golden_examples_are_both_asked_for_and_metrics_first(store, put) -> None:
    put(said=CLASSIFIES, accuracy=0.5)
    wanted = labelled("good")
    gates = store.gate("a", "production", add=["accuracy>=0.9"], examples=wanted, share=0.5)
    assert [str(gate) for gate in gates] == ["test.accuracy>=0.9", f"golden:{wanted.digest[7:19]}>=0.5"]
    assert [gate.as_json()["gate"] for gate in gates] == [str(gate) for gate in gates]
    with pytest.raises(GateFailed, match=r"accuracy>=0\.9 is required"):
        store.promote("a", "production")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["golden:{0:.6}", "golden:{0}", "golden:{0:.12}>=1"])
def test_a_set_is_taken_off_by_its_name(store, put, form) -> None:
    put(said=CLASSIFIES)
    wanted = labelled("good")
    store.gate("a", "production", examples=wanted)
    assert list(store.gate("a", "production", remove=[form.format(wanted.digest[7:])])) == []
    store.promote("a", "production")
    assert store.examples(wanted.digest) == wanted  # the set stays in the store


def test_what_is_not_asked_for_cannot_be_taken_off(store, put) -> None:
    put(said=CLASSIFIES)
    with pytest.raises(NotFound, match=r"no golden examples 'golden:12ab' on a@production: it has none"):
        store.gate("a", "production", remove=["golden:12ab"])
    store.gate("a", "production", examples=labelled("good"))
    store.gate("a", "production", examples=labelled("bad"))
    with pytest.raises(NotFound, match=r"no golden examples 'golden:' on a@production: it has golden:\w+>=1, golden:"):
        store.gate("a", "production", remove=["golden:"])


@pytest.mark.parametrize(
    ("said", "wanted", "complaint"),
    [
        (CLASSIFIES, labelled("good", "god"), r"expects label 'god' in example 2, but a@1 has labels bad, good"),
        (WRITES, labelled("good"), r"expects labels, but a@1 generates texts"),
        (CLASSIFIES, GoldenSet((Example("x", "equals", "y"),)), r"expects texts, but a@1 classifies"),
        (READS_TWO, labelled("good"), r"has one text in each example, but a@1 reads two texts together"),
        (RERANKS, labelled("good"), r"has one text in each example, but a@1 reads two texts together"),
        (MARKS, labelled("good"), r"expects labels, but a@1 answers with spans"),
        (MEASURES, labelled("3"), r"expects labels, but a@1 answers with numbers"),
        (EMBEDS, GoldenSet((Example("x", "equals", "y"),)), r"expects texts, but a@1 answers with vectors"),
    ],
)
def test_a_version_that_could_never_pass_is_refused_unasked(store, put, said, wanted, complaint) -> None:
    put(said=said)
    store.gate("a", "production", examples=wanted)
    with pytest.raises(GateFailed, match=complaint) as refused:
        store.promote("a", "production")
    assert not isinstance(refused.value, ReplayNeeded)


def test_labels_of_a_classifier_of_many_are_each_known(store, put) -> None:
    put(said={"task": {"kind": "classify", "labels": ["a", "b"], "multi_label": True}})
    store.gate("a", "production", examples=GoldenSet((Example("x", "label", "a|c"),)))
    with pytest.raises(GateFailed, match="expects label 'c' in example 1"):
        store.promote("a", "production")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_is_a_fraction_of_examples_that_are_there(store, put, share) -> None:
    put()
    with pytest.raises(BadReference, match="expected a fraction above 0 and at most 1"):
        store.gate("a", "production", examples=labelled("good"), share=share)
    with pytest.raises(BadReference, match="needs golden examples: add --golden FILE"):
        store.gate("a", "production", share=0.5)
    assert list(store.gate("a")) == []


def test_characters_that_a_database_may_refuse_are_kept_and_asked_for(store, put) -> None:
    version = put(said=WRITES)
    wanted = GoldenSet((Example("nul \0, half \ud800, \u2028", "contains", ("\0", "\udfff")),))
    store.gate("a", "production", examples=wanted)
    assert store.examples(wanted.digest) == wanted
    first = {"example": 1, "text": "nul \0", "expected": "\ud800", "given": "\0\udfff"}
    store.keep_replay(version, GoldenReplay(wanted.digest, 0, 1, first, "2026-01-02T03:04:05.000Z"))
    assert store.show("a")["replays"][0]["first"] == first
    assert store.verify().ok
    with pytest.raises(GateFailed, match="1 of 1 golden examples failed") as refused:
        store.promote("a", "production")
    assert "\0" not in str(refused.value)


def test_rollback_asks_no_golden_examples(store, put) -> None:
    put(said=CLASSIFIES), put(said=CLASSIFIES)
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    store.gate("a", "production", examples=labelled("good"))
    assert store.rollback("a").version == "a@1"


def test_examples_that_were_changed_in_the_database_are_found(store, put) -> None:
    put(said=CLASSIFIES)
    store.gate("a", "production", examples=labelled("good"))
    by_hand.execute(store, "UPDATE golden_sets SET content = replace(content, 'good', 'bad')")
    assert any("does not match its digest" in str(each) for each in store.verify().problems)
    with pytest.raises(Corrupt, match=r"golden examples golden:\w+ do not match their digest"):
        store.promote("a", "production")


def test_the_same_examples_again_mend_those_that_were_damaged(store, put) -> None:
    put(said=CLASSIFIES)
    store.gate("a", "production", examples=labelled("good"))
    by_hand.execute(store, "UPDATE golden_sets SET content = replace(content, 'good', 'bad')")
    assert not store.verify().ok
    store.gate("a", "production", examples=labelled("good"))
    assert store.verify().ok
    with pytest.raises(ReplayNeeded):  # required again, unchanged
        store.promote("a", "production")
