"""Usage and the audit log of a store, on SQLite and on PostgreSQL."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from sqlalchemy import Engine, event, select, text

from turret.access import Access
from turret.audit import read_actions as actions
from turret.audit import record
from turret.errors import StoreError
from turret.store import Store, usage


@pytest.mark.slow
def test_usage_is_added_up_by_tenant_adapter_and_day(store: Store, put) -> None:
    put("a")
    put("b")
    seconds = [0.0]
    log = usage.UsageLog(store.database(), clock=lambda: seconds[0])
    for seconds[0], name in ((0.0, "a"), (86_399.9, "a"), (86_400.0, "a"), (0.0, "b"), (0.0, usage.BASE)):
        log.add("default", name, 2, 30, 4)
        log.flush()
    log.add("other", "a", 1, 1, 1)
    log.flush()
    found = usage.read_usage(store.database())
    assert [(each.adapter, each.day, each.requests, each.answers, each.prompt_tokens) for each in found] == [
        ("", "1970-01-01", 1, 2, 30),
        ("a", "1970-01-01", 2, 4, 60),
        ("a", "1970-01-02", 1, 2, 30),
        ("b", "1970-01-01", 1, 2, 30),
    ]
    assert [each.day for each in usage.read_usage(store.database(), since="1970-01-02")] == ["1970-01-02"]
    assert len(usage.read_usage(store.database(), until="1970-01-01")) == 3
    limited = store.with_access(Access(adapters=("b",))).database()
    assert [each.adapter for each in usage.read_usage(limited)] == ["", "b"]
    elsewhere = store.with_access(Access(bases=("elsewhere",))).database()
    assert list(usage.read_usage(elsewhere)) == []
    (other,) = usage.read_usage(store.with_access(Access("other")).database())
    assert (other.tenant, other.completion_tokens) == ("other", 1)


@pytest.mark.parametrize("statement", ["UPDATE audit SET who = 'eve'", "DELETE FROM audit"])
def test_the_database_refuses_to_change_or_remove_an_action(store: Store, put, statement) -> None:
    put("a")
    with pytest.raises(StoreError, match="the audit log is append-only"), store.database().writing() as connection:
        connection.execute(text(statement))
    with store.database().reading() as connection:
        assert [(each.verb, each.what) for each in actions(connection)] == [("put", "a@1")]


def test_the_sums_of_many_adapters_and_quotas_are_written_by_few_statements(store: Store) -> None:
    """All servers of a store share one writer, so what each of them writes must be short."""
    database, said = store.database(make=True), list[str]()
    log, budgets = usage.UsageLog(database), usage.Budgets(database)
    hear = lambda connection, cursor, statement, *more: said.append(statement)
    for _ in range(2):  # new rows, and the same again
        for number in range(700):
            log.add("default", f"a{number}", 1, number, 2)
        event.listen(Engine, "before_cursor_execute", hear)
        try:
            log.flush()
            charged = [(f"token {number}", "tokens", 1000, -float(number)) for number in range(700)]
            levels = budgets.change(charged, budgets.writer.next())
        finally:
            event.remove(Engine, "before_cursor_execute", hear)
    assert len(said) < 2 * 2 * 20
    kept = {
        each.adapter: (each.requests, each.prompt_tokens, each.completion_tokens) for each in usage.read_usage(database)
    }
    assert (len(kept), kept["a0"], kept["a699"]) == (700, (2, 0, 4), (2, 1398, 4))
    assert 0 <= levels["token 500", "tokens"] < 500 < levels["token 1", "tokens"] < 1000


@pytest.mark.slow
def test_sums_are_added_while_another_process_writes_and_by_many_at_once(new_url: Callable[..., str], tmp_path) -> None:
    """On PostgreSQL they do not wait for the only writer, and nothing is lost or counted twice."""
    url = new_url(str(tmp_path / "files"))
    database = Store(url).database(make=True)
    log, budgets = usage.UsageLog(database), usage.Budgets(database)
    log.add("default", "a", 1, 5, 2)
    writes = lambda: Store(url).tokens.create("t")
    with ThreadPoolExecutor(2) as other:
        with database.writing():
            waits = other.submit(writes)
            other.submit(log.flush).result(timeout=10)
            other.submit(budgets.take, "token", "requests", 100).result(timeout=10)
            assert not waits.done(), "the control"
        waits.result(timeout=30)
    names = [f"a{number}" for number in range(40)]

    def server(seed: int) -> None:
        draw = random.Random(seed)
        mine = Store(url).database()
        own, quotas = usage.UsageLog(mine), usage.Budgets(mine)
        for _ in range(15):
            draw.shuffle(names_of := list(names))
            for name in names_of[:25]:
                own.add("default", name, 1, 1, 0)
            own.flush()
            quotas.change([(name, "tokens", 10**9, -1.0) for name in names_of[:25]], quotas.writer.next())

    with ThreadPoolExecutor(4) as servers:
        list(servers.map(server, range(4)))
    assert sum(each.requests for each in usage.read_usage(database) if each.adapter != "a") == 4 * 15 * 25
    with database.reading() as connection:
        rows = connection.execute(select(usage.budgets).where(usage.budgets.c.unit == "tokens")).all()
    assert len(rows) == 40


def test_a_flush_that_is_tried_again_while_its_first_try_still_ends_is_added_once(new_url: Callable[..., str]) -> None:
    database, writer = Store(new_url()).database(make=True), usage.Writer()

    def first(number: int) -> bool:
        with database.adding() as connection:
            return writer.is_first(connection, number)

    for number in (1, 2):  # the row of the writer is made, then changed
        with ThreadPoolExecutor(1) as other:
            with database.adding() as connection:
                assert writer.is_first(connection, number)
                again = other.submit(first, number)
                assert wait([again], timeout=0.2).not_done  # it waits for the end of the first
            assert not again.result(timeout=10)
    assert first(3)


def test_a_name_of_several_adapters_that_is_too_long_is_cut(store: Store, put) -> None:
    put("a")
    name = "+".join(["a" * 99] * 9)
    log = usage.UsageLog(store.database(), clock=lambda: 0.0)
    log.add("default", name, 1, 1, 1)
    log.flush()
    assert [each.adapter for each in usage.read_usage(store.database())] == [name[:100]]
    with store.database().writing() as connection:
        record(connection, "load", name, name, at="now", who=None)
    with store.database().reading() as connection:
        assert next((each.what, each.adapter) for each in actions(connection)) == (name[:200], name[:100])


def test_an_action_that_fails_leaves_no_row(store: Store, put) -> None:
    put("a", accuracy=0.5)
    store.gate("a", "production", add=["accuracy>=0.9"])
    with pytest.raises(Exception, match="may not become"):
        store.promote("a@1", "production")
    with store.database().reading() as connection:
        assert [each.verb for each in actions(connection)] == ["gate", "put"]


def test_the_numbers_of_actions_tell_nothing_of_those_of_others(store: Store, put) -> None:
    put("a")
    other = store.with_access(Access("other"))
    for number in range(6):
        for each, what in ((store, "a"), (other, "b"), (store, "c")):
            with each.database().writing() as connection:
                record(connection, "load", f"{what}@{number}", what, at=f"2026-01-0{number + 1}", who=None)
    with other.database().reading() as connection:
        assert [each.id for each in actions(connection)] == [6, 5, 4, 3, 2, 1]
        page = actions(connection, limit=2)
        rest = actions(connection, below=page[-1].id)
        assert [each.what for each in (*page, *rest)] == [f"b@{number}" for number in (5, 4, 3, 2, 1, 0)]
        assert [each.id for each in actions(connection, since="2026-01-04")] == [6, 5, 4]
    with store.with_access(Access(adapters=("a",))).database().reading() as connection:
        assert [each.id for each in actions(connection)] == [7, 6, 5, 4, 3, 2, 1], "of the adapters that it sees"
    with store.database().reading() as connection:
        assert [each.id for each in actions(connection, limit=3)] == [13, 12, 11], "the control: all of the tenant"
