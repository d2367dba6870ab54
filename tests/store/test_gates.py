"""A version gets an alias only if its metrics pass; an error names each failed gate and the value found."""

from __future__ import annotations

import pytest

from turret.errors import BadReference, GateFailed, NotFound
from turret.store import Gate


def test_a_gate_without_a_split_is_of_the_test_split() -> None:
    assert (
        Gate.parse("accuracy>=0.9") == Gate.parse(" test.accuracy >= 0.90 ") == Gate("", "test", "accuracy", ">=", 0.9)
    )
    assert Gate.parse("validation.loss<.4") == Gate("", "validation", "loss", "<", 0.4)
    assert Gate.parse("test bare base.rougeL<=1e-1") == Gate("", "test bare base", "rougeL", "<=", 0.1)


@pytest.mark.parametrize(
    "text",
    [
        "accuracy>=0.9",
        "test.loss<1e-05",
        "loss<1e+16",
        "loss<0.00012345678901234567",
        "x.per_class.tech.f1>0",
        "loss<=3",
    ],
)
def test_a_gate_reads_back_as_it_is_printed(text) -> None:
    assert Gate.parse(str(Gate.parse(text))) == Gate.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "accuracy",
        "accuracy=0.9",
        "accuracy==0.9",
        ">=0.9",
        "accuracy>=",
        "a>=b",
        "a>=nan",
        "a>=inf",
        "a>=1e999",
        "a>=1_0",
        "a>=.",
        " >=1",
        "a>1>2",
        "a\n>1",
        "a" * 201 + ">1",
        "\0>1",
    ],
)
def test_a_bad_gate_is_refused_with_an_example(text) -> None:
    with pytest.raises(BadReference, match=r"such as accuracy>=0\.9"):
        Gate.parse(text)


@pytest.mark.slow
def test_a_promote_can_require_metrics_for_this_time(store, put) -> None:
    put(accuracy=0.85, loss=0.4)
    with pytest.raises(
        GateFailed, match=r"a@1 may not become a@production: test\.accuracy>=0\.9 is required, found 0\.85"
    ):
        store.promote("a@1", "production", require=["accuracy>=0.9", "loss<1"])
    with pytest.raises(NotFound):
        store.resolve("a@production")
    store.promote("a@1", "production", require=["accuracy>=0.85", "accuracy<=0.85", "loss<0.5", "loss>0.1"])
    assert list(store.gate("a")) == []


def test_kept_gates_hold_for_their_alias_until_they_are_removed(store, put) -> None:
    put(accuracy=0.8), put(accuracy=0.95)
    store.gate("a", "production", add=["accuracy>=0.9"])
    with pytest.raises(GateFailed, match=r"accuracy>=0\.9 is required, found 0\.8"):
        store.promote("a@1", "production")
    store.promote("a@1", "candidate")
    store.promote("a@2", "production")
    assert list(store.gate("a", "production", remove=["accuracy"])) == []
    store.promote("a@1", "production")


def test_a_gate_takes_the_place_of_one_of_the_same_metric_and_relation(store, put) -> None:
    put()
    store.gate("a", "production", add=["accuracy>=0.9", "loss<1"])
    gates = store.gate("a", "production", add=["accuracy>=0.92", "accuracy<=0.99"])
    assert [str(gate) for gate in gates] == ["test.accuracy<=0.99", "test.accuracy>=0.92", "test.loss<1"]
    assert [str(gate) for gate in store.gate("a", "production", remove=["test.accuracy<=0.99"])] == [
        "test.accuracy>=0.92",
        "test.loss<1",
    ]
    store.gate("a", "candidate", add=["loss<2"])
    assert [(gate.alias, str(gate)) for gate in store.gate("a")] == [
        ("candidate", "test.loss<2"),
        ("production", "test.accuracy>=0.92"),
        ("production", "test.loss<1"),
    ]


def test_a_metric_that_was_not_stored_does_not_pass_and_what_there_is_is_named(store, put) -> None:
    put(loss=0.4, accuracy=float("nan"), per_class={"tech": {"f1": 0.7}})
    with pytest.raises(GateFailed, match=r"test\.f1>0 is required, test has no such metric \(it has loss\)"):
        store.promote("a", "production", require=["f1>0"])
    with pytest.raises(GateFailed, match=r"there are no metrics of validation \(stored: test\)"):
        store.promote("a", "production", require=["validation.loss<1"])
    with pytest.raises(GateFailed, match="has no such metric"):
        store.promote("a", "production", require=["accuracy>0"])
    store.promote("a", "production", require=["test.per_class.tech.f1>=0.7"])


def test_every_gate_that_fails_is_named(store, put) -> None:
    put(accuracy=0.5, loss=3.0)
    with pytest.raises(
        GateFailed, match=r"accuracy>=0\.9 is required, found 0\.5; test\.loss<1 is required, found 3\.0"
    ):
        store.promote("a", "production", require=["accuracy>=0.9", "loss<1"])


def test_rollback_asks_no_gate(store, put) -> None:
    put(accuracy=0.5), put(accuracy=0.95)
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    store.gate("a", "production", add=["accuracy>=0.9"])
    assert store.rollback("a").version == "a@1"


def test_what_cannot_be_gated_is_said(store, put) -> None:
    put()
    store.gate("a", "production", add=["loss<1"])
    with pytest.raises(NotFound, match=r"no gate 'accuracy' on a@production: it has test\.loss<1"):
        store.gate("a", "production", remove=["accuracy"], add=["f1>0"])
    assert [str(gate) for gate in store.gate("a")] == ["test.loss<1"]  # a failed call stores nothing
    with pytest.raises(NotFound, match=r"no gate 'loss<2' on a@production"):
        store.gate("a", "production", remove=["loss<2"])
    with pytest.raises(NotFound, match="no adapter named 'b'"):
        store.gate("b", "production", add=["loss<1"])
    with pytest.raises(BadReference, match="needs an alias"):
        store.gate("a", add=["loss<1"])
