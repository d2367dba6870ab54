"""The queue of trainings: who is next, three tries, limits, cancelling, and workers that die."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select, update

from turret.access import Access
from turret.database import jobs as rows
from turret.errors import InUse, LeaseLost, NotFound, QueueFull, RecipeError, StoreError
from turret.store import JobQueue, Store, Version, jobs, leases
from turret.store.jobs import CELL, Entry, Job, NewCell, cell_id, in_turn
from turret.store.leases import Lease


@pytest.fixture
def line(store: Store) -> JobQueue:
    return JobQueue.of(store, make=True)


def of(store: Store, tenant: str) -> JobQueue:
    return JobQueue.of(store.with_access(Access(tenant)))


def state(store: Store, run: str) -> str:
    return str(store.run(run)["state"])


def lose_workers(store: Store) -> None:
    with store.database().writing() as connection:
        connection.execute(update(leases.leases).values(process="other-boot/1/1/1", until=1.0))


def make_due(store: Store) -> None:
    with store.database().writing() as connection:
        connection.execute(update(rows).values(due=0.0))


def entry(run: str, tenant: str = "a", priority: int = 0, queued: str = "1") -> Entry:
    return Entry(run, tenant, priority, queued=queued)


def test_within_a_tenant_the_highest_priority_is_next_then_the_oldest() -> None:
    waiting = [entry("1", queued="1"), entry("2", priority=5, queued="3"), entry("3", priority=5, queued="2")]
    assert [each.id for each in in_turn(waiting, {}, {}, {})] == ["3", "2", "1"]


def test_between_tenants_the_one_with_the_fewest_running_is_next_then_who_waited_longest() -> None:
    waiting = [entry("1", "big", priority=100), entry("2", "small"), entry("3", "new")]
    order = [
        ({"big": 1}, {"big": 1, "small": 2}, "3"),  # new has never had a turn
        ({"big": 1, "new": 1}, {"big": 1, "small": 2, "new": 3}, "2"),
        ({}, {"big": 1, "small": 2, "new": 3}, "1"),
    ]
    for running, turns, run in order:
        found = in_turn(waiting, running, {f"tenant {tenant}": turn for tenant, turn in turns.items()}, {})
        assert found[0].id == run


def test_the_owners_of_a_tenant_take_turns_before_priorities_count() -> None:
    """Owners are tokens, whose batches wait."""
    waiting = [Entry("1", "a", 5, queued="1", owner="one"), Entry("2", "a", queued="2", owner="two")]
    for turns, first in (({}, "1"), ({"owner one": 2, "owner two": 1}, "2"), ({"owner one": 1, "owner two": 2}, "1")):
        assert in_turn(waiting, {}, turns, {})[0].id == first


def test_a_tenant_with_a_thousand_trainings_delays_another_by_one() -> None:
    waiting = [entry(f"{number:04}", "big", priority=100) for number in range(1000)] + [entry("x", "small")]
    turns, taken = {"tenant big": 0, "tenant small": 1}, []
    for number in range(3):
        found = in_turn(waiting, {}, turns, {})[0]
        waiting.remove(found)
        turns[f"tenant {found.tenant}"] = number + 2
        taken.append(found.tenant)
    assert taken == ["big", "small", "big"]


def test_a_tenant_at_its_limit_waits(store, line) -> None:
    line.limit("default", running=1, waiting=None)
    first, second = line.submit("a", "x"), line.submit("a", "y")
    taken = line.take()
    assert taken is not None
    assert taken.id == first
    assert line.take() is None
    assert of(store, "other").take() is None, "the limit is the tenant's, whoever works"
    held = line.adopt_training(taken)
    assert held.lease.fence == 1
    store.training_runs().end(held, "finished", error=None, result=None)
    again = line.take()
    assert again is not None
    assert again.id == second


def test_tenants_take_turns_although_one_has_asked_for_more_and_before(store, line) -> None:
    runs = {line.submit("a", "x"): "default" for _ in range(3)} | {
        of(store, "other").submit("a", "x"): "other" for _ in range(2)
    }
    order = []
    for _ in range(5):
        taken = line.take()
        assert taken is not None
        order.append(runs[taken.id])
        store.training_runs().end(line.adopt_training(taken), "finished", error=None, result=None)
    assert order == ["default", "other", "default", "other", "default"]


def test_a_job_put_aside_is_taken_again_after_its_pause_and_the_try_does_not_count(store, line) -> None:
    run = line.submit("a", "x")
    taken = line.take()
    assert taken is not None
    line.put_aside(taken, 30.0)
    assert line.take() is None
    with store.database().reading() as connection:
        due, tries = connection.execute(select(rows.c.due - leases.clock(connection), rows.c.tries)).one()
    assert 25.0 < due <= 30.0
    assert tries == 0
    make_due(store)
    again = line.take()
    assert again is not None
    assert again.id == run
    line.put_aside(again)
    assert line.take() is not None, "without a pause it is free at once"


def test_a_waiting_training_knows_its_place_among_those_of_its_tenant(store, line) -> None:
    first, second, third = (line.submit("a", "x", priority=priority) for priority in (0, 0, 5))
    foreign = of(store, "other").submit("a", "x")
    assert [line.place(run) for run in (third, first, second, foreign, "nothing")] == [
        (1, 3),
        (2, 3),
        (3, 3),
        None,
        None,
    ]
    taken = line.take()
    assert taken is not None
    assert taken.id == third
    assert [line.place(run) for run in (third, first)] == [None, (1, 2)]


def test_a_full_queue_of_one_tenant_takes_no_more_of_it_and_all_of_others(store, line) -> None:
    line.limit("default", running=None, waiting=2)
    line.limit("other", running=None, waiting=1)
    for _ in range(2):
        line.submit("a", "x")
    with pytest.raises(QueueFull, match="2 trainings of tenant default wait already, and 2 may"):
        line.submit("a", "x")
    assert of(store, "other").submit("a", "x")


def test_workers_at_once_take_every_training_once(store, line) -> None:
    submitted = {line.submit("a", f"{number}") for number in range(8)}
    taken: list[str] = []

    def work() -> None:
        own = JobQueue.of(Store(store.location))
        while (found := own.take()) is not None:
            taken.append(found.id)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert sorted(taken) == sorted(submitted)


def test_a_training_is_tried_three_times_with_pauses_and_then_failed(store, line) -> None:
    run = line.submit("a", "x")
    for tries in (1, 2, 3):
        taken = line.take()
        assert taken is not None
        assert taken.tries == tries
        assert line.end_try(taken, "S3 did not answer") == ("failed" if tries == 3 else "waiting")
        assert line.take() is None, "not at once"
        assert (store.run(run)["ended"] is None) == (tries < 3)
        make_due(store)
    assert (state(store, run), store.run(run)["error"]) == ("failed", "S3 did not answer")


def test_an_outage_of_the_stores_own_places_costs_no_try(store, line, monkeypatch) -> None:
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 60.0)  # longer than a busy machine takes to ask again
    run = line.submit("a", "x")
    for _ in range(jobs.TRIES + 2):
        taken = line.take()
        assert taken is not None
        assert taken.tries == 1
        assert line.end_try(taken, "files s3://bucket: Service Unavailable", outage=True) == "waiting"
        assert "Service Unavailable" in store.run(run)["error"]
        assert line.take() is None, "not at once"
        make_due(store)


def test_a_mistake_in_a_recipe_is_not_tried_again_and_a_stopped_try_does_not_count(store, line) -> None:
    run = line.submit("a", "x")
    taken = line.take()
    assert taken is not None
    assert line.end_try(taken, None) == "waiting"
    again = line.take()
    assert again is not None
    assert again.tries == 1
    assert line.end_try(again, "no column text", again=False) == "failed"
    assert state(store, run) == "failed"


def test_a_killed_workers_training_is_taken_over_and_the_worker_cannot_write(store, line) -> None:
    run = line.submit("a", "x")
    slow = line.take()
    assert slow is not None
    assert line.take() is None
    lose_workers(store)
    assert state(store, run) == "waiting", "nobody has it"
    quick = line.take()
    assert quick is not None
    assert (quick.id, quick.tries) == (run, 2)
    for act in (
        lambda: line.end_try(slow, "late"),
        lambda: line.write_log(slow, ["late"]),
        lambda: line.adopt_training(slow),
    ):
        with pytest.raises(LeaseLost):
            act()
    assert line.log(run) == []
    assert line.adopt_training(quick).lease.fence > slow.lease.fence, "it goes on from the last checkpoint"
    for _ in range(2):
        lose_workers(store)
        line.take()
    assert (state(store, run), store.run(run)["error"]) == ("failed", jobs.LOST_TRIES)


def test_cancelled_while_it_waits_runs_or_has_lost_its_worker_it_ends(store, line) -> None:
    waiting, running, lost = (line.submit("a", "x") for _ in range(3))
    assert line.cancel(waiting) == "cancelled"
    taken = line.take()
    assert taken is not None
    assert taken.id == running
    assert line.cancel(running) == "running"
    assert line.write_log(taken, ["a line"]), "its worker hears of it"
    assert line.end_try(taken, None) == "cancelled"
    taken = line.take()
    assert taken is not None
    lose_workers(store)
    assert line.cancel(lost) == "cancelled"
    assert line.take() is None
    assert [state(store, run) for run in (waiting, running, lost)] == ["cancelled"] * 3
    assert all(store.run(run)["ended"] for run in (waiting, running, lost))
    with pytest.raises(InUse, match="is cancelled: only a waiting or running one"):
        line.cancel(waiting)


def test_a_cancelled_training_waits_again_once_it_is_resumed_and_no_other_does(store, line) -> None:
    run, other = (line.submit("a", recipe) for recipe in ("x", "y"))
    for each in (run, other):
        line.cancel(each)
    asked: list[str] = []
    line.resume(run, lambda connection, recipe: asked.append(recipe))
    assert asked == ["x"]
    assert [state(store, each) for each in (run, other)] == ["waiting", "cancelled"]
    with pytest.raises(InUse, match="is waiting: only a failed or cancelled one can be resumed"):
        line.resume(run, lambda connection, recipe: None)
    taken = line.take()
    assert taken is not None
    assert taken.id == run
    assert line.take() is None


def cancelled(store: Store, line: JobQueue, run: str) -> None:
    lose_workers(store)
    line.cancel(run)


def tried_too_often(store: Store, line: JobQueue, run: str) -> None:
    with store.database().writing() as connection:
        connection.execute(update(rows).values(tries=3))
    lose_workers(store)
    assert line.take() is None


def returned(store: Store, line: JobQueue, run: str) -> None:
    """By the parent of the process that trains, while that one sleeps."""
    with store.database().reading() as connection:
        row = connection.execute(select(leases.leases)).one()
    line.end_try(Job(run, "default", "x", 1, Lease(row.name, row.owner, row.fence, 30.0)), None)


@pytest.mark.parametrize(
    ("end", "state"), [(cancelled, "cancelled"), (tried_too_often, "failed"), (returned, "waiting")]
)
def test_a_worker_that_wakes_up_after_its_run_was_ended_publishes_nothing(store, line, make_bundle, end, state) -> None:
    run = line.submit("a", "x")
    taken = line.take()
    assert taken is not None
    held = line.adopt_training(taken)
    held.curve.write_text("1\n")
    end(store, line, run)
    ended = store.run(run)
    assert ended["state"] == state
    for act in (
        lambda: store.put("a", make_bundle(b"late"), run=held, result=lambda version: {"version": str(version)}),
        lambda: store.put("a", make_bundle(b"late"), run=held),
        lambda: store.end_run(held, "finished", result={}),
        lambda: store.end_run(held, "failed", error="late"),
        lambda: store.training_runs().fill(held, "y", "z"),
        lambda: store.artifacts.keep([held.curve], held) if store.artifacts.copies else refuse(),
    ):
        with pytest.raises(LeaseLost):
            act()
    assert list(store.list()) == []
    assert store.artifacts.list_files("runs/") == []
    assert store.run(run) == ended


def refuse() -> None:
    raise LeaseLost("a folder store has no copies")


@pytest.mark.slow
def test_a_worker_that_wakes_up_and_whose_run_nobody_ended_publishes(store, line, make_bundle) -> None:
    """The control: the lease has ended, and nothing else happened."""
    run = line.submit("a", "x")
    taken = line.take()
    assert taken is not None
    held = line.adopt_training(taken)
    lose_workers(store)
    version = store.put("a", make_bundle(b"late"), run=held, result=lambda version: {"version": str(version)})
    found = store.run(run)
    assert (found["state"], found["result"]) == ("finished", {"version": str(version)})
    line.write_log(taken, ["the last line"], last=True)
    assert [each["line"] for each in line.log(run)] == ["the last line"]
    assert line.end_try(taken, "late") is None
    assert store.run(run) == found


def test_a_version_and_the_end_of_its_run_are_one_transaction(store, line, make_bundle) -> None:
    run = line.submit("a", "x")
    taken = line.take()
    assert taken is not None
    held = line.adopt_training(taken)

    def lost(version: Version) -> dict[str, str]:
        raise StoreError("the connection was lost")

    with pytest.raises(StoreError, match="connection was lost"):
        store.put("a", make_bundle(b"one"), run=held, result=lost)
    assert list(store.list()) == []
    assert state(store, run) == "running"
    store.put("a", make_bundle(b"one"), run=held, result=lambda version: {"version": str(version)})
    for again in (b"one", b"two"):
        with pytest.raises(LeaseLost, match=f"jobs/{run} has ended"):
            store.put("a", make_bundle(again), run=held, result=lambda version: {})
    with pytest.raises(LeaseLost):
        store.end_run(held, "failed", error="S3 did not answer")
    assert [(str(version), version.run) for version in store.list()] == [("a@1", run)]
    assert store.run(run)["result"] == {"version": "a@1"}


def test_a_run_of_another_tenant_or_of_none_is_not_there(store, line) -> None:
    run, direct = line.submit("a", "x"), store.new_run("a", "x", "y")
    for act in (of(store, "other").cancel, of(store, "other").log):
        with pytest.raises(NotFound, match=r"no run .* in the queue"):
            act(run)
    with pytest.raises(InUse, match="is not from the queue: end it with Ctrl-C"):
        line.cancel(direct.id)
    store.end_run(direct, "failed")


def test_the_log_is_kept_in_order_and_bounded(store, line, monkeypatch) -> None:
    monkeypatch.setattr(jobs, "MOST_LINES", 5)
    run, taken = line.submit("a", "x"), line.take()
    assert taken is not None
    line.write_log(taken, ["one", "two\0\ud800", "3" * 900])
    line.write_log(taken, ["four", "five", "six"])
    line.write_log(taken, ["the last word"], last=True)
    log = line.log(run)
    assert [len(each["line"]) for each in log] == [3, 5, 500, 4, 4, 13]
    assert [each["line"] for each in line.log(run, after=log[3]["id"])] == ["five", "the last word"]


def test_a_priority_out_of_range_is_refused(line) -> None:
    with pytest.raises(RecipeError, match="priority 101: expected -100 to 100"):
        line.submit("a", "x", priority=101)


def test_after_the_death_of_a_process_with_several_runs_no_try_is_counted_and_each_is_tried_alone(store, line) -> None:
    for recipe in "xyz":
        line.submit("a", recipe)
    taken = [line.take() for _ in range(3)]
    line.set_beside([each.id for each in taken[:2]])
    lose_workers(store)
    again = {each.id: each for each in [line.take() for _ in range(3)]}
    assert [again[each.id].tries for each in taken] == [1, 1, 2]
    assert [again[each.id].alone for each in taken] == [True, True, False]
    lose_workers(store)  # the control: those that die alone lose a try
    again = {each.id: each for each in [line.take() for _ in range(3)]}
    assert [again[each.id].tries for each in taken] == [2, 2, 3]
    assert not any(each.alone for each in again.values())


def test_a_run_that_went_on_alone_loses_a_try_if_it_dies(store, line) -> None:
    run = line.submit("a", "x")
    taken = line.take()
    line.set_beside([run])
    line.hold_alone(taken)
    lose_workers(store)
    again = line.take()
    assert (again.tries, again.alone) == (2, False)


def test_a_run_is_only_taken_by_who_accepts_it(line) -> None:
    line.submit("a", "x")
    seen: list[str] = []
    assert line.take(lambda entry: bool(seen.append(entry.recipe))) is None
    assert seen == ["x"]
    taken = line.take(lambda entry: True)
    assert taken is not None
    assert taken.tries == 1


# --- cells ------------------------------------------------------------------------------------------------------------


STUDY = "comparisons/reviews-0123456789"


def cell(key: str, **spec: object) -> NewCell:
    return NewCell(key, "reviews", f"name = '{key}'", spec)


def test_a_cell_is_submitted_once_and_takes_its_turn_among_trainings(line: JobQueue) -> None:
    training = line.submit("a", "x")
    for _ in range(2):
        ids = line.submit_cells(STUDY, [cell("one"), cell("two", alone=True)])
    taken = [line.take() for _ in range(4)]
    found = [(each.id, each.kind) for each in taken if each is not None]
    assert found[0] == (training, "training"), "the oldest one"
    assert sorted(found[1:]) == sorted((id, CELL) for id in ids)
    assert ids == [cell_id("default", STUDY, key) for key in ("one", "two")]


def test_a_cell_that_failed_is_tried_again_when_it_is_submitted_again(line: JobQueue) -> None:
    (id,) = line.submit_cells(STUDY, [cell("one")])
    taken = line.take()
    assert taken is not None
    assert line.end_try(taken, "no column text", again=False, result={"kind": "DataError"}) == "failed"
    assert line.states([id])[id]["result"] == {"kind": "DataError"}
    assert line.submit_cells(STUDY, [cell("one")]) == [id]
    again = line.take()
    assert again is not None
    assert (again.tries, again.lease.fence > taken.lease.fence) == (1, True)
    line.finish(again)
    assert line.states([id])[id]["state"] == "finished"
    for late in (taken, again):
        with pytest.raises(LeaseLost):
            line.finish(late)


def test_the_cells_of_this_process_are_in_no_queue_and_go_on_after_its_death(line: JobQueue, store: Store) -> None:
    (id,) = line.submit_cells(STUDY, [cell("one")], here=True)
    assert line.take() is None
    taken = line.take_one(id)
    assert taken is not None
    with pytest.raises(InUse, match="another process runs the cell one"):
        line.submit_cells(STUDY, [cell("one")], here=True)
    with store.database().writing() as connection:
        connection.execute(leases.leases.update().values(process="other-boot/1/1/1", until=1.0))
    assert line.submit_cells(STUDY, [cell("one")], here=True) == [id]
    again = line.take_one(id)
    assert again is not None
    with pytest.raises(LeaseLost):
        line.finish(taken)
    assert line.end_try(again, None) == "interrupted"


def test_the_queue_takes_as_many_cells_as_its_limit_allows(line: JobQueue) -> None:
    line.limit("default", running=None, waiting=2)
    cells = [cell(str(number)) for number in range(3)]
    assert len(line.submit_cells(STUDY, cells)) == 2
    assert len(line.submit_cells(STUDY, cells)) == 2, "those that wait stay"
    with pytest.raises(QueueFull):
        line.submit_cells(STUDY, cells[2:])
    assert line.take() is not None
    assert len(line.submit_cells(STUDY, cells)) == 3


def test_a_tenant_cancels_its_own_cells_alone(line: JobQueue, store: Store) -> None:
    (id,) = line.submit_cells(STUDY, [cell("one")])
    JobQueue.of(store.with_access(Access("other"))).cancel_cells([id])
    assert line.states([id])[id]["state"] == "waiting"
    line.cancel_cells([id])
    assert line.states([id])[id]["state"] == "cancelled"
    assert line.take() is None


def test_a_cell_that_was_short_of_memory_beside_others_waits_for_a_process_of_its_own(line: JobQueue) -> None:
    line.submit_cells(STUDY, [cell("one")])
    taken = line.take()
    assert taken is not None
    line.return_alone(taken, "too little memory")
    again = line.take()
    assert again is not None
    assert (again.tries, again.spec) == (1, {"alone": True})
