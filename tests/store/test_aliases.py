"""Promote moves an alias forward, rollback moves it back, and it always names a whole version."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store import by_hand

from turret import audit
from turret.errors import BadReference, Corrupt, InUse, NotFound
from turret.store import Store
from turret.workspace import Workspace


def named(store: Store, alias: str = "production") -> str:
    return str(store.resolve(f"a@{alias}"))


def test_promote_moves_an_alias_and_says_from_where(store, put) -> None:
    put(), put()
    first = store.promote("a@1", "production")
    assert (first.version, first.before, first.changed) == ("a@1", None, True)
    second = store.promote("a@2", "production")
    assert (second.version, second.before, second.changed) == ("a@2", "a@1", True)
    assert named(store) == str(store.resolve("a")) == "a@2"
    assert [version.aliases for version in store.list()] == [(), ("production",)]


def test_promoting_what_it_names_already_writes_nothing_and_says_so(store, put) -> None:
    put()
    store.promote("a", "production")
    again = store.promote("a@production", "production")
    assert (again.version, again.before, again.changed) == ("a@1", "a@1", False)
    assert len(store.show("a")["alias_history"]) == 1


def test_aliases_are_apart_and_a_candidate_can_be_promoted_by_its_alias(store, put) -> None:
    put(), put()
    store.promote("a@1", "production")
    store.promote("a@2", "candidate")
    assert (named(store), named(store, "candidate")) == ("a@1", "a@2")
    store.promote("a@candidate", "production")
    assert (named(store), named(store, "candidate")) == ("a@2", "a@2")
    assert store.resolve("a@2").aliases == ("candidate", "production")


def test_promote_then_rollback_is_the_identity(store, put) -> None:
    put(), put()
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    move = store.rollback("a")
    assert (move.version, move.before, move.changed) == ("a@1", "a@2", True)
    assert named(store) == "a@1"


def test_repeated_rollbacks_walk_further_back_and_a_promote_starts_a_new_line(store, put) -> None:
    for _ in range(4):
        put()
    for number in (1, 2, 3):
        store.promote(f"a@{number}", "production")
    assert [store.rollback("a").version, store.rollback("a").version] == ["a@2", "a@1"]
    store.promote("a@4", "production")
    assert store.rollback("a").version == "a@1"  # not a@3, which a rollback left
    with pytest.raises(NotFound, match="nothing to roll back to: a@production names a@1 and named nothing before"):
        store.rollback("a")
    assert named(store) == "a@1"


def test_a_move_leaves_the_same_alias_of_other_adapters(store, put) -> None:
    for name in ("a", "b", "c"):
        put(name), put(name)
        store.promote(f"{name}@1", "production")
    store.promote("b@2", "production")
    assert [str(store.resolve(f"{name}@production")) for name in "abc"] == ["a@1", "b@2", "c@1"]
    with store.database().reading() as connection:
        newest = audit.read_actions(connection)[0]
    assert (newest.what, newest.before, newest.after) == ("b@production", {"version": 1}, {"version": 2})


def test_an_alias_goes_back_to_a_version_only_from_one_that_is_to_be_left(store, put) -> None:
    put(), put(), put()
    for number in (1, 2):
        store.promote(f"a@{number}", "production")
    stays = store.back_to("a@2", "production", leaving=["a@1"])
    assert (stays.version, stays.before, stays.changed) == ("a@2", "a@2", False)
    assert store.back_to("a@1", "production", leaving=["a@3"]) is None
    assert named(store) == "a@2"
    moved = store.back_to("a@1", "production", leaving=["a@2", "a@3"])
    assert (moved.version, moved.before, moved.changed) == ("a@1", "a@2", True)
    assert named(store) == "a@1"
    with pytest.raises(NotFound, match="named nothing before"):  # its history goes on from its first move
        store.rollback("a", "production")
    first = store.back_to("a@3", "candidate", leaving=[])
    assert (first.before, first.changed, named(store, "candidate")) == (None, True, "a@3")


def test_the_history_keeps_every_move_with_its_verb(store, put) -> None:
    put(), put()
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    store.rollback("a")
    history = store.show("a@1")["alias_history"]
    assert [(move["verb"], move["version"]) for move in history] == [("promote", 1), ("promote", 2), ("rollback", 1)]
    assert all(move["alias"] == "production" and not move["deleted"] and move["moved"] for move in history)
    json.dumps(history)


def test_a_server_reads_where_every_alias_points_and_whether_one_has_moved(store, put) -> None:
    first, second, other = put(), put(), put("b")
    assert store.pointing() == (0, [])
    store.promote("a@1", "candidate"), store.promote("b", "production"), store.promote("a@2", "production")
    moved, found = store.pointing()
    assert [(each.name, each.alias, each.number, each.digest) for each in found] == [
        ("a", "candidate", 1, first.digest),
        ("a", "production", 2, second.digest),
        ("b", "production", 1, other.digest),
    ]
    assert store.last_move() == moved
    store.promote("a@2", "candidate")
    assert store.last_move() == moved + 1


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(verbs=st.lists(st.sampled_from([1, 2, 3, "back"]), max_size=12))
def test_any_run_of_promotes_and_rollbacks_is_a_stack(store, put, verbs) -> None:
    """The model is a stack: promote pushes a version, rollback pops one."""
    while len(store.list("a")) < 3:
        put()
    alias = f"x{len(store.show('a@1')['alias_history'])}-{abs(hash(tuple(map(str, verbs)))) % 10**6}"
    stack: list[int] = []
    for verb in verbs:
        if verb != "back":
            store.promote(f"a@{verb}", alias)
            stack += [verb] if stack[-1:] != [verb] else []
        elif len(stack) > 1:
            stack.pop()
            assert store.rollback("a", alias).version == f"a@{stack[-1]}"
        else:
            with pytest.raises(NotFound):
                store.rollback("a", alias)
        assert not stack or named(store, alias) == f"a@{stack[-1]}"


def test_a_damaged_version_is_not_promoted(store, put) -> None:
    put(), put()
    store.promote("a@1", "production")
    good = by_hand.read(store, "a@2", "adapter_model.safetensors")
    by_hand.write(store, "a@2", "adapter_model.safetensors", good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(Corrupt, match="does not match its digest"):
        store.promote("a@2", "production")
    assert named(store) == "a@1"
    by_hand.write(store, "a@2", "adapter_model.safetensors", good)
    assert store.promote("a@2", "production").changed


def test_rollback_never_lands_on_a_version_whose_files_are_gone_or_cut(store, put) -> None:
    put(), put()
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    by_hand.remove(store, "a@1", "adapter_model.safetensors")
    with pytest.raises(
        Corrupt, match=r"a@production stays at a@2: a@1 is damaged, adapter_model\.safetensors is missing"
    ):
        store.rollback("a")
    assert named(store) == "a@2"
    assert len(store.show("a")["alias_history"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: s.promote("b", "production"), NotFound, "no adapter named 'b'"),
        (lambda s: s.promote("a@9", "production"), NotFound, "no a@9: a has version 1"),
        (lambda s: s.promote("a", "3"), BadReference, "bad alias '3'"),
        (lambda s: s.promote("a", "Production"), BadReference, "bad alias"),
        (lambda s: s.rollback("a@1"), BadReference, "bad adapter name"),
        (lambda s: s.rollback("a", "candidate"), NotFound, "no a@candidate to roll back: a has version 1 and no alias"),
        (lambda s: s.rollback("b"), NotFound, "no adapter named 'b'"),
    ],
)
def test_what_cannot_be_moved_is_said_in_one_line(store, put, call, error, words) -> None:
    put()
    with pytest.raises(error, match=words) as raised:
        call(store)
    assert "\n" not in str(raised.value)


def test_without_a_store_nothing_is_made(store) -> None:
    for call in (lambda: store.promote("a", "production"), lambda: store.rollback("a"), lambda: store.gate("a")):
        with pytest.raises(NotFound, match="there is no store at"):
            call()
    assert not store.root.exists()


# --- delete -----------------------------------------------------------------------------------------------------------


def test_a_deleted_version_is_gone_and_its_number_is_never_given_again(store, put, make_bundle) -> None:
    put(), put()
    bundle = make_bundle(b"third")
    store.put("a", bundle)
    gone = store.delete("a@3")
    assert (gone.version, gone.aliases) == ("a@3", ())
    with pytest.raises(NotFound, match="no a@3: a has versions 1 to 2"):
        store.resolve("a@3")
    assert str(store.put("a", bundle)) == "a@4"
    for number in (1, 2, 4):
        store.delete(f"a@{number}")
    with pytest.raises(NotFound, match="no a: a has no version left"):
        store.resolve("a")
    assert str(put()) == "a@5"


def test_what_an_alias_names_is_not_deleted_unless_forced(store, put) -> None:
    put(), put()
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    with pytest.raises(InUse, match="a@2 is not deleted: a@production names it: promote another version first"):
        store.delete("a@2")
    assert store.delete("a@2", force=True).aliases == ("production",)
    with pytest.raises(NotFound, match="no a@production"):
        store.resolve("a@production")
    assert store.rollback("a").version == "a@1"
    history = store.show("a")["alias_history"]
    assert [(move["verb"], move["version"], move["deleted"]) for move in history] == [
        ("promote", 1, False),
        ("promote", 2, True),
        ("delete", None, False),
        ("rollback", 1, False),
    ]


def test_what_another_version_was_made_from_is_not_deleted_unless_forced(store, put) -> None:
    parent = put()
    child = put(said={"lineage": {"parent": parent.digest}})
    with pytest.raises(InUse, match=f"{parent} is not deleted: {child} was made from it"):
        store.delete(str(parent))
    store.delete(str(child))
    store.delete(str(parent))
    again = put()
    put(said={"lineage": {"parent": str(again)}})
    assert store.delete(str(again), force=True).version == str(again)


def test_rollback_passes_over_what_was_deleted_since_and_says_so(store, put) -> None:
    for number in (1, 2, 3):
        put()
        store.promote(f"a@{number}", "production")
    store.delete("a@2")
    move = store.rollback("a")
    assert (move.version, move.skipped) == ("a@1", ("a@2",))


def test_rollback_never_moves_to_where_the_alias_is_already(store, put) -> None:
    put(), put()
    for number in (1, 2, 1):
        store.promote(f"a@{number}", "production")
    store.delete("a@2")
    with pytest.raises(NotFound, match=r"names a@1 and named nothing before but versions deleted since \(a@2\)"):
        store.rollback("a")


@pytest.mark.slow
def test_a_name_alone_is_not_deleted(store, put) -> None:
    put()
    with pytest.raises(BadReference, match="expected one version, such as a@3"):
        store.delete("a")
    assert len(store.list()) == 1


def test_a_workspace_has_the_same_verbs(store, put) -> None:
    """A workspace returns what the store returns. It loads no torch for this (`tests/test_architecture.py`)."""
    put(accuracy=0.8), put(accuracy=0.95)
    workspace = Workspace(store.location)
    assert workspace.promote("a@1", "production").changed
    assert workspace.promote("a@2", "production", require=["accuracy>=0.9"]).before == "a@1"
    assert workspace.rollback("a").version == "a@1"
    assert [str(gate) for gate in workspace.gate("a", "production", add=["loss<1"])] == ["test.loss<1"]
    assert workspace.diff("a@1", "a@2").metrics["test"]["accuracy"][:2] == (0.8, 0.95)
    assert workspace.delete("a@2").version == "a@2"
    assert workspace.verify().orphans == 2
    assert len(workspace.gc(dry_run=True).removed) == len(workspace.gc().removed) == 2
    assert workspace.verify("a@production").ok
