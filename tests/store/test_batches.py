"""Batches and files of clients in a store: turns, claims, answers that are kept once, space that is given back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Table, func, select, update
from store.commit_proxy import CommitProxy

from turret import database
from turret.database import jobs
from turret.errors import InUse, LeaseLost, StoreError, TooLarge
from turret.server.limits import Quota, SharedQuotas
from turret.store import Store, client_files, leases, usage
from turret.store.batches import Answer, Batch, Batches
from turret.store.client_files import ClientFiles
from turret.store.usage import Budgets, flushes

ONE, TWO, OTHER = "token x/one", "token x/two", "token y/one"


def made(store: Store, owner: str = ONE, *, lines: int = 4) -> Batch:
    """A batch in progress, claimed by nobody."""
    with tempfile.NamedTemporaryFile() as sent:
        sent.write(b"line\n" * lines)
        sent.flush()
        file = ClientFiles.of(store).add(owner, "sent", "batch", Path(sent.name))
    batch = Batches.of(store).add(owner, "/v1/completions", file.id, None)
    change(store, database.batches, state="in_progress", total=lines)
    return batch


def change(store: Store, table: Table, **values: object) -> None:
    with store.database().writing() as connection:
        connection.execute(update(table).values(values))


def lose_workers(store: Store) -> None:
    """As a lease's time after the death of all servers, which were on other machines."""
    change(store, leases.leases, process="other-boot/1/1/1", until=1.0)


def worker(store: Store) -> Batches:
    return Batches.of(store)


def claimed(one: Batches) -> Batch:
    found = one.claim()
    assert found is not None
    return found


def answer(line: int, *, ok: bool = True) -> Answer:
    return Answer(line, f'{{"line": {line}}}\n', ok)


def test_tenants_take_turns_and_so_do_the_tokens_of_one(store: Store) -> None:
    for owner in (ONE, ONE, ONE, TWO, OTHER):
        made(store, owner)
    one, served = worker(store), []
    for _ in range(8):
        batch = claimed(one)
        served.append(batch.owner)
        one.release(batch)
    assert served == [ONE, OTHER, TWO, OTHER, ONE, OTHER, TWO, OTHER]


def test_a_batch_that_is_put_aside_holds_up_no_other_and_comes_back(store: Store, monkeypatch) -> None:
    first, second = made(store), made(store, OTHER)
    one = worker(store)
    batch = claimed(one)
    assert batch.id == first.id
    assert one.others_wait(batch)
    one.release(batch, aside=30.0)
    batch = claimed(one)
    assert batch.id == second.id
    assert not one.others_wait(batch)
    one.release(batch, aside=30.0)
    assert one.claim() is None
    change(store, jobs, due=1.0)  # as after that time
    assert claimed(one).id == first.id


def test_a_cancelled_batch_that_was_put_aside_ends_at_once(store: Store) -> None:
    batch, one = made(store), worker(store)
    one.release(claimed(one), aside=30.0)
    assert one.claim() is None
    one.cancel(ONE, batch.id)
    assert claimed(one).state == "cancelling"


def test_an_answer_is_kept_once_however_often_it_is_tried(store: Store) -> None:
    made(store)
    one = worker(store)
    batch = one.keep(claimed(one), asking=[0, 1, 2])
    assert (batch.taken, batch.asking, dict(batch.unanswered)) == (3, [0, 1, 2], {0: 0, 1: 0, 2: 0})
    for _ in range(3):
        batch = one.keep(batch, [answer(1), answer(2, ok=False)], asking=[0])
    assert (batch.done, batch.failed, batch.asking, dict(batch.unanswered)) == (2, 1, [0], {0: 0})
    batch = one.keep(batch, [answer(0), answer(1)], asking=[3])
    assert [(each.line, each.ok) for each in one.parts(batch)] == [(0, True), (1, True), (2, False)]
    assert batch.done == 3


def test_lines_in_flight_lose_a_try_when_their_server_dies_and_at_no_other_time(store: Store) -> None:
    made(store)
    one, two = worker(store), worker(store)
    batch = one.keep(claimed(one), asking=[0, 1])
    one.release(batch)
    batch = claimed(one)
    assert set(batch.unanswered.values()) == {0}
    batch = one.keep(batch, [answer(0)], asking=[1])
    lose_workers(store)
    batch = claimed(two)
    assert batch.unanswered[1] == 1
    with pytest.raises(LeaseLost):
        one.keep(batch, [answer(1)])
    two.release(batch)
    assert claimed(one).unanswered[1] == 1


