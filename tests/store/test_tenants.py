"""Two tenants of one store have nothing of each other; what an older store holds belongs to `default`."""

from __future__ import annotations

from functools import partial

import pytest
from store.bundles import tensors

from turret.access import NOBODY, Access, acting, acting_name, check_patterns, check_tenant, tenant_access
from turret.audit import read_actions
from turret.database import SCHEMA
from turret.errors import BadReference, ExperimentError, InUse, NotFound
from turret.experiments import Guards
from turret.store import Store
from turret.store.access_tokens import token_with_secret
from turret.store.jobs import JobQueue
from turret.store.usage import BASE, UsageLog, read_usage
from turret.workspace import Workspace
from turret.workspace.serving import StoreSource

A, B = Access("a"), Access("b")


def message(action) -> str:
    with pytest.raises(NotFound) as raised:
        action()
    return str(raised.value)


def test_only_the_default_tenant_without_limits_operates_the_store() -> None:
    assert Access().operates
    limited = [Access(adapters=("legal-*",)), Access(bases=("small",)), Access("acme"), Access("zeta"), NOBODY]
    assert not any(access.operates for access in limited)


def test_a_name_acts_within_its_block_alone() -> None:
    with acting("eve"):
        with acting(None):
            assert acting_name() is None
        assert acting_name() == "eve"
    assert acting_name() is None


def test_names_are_unique_for_each_tenant_and_versions_count_for_each(store: Store, make_bundle) -> None:
    a, b = store.with_access(A), store.with_access(B)
    first = a.put("news", make_bundle(b"one"))
    assert [str(b.put("news", make_bundle(text))) for text in (b"two", b"one")] == ["news@1", "news@2"]
    assert [each.digest for each in a.list()] == [first.digest]
    assert a.resolve("news@1").digest != b.resolve("news@1").digest
    assert list(store.list()) == []
    again = Store(store.location, A)
    assert [str(each) for each in again.list()] == ["news@1"]


@pytest.mark.slow
def test_an_access_from_before_the_store_was_made_shares_the_database_of_the_one_that_made_it(
    store: Store, make_bundle
) -> None:
    assert not store.exists()
    a, b = store.with_access(A), store.with_access(B)
    assert list(b.list()) == []
    a.put("news", make_bundle())
    assert ([str(each) for each in a.list()], list(b.list())) == (["news@1"], [])
    assert a.database()._server is b.database()._server, "one connection pool, for all accesses"
    assert (store.access, a.access, b.access) == (Access(), A, B)


def test_a_put_answers_alike_whether_or_not_another_tenant_has_the_bytes(store: Store, make_bundle) -> None:
    bundle = make_bundle(tensors(1))
    made = [store.with_access(access).put("news", bundle) for access in (A, B)]
    assert made[0].as_json() | {"created": ""} == made[1].as_json() | {"created": ""}
    copies = {blob for access in (A, B) for blob in store.with_access(access)._look_up("news")[1].values()}
    assert len(copies) == len(made[0].manifest["files"]) + 1  # each content is kept once
    store.with_access(A).delete("news@1")
    assert store.gc().removed == ()
    assert store.with_access(B).verify().ok


def test_a_foreign_name_is_missed_in_the_words_of_a_missing_one(store: Store, make_bundle) -> None:
    a, b = store.with_access(A), store.with_access(B)
    a.put("news", make_bundle())
    a.promote("news@1", "production")
    b.put("own", make_bundle(b"own"))
    asked = [
        lambda name: b.resolve(name),
        lambda name: b.resolve(f"{name}@1"),
        lambda name: b.show(f"{name}@production"),
        lambda name: b.files(name),
        lambda name: b.promote(f"{name}@1", "candidate"),
        lambda name: b.rollback(name),
        lambda name: b.gate(name),
        lambda name: b.gate_status(name),
        lambda name: b.delete(f"{name}@1", force=True),
        lambda name: b.verify(name),
    ]
    for ask in asked:
        foreign, missing = message(partial(ask, "news")), message(partial(ask, "mews"))
        assert foreign.replace("news", "x") == missing.replace("mews", "x")
    assert list(b.list("news")) == []
    assert b.pointing()[1] == []
    assert next(iter(a.list("news"))).aliases == ("production",)


