"""An outage of every arm rolls nothing back; one of the candidate alone does, whenever it begins."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from turret.experiments import Guards, guarding
from turret.experiments.guarding import NEEDED, ODDS, START, Detector, Watch, log_over_bound, log_over_control
from turret.experiments.rows import ArmHealth, HealthRow
from turret.timestamp import timestamp

RUNS, BOUND, NORMAL, OUTAGE = 60, 0.02, 0.01, 0.5
EARLY = 20  # seconds before an outage
SPLITS = [(timestamp(0), {"control": 0.8, "candidate": 0.2}), (timestamp(EARLY), {"control": 0.5, "candidate": 0.5})]


def rows(seed: int, seconds: int, begins: int, arms: tuple[str, ...], kind: str) -> list[HealthRow]:
    """The rows of one server, ten answers a second. From `begins` on, half of `arms`' are bad."""
    generator, found = np.random.default_rng(seed), []
    for second in range(seconds):
        share = SPLITS[second >= EARLY][1]["candidate"]
        candidate = int(generator.binomial(10, share))
        for arm, answers in (("candidate", candidate), ("control", 10 - candidate)):
            bad = int(generator.binomial(answers, OUTAGE if second >= begins and arm in arms else NORMAL))
            row = HealthRow(len(found) + 1, arm, timestamp(second), ArmHealth(answers, **{kind: bad}))
            found.extend([row] if answers else [])
    return found


def dropped(found: list[HealthRow], kind: str = "errors", bound: float = BOUND) -> int | None:
    """The second after which the candidate is dropped."""
    watch = Watch("control", {kind: bound})
    for second, (_, flush) in enumerate(itertools.groupby(found, lambda row: row.at)):
        watch.read(list(flush), SPLITS)
        if "candidate" in watch.arms and watch.arms["candidate"].detectors[0].alarm:
            return second
    return None


@pytest.mark.parametrize("kind", ["errors", "slow"])
def test_an_outage_of_both_arms_rolls_nothing_back(kind) -> None:
    arms = ("candidate", "control")
    assert [dropped(rows(seed, 80, EARLY, arms, kind), kind) for seed in range(RUNS)] == [None] * RUNS