@pytest.mark.slow
def test_a_lease_ends_though_the_clock_was_set_back(store: Store, monkeypatch) -> None:
    made(store)
    monkeypatch.setenv(leases.VARIABLE, "0.5")
    dead, living = worker(store), worker(store)
    batch = claimed(dead)
    later = time.time() + 86_400.0  # as if the clock had been set back by a day since
    change(store, leases.leases, process="other-boot/1/1/1", until=later)
    assert living.claim() is None
    time.sleep(0.8)
    assert claimed(living).id == batch.id
    with pytest.raises(LeaseLost):
        dead.renew(batch)


def test_a_lease_that_is_renewed_is_kept_by_any_clock(store: Store, monkeypatch) -> None:
    made(store)
    monkeypatch.setenv(leases.VARIABLE, "0.6")
    one, other = worker(store), worker(store)
    batch = claimed(one)
    for _ in range(6):
        one.renew(batch)
        assert other.claim() is None
        time.sleep(0.2)


def test_a_time_aside_ends_though_the_clock_was_set_back(store: Store) -> None:
    made(store)
    one = worker(store)
    one.release(claimed(one), aside=30.0)
    change(store, jobs, due=time.time() + 86_400.0)
    assert claimed(one)


def test_a_batch_that_was_given_up_in_an_outage_has_lost_no_try(store: Store) -> None:
    """The control is a server that died."""
    made(store)
    one = worker(store)
    batch = one.keep(claimed(one), asking=[0])
    leases.give_up(one._taken[batch.id].lease)
    assert claimed(one).unanswered == {0: 0}
    lose_workers(store)
    one.keep(claimed(one), asking=[0])
    lose_workers(store)
    assert claimed(worker(store)).unanswered[0] == 1