def test_runs_experiments_and_outcomes_belong_to_a_tenant(store: Store, put) -> None:
    del put
    workspaces = {access.tenant: Workspace(store.location, access.tenant) for access in (A, B)}
    held = workspaces["a"].store.new_run("news", "recipe", "sha256:data")
    workspaces["a"].store.end_run(held, "interrupted")
    assert [run["id"] for run in workspaces["a"].runs()] == [held.id]
    assert list(workspaces["b"].runs()) == []
    assert workspaces["b"].store.unfinished_run("recipe", "sha256:data") is None
    assert message(lambda: workspaces["b"].run(held.id)).startswith("no run")
    again = workspaces["a"].store.unfinished_run("recipe", "sha256:data")
    assert again is not None
    workspaces["a"].store.end_run(again, "failed")


def test_an_outcome_by_a_foreign_receipt_is_unknown(store: Store, make_bundle) -> None:
    for access in (A, B):
        workspace = Workspace(store.location, access.tenant)
        for text in (b"one", b"two"):
            workspace.store.put("news", make_bundle(text))
        workspace.promote("news@1", "production")
        workspace.experiment("news").start(["news@2"], guards=Guards(worse_by=None))
    workspace = Workspace(store.location, "a")
    workspace.experiment("news").assign("user", receipt="receipt-1")
    foreign = Workspace(store.location, "b").router().outcome(1, receipt="receipt-1")
    nobody = Workspace(store.location, "b").router().outcome(1, receipt="receipt-2")
    assert (foreign.status, foreign.text) == (nobody.status, nobody.text.replace("receipt-2", "receipt-1"))
    assert workspace.router().outcome(1, receipt="receipt-1").status == "counted"


def test_patterns_limit_what_is_seen_within_a_tenant(store: Store, put) -> None:
    for name in ("legal-tax", "legal", "sales"):
        put(name, said={"base": {"id": f"base-{name}", "fingerprint": "sha256:x"}})
    for access, names in (
        (Access(adapters=("legal-*",)), ["legal-tax"]),
        (Access(adapters=("legal*",)), ["legal", "legal-tax"]),
        (Access(adapters=("sales", "legal")), ["legal", "sales"]),
        (Access(bases=("base-s*",)), ["sales"]),
        (Access(adapters=("legal*",), bases=("base-legal",)), ["legal"]),
        (Access(adapters=("l%", "s_les"), bases=("base_sales",)), []),
    ):
        limited = store.with_access(access)
        assert [each.name for each in limited.list()] == names
        every = ("legal", "legal-tax", "sales")
        assert [name for name in every if access.sees(name) and access.sees_base(f"base-{name}")] == names
        for name in {"legal-tax", "legal", "sales"} - set(names):
            missing = message(lambda limited=limited: limited.resolve("nobody")).replace("nobody", name)
            assert message(lambda limited=limited, name=name: limited.resolve(name)) == missing


def test_who_sees_one_base_sees_its_moves_and_removals_alone(store: Store, put) -> None:
    for base in ("mine", "theirs"):
        put(said={"base": {"id": base, "fingerprint": "sha256:x"}})
    for reference in ("a@1", "a@2", "a@1"):
        store.promote(reference, "production")
    store.delete("a@2")
    history = store.with_access(Access(bases=("mine",))).show("a@1")["alias_history"]
    assert [(move["version"], move["deleted"]) for move in history] == [(1, False), (2, True), (1, False)]
    put(said={"base": {"id": "theirs", "fingerprint": "sha256:x"}})
    store.promote("a@3", "production"), store.promote("a@1", "production")
    history = store.with_access(Access(bases=("mine",))).show("a@1")["alias_history"]
    assert [move["version"] for move in history] == [1, 2, 1, 1]


