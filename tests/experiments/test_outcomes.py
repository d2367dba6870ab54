"""An outcome is recorded once, counts once, and gets a clear status; answers come through a router."""

from __future__ import annotations

import threading
import time

import pytest

from turret import Workspace
from turret.database import Database
from turret.errors import BadExperiment, NotFound, StoreError
from turret.experiments.router import Router


def test_the_same_unit_sees_the_same_arm_over_restarts_and_replicas(workspace, router, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.3)
    units = [f"user {number}" for number in range(300)]
    first = {unit: router.assign("news", unit).arm for unit in units}
    again = Workspace(workspace.store.root)
    other = again.router(clock)
    assert {unit: other.assign("news", unit).arm for unit in units} == first
    assert {unit: again.experiment("news").assign(unit)[1] for unit in units[:20]} == {u: first[u] for u in units[:20]}
    workspace.experiment("news").ramp(0.6)
    clock.now += 1
    then = {unit: other.assign("news", unit).arm for unit in units}
    assert all(then[unit] == "candidate" for unit in units if first[unit] == "candidate")
    chances = sorted({other.assign("news", unit).probability for unit in units})
    assert chances == pytest.approx([0.4, 0.6])


def test_a_change_is_seen_within_a_second_and_a_name_without_experiment_is_none(workspace, router, clock) -> None:
    assert router.assign("news", "ann") is None
    workspace.experiment("news").start("news@2", share=1.0, unit="session")
    assert router.assign("news", "ann") is None
    clock.now += 1
    found = router.assign("news", "ann")
    assert (found.version, found.arm, found.probability, found.experiment) == ("news@2", "candidate", 1.0, "news#1")
    assert router.running("news").unit == "session"
    assert router.assign("other", "ann") is None
    workspace.experiment("news").stop()
    clock.now += 1
    assert router.assign("news", "ann") is None


def test_each_outcome_has_one_clear_answer_and_a_unit_counts_once(workspace, router, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.5)
    for receipt, unit in (("r1", "ann"), ("r2", "ann"), ("r3", "bob"), ("r4", "cid")):
        router.assign("news", unit, receipt)
    told = [
        router.outcome(1, receipt="r1"),
        router.outcome(1, receipt="r1"),
        router.outcome(0, receipt="r1"),
        router.outcome(0, receipt="r2"),
        router.outcome(1, receipt="nothing like it"),
        router.outcome(2, receipt="r3"),
        router.outcome("true", unit="bob", name="news"),
        router.outcome(True, receipt="r3"),
        router.outcome(1, unit="dan", name="news"),
        router.outcome(1, receipt="\0" * 5000),
    ]
    assert [each.status for each in told] == [
        "counted", "repeated", "repeated", "noted", "unknown", "refused", "counted", "repeated", "unknown", "unknown",
    ]  # fmt: skip
    assert "already has the outcome 1: it stays, not 0" in told[2].text
    assert "a user counts once" in told[3].text
    assert "never answered user 'dan'" in told[8].text
    assert not any("\n" in each.text for each in told)
    workspace.experiment("news").stop()
    late = router.outcome(1, receipt="r4")
    assert late.status == "late"
    assert "news#1 ended 20" in late.text
    arms = workspace.experiment("news").status().as_json()["arms"]
    assert sum(arm["outcomes"] for arm in arms) == 2
    assert sum(arm["units"] for arm in arms) == 3


@pytest.mark.parametrize("value", ["x", "", None, float("nan"), float("inf"), 0.99, 5.01, [], "1e999", 10**400])
def test_a_value_that_is_no_outcome_is_refused_and_records_nothing(workspace, value) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", metric="1..5")
    experiment.assign("ann", "r1")
    found = experiment.outcome(value, receipt="r1")
    assert found.status == "refused"
    assert "expected a number from 1 to 5" in found.text
    assert experiment.outcome("4.5", receipt="r1").status == "counted"