@pytest.mark.parametrize(("begins", "runs"), [(EARLY, RUNS), (300, 30), pytest.param(3600, 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["errors", "slow"])
def test_an_outage_of_the_candidate_alone_rolls_it_back_in_seconds_whenever_it_begins(kind, begins, runs) -> None:
    delays = []
    for seed in range(runs):
        second = dropped(rows(seed, begins + 40, begins, ("candidate",), kind), kind)
        assert second is not None
        assert second >= begins, "a false alarm"
        delays.append(second - begins + 1)
    assert np.median(delays) <= 14
    assert np.quantile(delays, 0.95) <= 25


def test_control_a_bound_on_all_answers_so_far_would_not_see_a_late_outage() -> None:
    """The likelihood ratio of all answers, at the best share above the bound, an hour before and 40 seconds into it."""
    found = [row for row in rows(1, 3640, 3600, ("candidate",), "errors") if row.arm == "candidate"]
    bad, total = sum(row.seen.errors for row in found), sum(row.seen.answers for row in found)
    assert log_over_bound(bad, total, BOUND).max() < math.log(20)


def test_a_candidate_that_fails_more_than_the_control_and_less_than_the_bound_stays() -> None:
    """Also if an outage of all arms came before: being over the bound then, and over the control now, is not both."""
    generator = np.random.default_rng(3)
    watch = Watch("control", {"errors": BOUND})
    number = itertools.count(1)
    for second in range(1500):
        everywhere, rate = 100 <= second < 130, {"candidate": 0.012, "control": 0.0}
        flush = []
        for arm in ("candidate", "control"):
            bad = int(generator.binomial(5, 0.5 if everywhere else rate[arm]))
            flush.append(HealthRow(next(number), arm, timestamp(second), ArmHealth(5, bad)))
        watch.read(flush, SPLITS)
    assert watch.arms["candidate"].detectors[0].peak < math.log(NEEDED) - 2


@pytest.mark.slow
def test_false_alarms_stay_below_the_stated_rate(monkeypatch) -> None:
    """At the edge of both nulls, with a threshold so low that alarms happen."""
    generator, runs, hours, needed = np.random.default_rng(11), 300, 2.0, 100.0
    monkeypatch.setattr(guarding, "NEEDED", needed)
    for rates in (
        (BOUND, BOUND / 20),
        (3 * BOUND, 3 * BOUND),
    ):  # at its bound and above the control; over it as both are
        alarms = 0
        for _ in range(runs):
            detector = Detector("errors", BOUND)
            bad = [generator.binomial(20, rate, size=360) for rate in rates]
            for arm, control in zip(*bad, strict=True):
                detector.after(answers(20, int(arm)), answers(20, int(control)), hours / 360)
            alarms += detector.alarm
        assert alarms <= stats.binom.ppf(0.999, runs, (hours + START) / needed)


def answers(total: int, errors: int) -> guarding.ArmHealth:
    return guarding.ArmHealth(total, errors)


@pytest.mark.parametrize("total", [1, 4, 12])
def test_a_block_expects_one_at_the_bound_and_less_within_it(total) -> None:
    for share, exactly in ((0.1, True), (0.05, False)):
        chances = stats.binom.pmf(np.arange(total + 1), total, share)
        factors = np.exp([log_over_bound(bad, total, 0.1) for bad in range(total + 1)])
        expected = chances @ factors
        assert (expected == pytest.approx(1)) if exactly else (expected < 1).all()


@pytest.mark.parametrize(("n1", "n0", "s"), [(3, 5, 4), (1, 9, 2), (6, 6, 6)])
def test_summed_over_all_that_can_happen_a_block_expects_one_where_the_arms_fail_alike(n1, n0, s) -> None:
    """Exactly, and less if the candidate fails less."""
    expected = np.zeros(len(ODDS))
    better = np.zeros(len(ODDS))
    for bad in range(max(0, s - n0), min(s, n1) + 1):
        factor = np.exp(log_over_control(bad, n1, s - bad, n0))
        expected += stats.hypergeom(n1 + n0, n1, s).pmf(bad) * factor
        better += stats.nchypergeom_fisher(n1 + n0, n1, s, 0.5).pmf(bad) * factor
    assert expected == pytest.approx(1)
    assert (better < 1).all()
    assert log_over_control(2, 5, 0, 5)[1] == pytest.approx(
        math.log(stats.nchypergeom_fisher(10, 5, 2, 4.0).pmf(2) / stats.hypergeom(10, 5, 2).pmf(2))
    )


def test_blocks_without_errors_or_with_nothing_else_say_nothing() -> None:
    for block in ((0, 5, 0, 5), (5, 5, 5, 5), (3, 5, 0, 0), (0, 0, 3, 5)):
        assert not log_over_control(*block).any()


def test_answers_of_the_control_count_that_came_before_the_first_one_of_an_arm() -> None:
    def row(number: int, arm: str, answers: int, errors: int) -> HealthRow:
        return HealthRow(number, arm, timestamp(number), ArmHealth(answers, errors))

    late = [row(number, "shadow", 1, 1) for number in range(2, 14)]  # a shadow answers after the control
    for before, seen in (([row(1, "control", 12, 0)], True), ([], False)):
        watch = Watch("control", {"errors": BOUND})
        watch.read([*before, *late], [(timestamp(0), {"control": 1.0})])
        assert (watch.arms["shadow"].detectors[0].peak > math.log(START) + 4) is seen


def test_where_the_control_gets_no_traffic_the_bound_alone_decides(workspace, router) -> None:
    workspace.experiment("news").start("news@2", share=1.0, guards=Guards(max_errors=0.02))
    for number in range(20):
        router.answered(router.assign("news", str(number)), seconds=0.1, error=number % 2 == 0)
    router.flush()
    (settled,) = workspace.settle()
    assert "10 of its last 20 answers were errors, the limit is 2%" in settled.done[0]


def test_errors_of_both_arms_roll_nothing_back_and_of_the_candidate_alone_do(workspace, router, clock) -> None:
    guards = Guards(max_errors=0.02, max_seconds=2.0)
    workspace.experiment("news").start("news@2", share=0.5, guards=guards, salt="always the same arms")
    seconds: list[tuple[str, ...]] = [("control", "candidate")] * 5 + [()] * 5 + [("candidate",)] * 20
    for second, failing in enumerate(seconds):
        clock.now += 1
        for number in range(20):
            found = router.assign("news", f"{second} {number}")
            bad = found.arm in failing and number % 2 == 0
            router.answered(found, seconds=9.0 if bad else 0.1, error=bad)
        router.flush()
        (settled,) = workspace.settle()
        if settled.experiment.state == "ended":
            break
    assert second >= 10
    assert "answers were errors, the limit is 2%; 0 of " in settled.done[0]