def test_who_sees_one_base_sees_no_experiment_of_versions_on_another(store: Store, put) -> None:
    for base in ("theirs", "theirs", "mine", "mine"):
        put("news", said={"base": {"id": base, "fingerprint": "sha256:x"}})
    whole = Workspace(store.location)
    mine, theirs = (Workspace(store.location).with_access(Access(bases=(base,))) for base in ("mine", "theirs"))
    whole.promote("news@4", "other")
    for control, candidate, seen in ((1, 2, theirs), (3, 4, mine), (1, 3, None)):
        whole.promote(f"news@{control}", "production")
        whole.experiment("news").start([f"news@{candidate}"], guards=Guards(worse_by=None))
        receipt = f"receipt-{control}-{candidate}"
        whole.experiment("news").assign("user", receipt=receipt)
        for workspace in (mine, theirs):
            told = workspace.router().outcome(1, receipt=receipt).status
            running = [each for each in workspace.experiments() if each["state"] == "running"]
            assert (len(running), told) == ((1, "counted") if workspace is seen else (0, "unknown"))
        if seen is not mine:
            with pytest.raises(ExperimentError, match="has a running experiment with versions that you may not use"):
                mine.experiment("news").start(["news@3"], alias="other", guards=Guards(worse_by=None))
            with pytest.raises((NotFound, ExperimentError), match=r"no experiment on news|has ended"):
                mine.experiment("news").ramp(0.5)
        whole.experiment("news").stop()
    assert [len(each.experiments()) for each in (whole, mine, theirs)] == [3, 1, 1]


@pytest.fixture
def mixed(store: Store, put) -> Store:
    """Two bases: `mixed` has versions on both, `own` on one; each has an action of its name as a whole."""
    for name, base in (("mixed", "mine"), ("mixed", "theirs"), ("own", "mine"), ("own", "mine")):
        put(name, said={"base": {"id": base, "fingerprint": "sha256:x"}})
    for reference in ("mixed@1", "mixed@2", "own@1", "own@2"):
        store.promote(reference, "production")
    return store


def actions_of(store: Store) -> list[str]:
    with store.database().reading() as connection:
        return [each.what for each in read_actions(connection)][::-1]


def test_who_sees_one_base_sees_actions_on_a_name_only_with_all_its_versions(mixed: Store) -> None:
    mine = mixed.with_access(Access(bases=("mine",)))
    assert actions_of(mine) == ["mixed@1", "own@1", "own@2", "own@production", "own@production"]
    mixed.delete("own@1")
    assert actions_of(mine) == ["mixed@1", "own@2"], "nothing tells the base of a version that was deleted"
    assert len(actions_of(mixed.with_access(Access(adapters=("own",))))) == 5


def test_who_sees_one_base_sees_the_usage_of_a_name_only_with_all_its_versions(mixed: Store) -> None:
    log = UsageLog(mixed.database())
    for name in ("mixed", "own", BASE):
        log.add("default", name, 1, 2, 3)
    log.flush()
    limited = (Access(bases=("mine",)), Access(bases=("theirs",)), Access(adapters=("mixed",)))
    used = [[each.adapter for each in read_usage(mixed.with_access(access).database())] for access in limited]
    assert used == [["own"], [], ["", "mixed"]]


def test_who_sees_one_base_moves_an_alias_as_if_it_never_named_a_version_on_another(mixed: Store, put) -> None:
    mine = mixed.with_access(Access(bases=("mine",)))
    assert str(mine.resolve("mixed")) == "mixed@1"
    assert message(lambda: mine.resolve("mixed@production")) == "no mixed@production: mixed has version 1 and no alias"
    mixed.promote("mixed@2", "hidden")
    hidden = message(lambda: mine.rollback("mixed", "hidden"))
    assert hidden.replace("hidden", "none") == message(lambda: mine.rollback("mixed", "none"))
    put("mixed", said={"base": {"id": "mine", "fingerprint": "sha256:x"}})
    assert mine.promote("mixed@3", "production").before is None
    assert mine.rollback("mixed").version == "mixed@1"