def test_who_the_unit_is_is_not_kept(workspace, router) -> None:
    workspace.experiment("news").start("news@2")
    router.assign("news", "ann@example.org", "r1")
    router.outcome(1, receipt="r1")
    assert b"ann@example" not in b"".join(path.read_bytes() for path in workspace.store.root.glob("turret.db*"))


def test_many_outcomes_at_once_are_each_answered(workspace, router) -> None:
    workspace.experiment("news").start("news@2", share=0.5)
    for number in range(1200):
        router.assign("news", str(number), f"r{number}")
    router.flush()
    found = workspace.experiment("news").outcomes([(f"r{number % 1200}", None, number % 2) for number in range(1300)])
    assert [each.status for each in found] == ["counted"] * 1200 + ["repeated"] * 100


def test_an_outcome_says_which_answer_it_is_of(workspace, router) -> None:
    with pytest.raises(BadExperiment, match="needs the receipt of its answer, or the unit"):
        router.outcome(1)
    with pytest.raises(NotFound, match="no experiment on news: `turret experiment start`"):
        router.outcome(1, unit="ann", name="news")
    with pytest.raises(BadExperiment, match="1 to 100 printable"):
        router.assign("news", "ann", "r" * 101)


def test_a_receipt_that_is_logged_twice_is_one_answer(workspace, router) -> None:
    workspace.experiment("news").start("news@2")
    for _ in range(2):
        router.assign("news", "ann", "r1")
        router.flush()
    router.assign("news", "ann", "r1")
    assert router.outcome(1, receipt="r1").status == "counted"
    assert router.outcome(1, receipt="r1").status == "repeated"


class Failing:
    """A database that can become unreachable."""

    def __init__(self, database: Database) -> None:
        self.database, self.down = database, False

    def reading(self):
        if self.down:
            raise StoreError("store gone: it is away")
        return self.database.reading()

    def writing(self):
        if self.down:
            raise StoreError("store gone: it is away")
        return self.database.writing()


def test_while_the_store_is_away_what_runs_goes_on_and_the_log_is_kept(workspace, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.5)
    database = Failing(workspace.store.database())
    router = Router(database, clock)
    before = router.assign("news", "ann", "r1")
    database.down, clock.now = True, clock.now + 5
    assert router.assign("news", "ann", "r2") == before
    assert router.problem == "store gone: it is away"
    with pytest.raises(StoreError):
        router.outcome(1, receipt="r1")
    database.down, clock.now = False, clock.now + 5
    router.turn()
    assert router.problem is None
    assert [router.outcome(1, receipt=receipt).status for receipt in ("r1", "r2")] == ["counted", "noted"]


def test_a_router_that_never_reached_the_store_does_not_say_that_nothing_runs(workspace, clock) -> None:
    workspace.experiment("news").start("news@2")
    database = Failing(workspace.store.database())
    database.down = True
    router = Router(database, clock)
    for _ in range(2):
        with pytest.raises(StoreError):
            router.assign("news", "ann")
    database.down = False
    assert router.assign("news", "ann") is not None


def test_threads_lose_no_answer(workspace, router, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.5)

    def work(part: int) -> None:
        for number in range(200):
            found = router.assign("news", f"{part} {number}", f"{part} {number}")
            router.answered(found, seconds=0.1)
            clock.now += 0.01

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    router.flush()
    arms = workspace.experiment("news").status().as_json()["arms"]
    assert sum(arm["units"] for arm in arms) == sum(arm["answers"] for arm in arms) == 800


def test_a_flush_waits_for_a_log_that_another_thread_is_writing(workspace: Workspace, router: Router) -> None:
    workspace.experiment("news").start("news@2", share=0.5)
    router.assign("news", "ann", "1")
    threads = [threading.Thread(target=router.flush) for _ in range(2)]
    with workspace.store.database().writing():  # the first thread waits in the middle of its write
        threads[0].start()
        while router._unwritten:
            time.sleep(0.01)
        threads[1].start()
        threads[1].join(0.2)
        assert threads[1].is_alive()
    for each in threads:
        each.join(10)
    assert sum(arm["units"] for arm in workspace.experiment("news").status().as_json()["arms"]) == 1