def test_a_deleted_file_gives_its_space_back_on_the_disk_and_in_the_quota(store: Store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(client_files, "MOST_BYTES", 25)
    files, path = ClientFiles.of(store), tmp_path / "sent"
    path.write_bytes(b"x" * 10)
    kept, gone = (files.add(ONE, "f", "batch", path) for _ in range(2))  # equal content, two copies
    with pytest.raises(TooLarge, match="delete some first"):
        files.add(ONE, "f", "batch", path)
    assert len(list(store._blobs.walk())) == 2
    files.delete(ONE, gone.id)
    assert [blob.upload for _, blob in store._blobs.walk()] == [kept.blob.upload]
    with files.content(kept) as local:
        assert local.read_bytes() == path.read_bytes()
    files.add(ONE, "f", "batch", path)
    assert store.verify().problems == ()


def test_a_file_is_not_deleted_while_a_batch_reads_it(store: Store) -> None:
    batch, files = made(store), ClientFiles.of(store)
    with pytest.raises(InUse, match="read by a batch"):
        files.delete(ONE, batch.input_file)
    change(store, database.batches, state="failed")
    files.delete(ONE, batch.input_file)
    assert list(store._blobs.walk()) == []


def test_files_that_could_not_be_listed_leave_nothing(store: Store, tmp_path) -> None:
    files = ClientFiles.of(store)
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    new = [(name, "batch_output", tmp_path / name) for name in ("one", "two")]

    def fail(connection: object, made: object) -> None:
        raise StoreError("the batch is somebody else's now")

    with pytest.raises(StoreError, match="somebody else"):
        files.add_all(ONE, new, fail)
    assert list(files.list_files(ONE)) == list(store._blobs.walk()) == []
    files.add_all(ONE, new)
    assert {each.name for each in files.list_files(ONE)} == {"one", "two"}


def test_answers_beyond_the_owners_space_are_refused_before_the_last_line(store: Store, monkeypatch) -> None:
    made(store)
    one = worker(store)
    batch = one.keep(claimed(one), asking=[0, 1])
    monkeypatch.setattr(client_files, "MOST_BYTES", 4 * 5 + len(answer(0).text))
    batch = one.keep(batch, [answer(0)], asking=[1])
    with pytest.raises(TooLarge, match="delete some files"):
        one.keep(batch, [answer(1)])


@pytest.mark.slow
def test_open_batches_share_the_space_of_their_owner(store: Store, monkeypatch) -> None:
    owners = (ONE, ONE, OTHER)
    for owner in owners:
        made(store, owner)
    monkeypatch.setattr(client_files, "MOST_BYTES", 2 * 4 * 5 + len(answer(0).text))
    workers = [worker(store) for _ in owners]
    batches = {(batch := each.keep(claimed(each), asking=[0])).id: (each, batch) for each in workers}
    (first, one), (second, two) = (pair for pair in batches.values() if pair[1].owner == ONE)
    ((third, other),) = (pair for pair in batches.values() if pair[1].owner == OTHER)
    first.keep(one, [answer(0)])
    with pytest.raises(TooLarge):
        second.keep(two, [answer(0)])
    assert third.keep(other, [answer(0)]).done == 1


# --- the answer of a COMMIT is lost -----------------------------------------------------------------------------------


@pytest.fixture
def through(postgres_server, tmp_path: Path) -> Iterator[tuple[str, CommitProxy]]:
    """The URL of a new store whose connections go through a proxy, and the proxy."""
    with CommitProxy(postgres_server.port).running() as proxy, postgres_server.database() as database:
        url = postgres_server.url_with_password(database).replace(f":{postgres_server.port}/", f":{proxy.port}/")
        yield f"{url}?files={tmp_path / 'files'}&local={tmp_path / 'local'}", proxy


def again(act: Callable[[], object], proxy: CommitProxy, lost: int) -> None:
    """Do it until it says that it was done. Each of the first times the answer of a COMMIT is lost."""
    proxy.cut, before = lost, proxy.lost
    for _ in range(lost):
        with pytest.raises(StoreError):
            act()
    act()
    assert proxy.lost - before == lost


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_usage_whose_commit_lost_its_answer_is_counted_once(through, lost: int) -> None:
    url, proxy = through
    database = Store(url).database(make=True)
    log = usage.UsageLog(database)
    for _ in range(100):
        log.add("default", "a", 1, 2, 3)
    again(log.flush, proxy, lost)
    log.add("default", "a", 1, 2, 3)
    again(log.flush, proxy, 0)
    (found,) = usage.read_usage(database)
    assert (found.requests, found.answers, found.prompt_tokens, found.completion_tokens) == (101, 101, 202, 303)


@pytest.mark.slow
def test_tokens_whose_commit_lost_its_answer_are_charged_once(through) -> None:
    url, proxy = through
    budgets = Budgets(Store(url).database(make=True))
    quotas = SharedQuotas(lambda: 0.0, budgets, pytest.fail)
    quotas.charge("token a", Quota(tokens=1000), 100)
    again(quotas.turn, proxy, 1)
    quotas.charge("token a", Quota(tokens=1000), 50)
    again(quotas.turn, proxy, 1)
    level = budgets.change([("token a", "tokens", 1000, 0.0)], budgets.writer.next())["token a", "tokens"]
    assert 850 <= level < 900  # the bucket refills meanwhile


@pytest.mark.slow
def test_answers_whose_commit_lost_its_answer_are_kept_once_and_end_in_one_file(through, tmp_path) -> None:
    url, proxy = through
    store = Store(url)
    made(store)
    one, files = worker(store), ClientFiles.of(store)
    batch = one.keep(claimed(one), asking=[0, 1])
    again(lambda: one.keep(batch, [answer(0), answer(1, ok=False)], asking=[2]), proxy, 2)
    batch = one.renew(batch)
    assert (batch.done, batch.failed, batch.taken) == (2, 1, 3)
    (tmp_path / "out").write_bytes(b"out")
    proxy.cut = 0

    def end(connection: object, made: object) -> None:
        one.end_in(connection, batch, "completed", output_file=made[0].id)  # type: ignore[arg-type,index]
        proxy.cut = 1

    with pytest.raises(StoreError):
        files.add_all(ONE, [("out", "batch_output", tmp_path / "out")], end)
    found = one.find(ONE, batch.id)
    with files.content(files.find(ONE, str(found.output_file))) as local:  # it was done, so it was not taken back
        assert (found.state, local.read_bytes()) == ("completed", b"out")


def test_the_rows_of_writers_do_not_pile_up(store: Store) -> None:
    database = store.database(make=True)
    for _ in range(3):
        log = usage.UsageLog(database)
        log.add("default", "a", 1, 2, 3)
        log.flush()
        with database.writing() as connection:
            connection.execute(update(flushes).values(at=flushes.c.at - 31 * 86_400))
    with database.reading() as connection:
        assert connection.execute(select(func.count()).select_from(flushes)).scalar_one() == 1
    assert next(iter(usage.read_usage(database))).requests == 3
