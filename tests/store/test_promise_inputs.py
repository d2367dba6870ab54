"""What is kept of the inputs of promises: rounds, what is removed when, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from store.verbs import TERMS

from turret import audit
from turret.store import Store, Version, promises
from turret.store.promises import InputWatch, Promise

REFERENCES = [bytes([number, 0, 0, 60]) for number in range(4)]  # two numbers each


def promised(store: Store, version: Version, inputs: Sequence[bytes] = REFERENCES) -> Promise:
    with store.database().writing() as connection:
        return promises.make(connection, version, TERMS, inputs=inputs)


def watch_of(store: Store, promise: Promise) -> InputWatch | None:
    with store.database().reading() as connection:
        return promises.watch_of(connection, promise.id)


def rows(store: Store, promise: Promise) -> list[tuple[int, bytes]]:
    """Round and embedding of all that is kept for a promise."""
    table = promises.promise_inputs
    with store.database().reading() as connection:
        query = table.select().where(table.c.promise_id == promise.id).order_by(table.c.id)
        return [(row.round, bytes(row.vector)) for row in connection.execute(query)]


def add(store: Store, promise: Promise, *vectors: bytes) -> list[bool]:
    with store.database().writing() as connection:
        return [promises.add_input(connection, promise.id, each) for each in vectors]


def test_live_texts_follow_the_examples_in_the_order_in_which_they_came(store, put) -> None:
    promise = promised(store, put())
    assert add(store, promise, b"live", b"more") == [True, True]
    assert add(store, promise, b"longer than the examples") == [False]
    assert rows(store, promise) == [*((0, each) for each in REFERENCES), (1, b"live"), (1, b"more")]
    watch = watch_of(store, promise)
    assert watch == InputWatch(promise.id, 2, 4, 1, 0, None, None)
    with store.database().reading() as connection:
        (first, _), second = promises.vectors_of(connection, watch, 1)
        assert promises.vectors_of(connection, watch, 1, first) == [second]


def test_at_most_one_round_is_kept(store, put) -> None:
    promise = promised(store, put())
    assert add(store, promise, *[b"live"] * 9) == [True] * 8 + [False], "a round is full"
    watch = watch_of(store, promise)
    for _ in range(2):  # a second server has read the same
        with store.database().writing() as connection:
            promises.begin_round(connection, watch, 4)
    assert add(store, promise, b"next") == [True]
    assert rows(store, promise) == [*((0, each) for each in REFERENCES), (2, b"next")]
    assert watch_of(store, promise) == InputWatch(promise.id, 2, 4, 2, 4, None, None)


def test_a_drift_is_recorded_once_and_ends_the_watch(store, put) -> None:
    version = put()
    promise = promised(store, version)
    add(store, promise, b"live")
    watch, said = watch_of(store, promise), {"why": "they differ"}
    for first in (True, False):
        with store.database().writing() as connection:
            done = promises.mark_drifted(connection, promise, watch, said, evidence=81.5, texts=1)
            assert done is first
    found = watch_of(store, promise)
    assert (found.evidence, found.earlier, rows(store, promise)) == (81.5, 1, [])
    assert found.drifted is not None
    assert add(store, promise, b"late") == [False]
    with store.database().reading() as connection:
        (newest, *others) = audit.read_actions(connection)
        assert (newest.verb, newest.what, newest.after) == (
            "promise drift",
            str(version),
            {**said, "evidence": 81.5, "texts": 1},
        )
        assert [each.verb for each in others].count("promise drift") == 0
        assert promises.of_digest(connection, version.digest) == promise, "the promise stays as it was"


def test_a_newer_promise_removes_what_the_earlier_one_kept(store, put) -> None:
    version, other = put(), put("b")
    first, beside = promised(store, version), promised(store, other)
    add(store, first, b"live")
    second = promised(store, version, [])
    assert (rows(store, first), watch_of(store, first)) == ([], None)
    assert (rows(store, second), watch_of(store, second)) == ([], None), "without embeddings nothing is watched"
    assert len(rows(store, beside)) == 4


def test_gc_removes_what_is_kept_for_versions_that_are_gone(store, put) -> None:
    version, other = put(), put("b")
    first, beside = promised(store, version), promised(store, other)
    add(store, first, b"live")
    store.delete(str(version))
    for dry_run in (True, False):
        found = [each for each in store.gc(dry_run=dry_run).removed if each.path.startswith("promises/")]
        assert [(each.bytes, each.why) for each in found] == [(20, "its promise is not in force")]
    assert rows(store, first) == []
    assert len(rows(store, beside)) == 4, "the control"
    assert not any(each.path.startswith("promises/") for each in store.gc().removed)


@pytest.mark.parametrize("inputs", [[], REFERENCES])
def test_the_promise_of_a_bundle_gets_the_embeddings_of_its_training(store, make_bundle, tmp_path, inputs) -> None:
    from store.bundles import tensors, write_bundle

    said = {"task": {"kind": "classify", "labels": ["a", "b"]}, "lineage": {"promise": vars(TERMS)}}
    version = store.put("news", write_bundle(tmp_path / "bundles", tensors(1), said=said), inputs=inputs)
    with store.database().reading() as connection:
        promise = promises.of_version(connection, version)
    assert rows(store, promise) == [(0, each) for each in inputs]