def test_who_sees_one_base_sees_trainings_on_it_alone(mixed: Store) -> None:
    mine, queue = mixed.with_access(Access(bases=("mi*",))), JobQueue.of(mixed)
    runs = {
        base: queue.submit(name, f'name = "{name}"\nbase = "{base}"\n\n[data]\n', priority=0)
        for name, base in (("mixed", "mine"), ("own", "theirs"), ("new", "minor"), ("mixed", "Mine"))
    }
    seen = {runs["mine"], runs["minor"]}
    assert {run["id"] for run in mine.runs()} == {each.id for each in JobQueue.of(mine).open_jobs(9)} == seen
    assert sorted(filter(None, map(JobQueue.of(mine).place, runs.values()))) == [(1, 2), (2, 2)]
    for base in ("theirs", "Mine"):
        missing = message(lambda: JobQueue.of(mine).cancel("none"))
        assert message(partial(JobQueue.of(mine).cancel, runs[base])) == missing.replace("none", runs[base])


def test_tokens_belong_to_a_tenant_and_keep_what_they_are_bound_to(store: Store) -> None:
    a, b = store.with_access(A).tokens, store.with_access(B).tokens
    kept, secret = a.create("bot", adapters=["legal-*"], bases=["org/base"], lifetime=90 * 86400)
    b.create("bot")
    assert kept.access == Access("a", ("legal-*",), ("org/base",))
    assert kept.expires is not None
    assert [token.tenant for token in store.tokens.of_all_tenants()] == ["a", "b"]
    assert [token.name for token in a.list()] == ["bot"]
    assert list(store.tokens.list()) == []
    b.revoke("bot")
    assert token_with_secret(a.list(), secret) == a.list()[0]
    assert a.list()[0].lives(kept.created)
    assert not a.list()[0].lives("2999-01-01T00:00:00.000Z")
    with pytest.raises(NotFound, match="no token named 'bot'"):
        store.tokens.rotate("bot")
    with pytest.raises(InUse, match="was revoked or has expired"):
        b.rotate("bot")
    with pytest.raises(BadReference, match="a lifetime of 0 seconds: expected from 1 second to 10 years"):
        a.create("soon", lifetime=0)


def test_a_rotation_lets_the_secret_before_it_live_for_the_overlap(store: Store) -> None:
    _, first = store.tokens.create("bot")
    kept, second = store.tokens.rotate("bot", overlap=3600)
    assert token_with_secret([kept], first) == token_with_secret([kept], second) == kept
    again, third = store.tokens.rotate("bot", overlap=3600)
    assert token_with_secret([again], first) is None
    assert token_with_secret([again], second) == token_with_secret([again], third) == again
    last, fourth = store.tokens.rotate("bot", overlap=0)
    assert token_with_secret([last], third) is None
    assert token_with_secret([last], fourth) == last


def test_an_engine_keeps_equal_bytes_of_two_tenants_apart(store: Store, make_bundle) -> None:
    for access in (A, B):
        store.with_access(access).put("news", make_bundle())
    source = StoreSource(store.with_access(A))
    own, other = source.resolve("news@1"), source.resolve("b/news@1")
    assert (own.digest, str(own)) == (other.digest, str(other))
    assert own.key != other.key
    with pytest.raises(NotFound):
        source.resolve("c/news@1")
    for bad in ("/news", "B/news", "../news", "a/b/news"):
        with pytest.raises(BadReference):
            source.resolve(bad)


def test_what_names_a_tenant_and_a_pattern(monkeypatch) -> None:
    assert [check_tenant(name) for name in ("a", "legal-2_x", "0")] == ["a", "legal-2_x", "0"]
    for bad in ("", "A", "-a", "a/b", "ä", "a" * 64, "a.b"):
        with pytest.raises(BadReference, match="bad tenant"):
            check_tenant(bad)
    assert check_patterns(["legal-*", "x"], ["*", "y"]) == (("legal-*", "x"), ("*",))
    for bad in ([], ["a*b"], ["A"], ["%"], ["x"] * 0, [f"x{number}" for number in range(65)]):
        with pytest.raises(BadReference):
            check_patterns(bad, ["*"])
    monkeypatch.setenv("TURRET_TENANT", "legal")
    assert (tenant_access(None), tenant_access("own")) == (Access("legal"), Access("own"))
    assert SCHEMA >= "0007"
