"""An outage of every arm rolls nothing back; an outage of the candidate alone does, and quickly."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from turret.experiments import Guards, bounds, excess
from turret.experiments.decide import needed
from turret.experiments.guarding import Watch

RUNS, SECONDS, LEVEL, BOUND = 150, 60, 0.05, 0.02
SPLITS = [("0", {"control": 0.8, "candidate": 0.2}), ("0020", {"control": 0.5, "candidate": 0.5})]


def rows(seed: int, rates: dict[str, list[float]], kind: str = "errors") -> list[SimpleNamespace]:
    """The rows of one server, one per arm and second: ten answers a second, bad with these probabilities."""
    generator, found = np.random.default_rng(seed), []
    for second in range(SECONDS):
        share = SPLITS[second >= 20][1]["candidate"]
        candidate = int(generator.binomial(10, share))
        for arm, answers in (("candidate", candidate), ("control", 10 - candidate)):
            bad = int(generator.binomial(answers, rates[arm][second]))
            sums = {"errors": 0, "slow": 0, "seconds": 0.0, "compared": 0, "agreed": 0, kind: bad}
            row = SimpleNamespace(id=len(found) + 1, at=f"{second:04}", arm=arm, answers=answers, **sums)
            found.extend([row] if answers else [])
    return found


def outage(rate: float = 0.5) -> list[float]:
    """One answer in a hundred is bad; in the ten seconds around the change of the split, this share is."""
    return [rate if 18 <= second < 28 else 0.01 for second in range(SECONDS)]


FINE = [0.01] * SECONDS


def dropped(seed: int, rates: dict[str, list[float]], kind: str = "errors") -> tuple[int | None, bool]:
    """The second after which the candidate is dropped, and whether the bound alone would drop it."""
    watch, alone = Watch("control"), False
    for at, flush in itertools.groupby(rows(seed, rates, kind), lambda row: row.at):
        watch.read(list(flush), SPLITS)
        if "candidate" not in watch.arms:
            continue
        total = watch.sums["candidate"]
        alone |= bounds.evidence(getattr(total, kind), total.answers, BOUND) >= math.log(1 / LEVEL)
        if watch.arms["candidate"].evidence(kind, total, BOUND) >= needed(LEVEL):
            return int(at), alone
    return None, alone


@pytest.mark.parametrize("kind", ["errors", "slow"])
def test_an_outage_of_both_arms_rolls_the_candidate_back_no_more_often_than_the_level(kind) -> None:
    found = [dropped(seed, {"control": outage(), "candidate": outage()}, kind) for seed in range(RUNS)]
    assert sum(second is not None for second, _ in found) <= stats.binom.ppf(0.999, RUNS, LEVEL)
    assert sum(alone for _, alone in found) > 0.5 * RUNS  # with the bound alone


@pytest.mark.parametrize("kind", ["errors", "slow"])
def test_an_outage_of_the_candidate_alone_rolls_it_back_within_its_ten_seconds(kind) -> None:
    found = [dropped(seed, {"control": FINE, "candidate": outage()}, kind)[0] for seed in range(RUNS)]
    assert sum(second is not None and second < 28 for second in found) >= 0.98 * RUNS


def test_a_candidate_that_fails_more_than_the_control_and_less_than_the_bound_stays() -> None:
    few = [0.012] * SECONDS
    found = [dropped(seed, {"control": [0.0] * SECONDS, "candidate": few})[0] for seed in range(RUNS)]
    assert sum(second is not None for second in found) <= stats.binom.ppf(0.999, RUNS, LEVEL)


@pytest.mark.parametrize(("n1", "n0", "s"), [(3, 5, 4), (1, 9, 2), (6, 6, 6)])
def test_summed_over_all_that_can_happen_a_block_expects_one_where_the_arms_fail_alike(n1, n0, s) -> None:
    """Exactly, and less if the candidate fails less."""
    expected = np.zeros(len(excess.ODDS))
    better = np.zeros(len(excess.ODDS))
    for bad in range(max(0, s - n0), min(s, n1) + 1):
        factor = np.exp(excess.factors(bad, n1, s - bad, n0))
        expected += stats.hypergeom(n1 + n0, n1, s).pmf(bad) * factor
        better += stats.nchypergeom_fisher(n1 + n0, n1, s, 0.5).pmf(bad) * factor
    assert expected == pytest.approx(1)
    assert (better < 1).all()
    assert excess.factors(2, 5, 0, 5)[2] == pytest.approx(
        math.log(stats.nchypergeom_fisher(10, 5, 2, 4.0).pmf(2) / stats.hypergeom(10, 5, 2).pmf(2))
    )


def test_blocks_without_errors_or_with_nothing_else_say_nothing() -> None:
    for block in ((0, 5, 0, 5), (5, 5, 5, 5), (3, 5, 0, 0), (0, 0, 3, 5)):
        assert not excess.factors(*block).any()


def test_answers_of_the_control_count_that_came_before_the_first_one_of_an_arm() -> None:
    def row(number: int, arm: str, answers: int, errors: int) -> SimpleNamespace:
        sums = {"slow": 0, "seconds": 0.0, "compared": 0, "agreed": 0}
        return SimpleNamespace(id=number, at=f"{number:04}", arm=arm, answers=answers, errors=errors, **sums)

    watch = Watch("control")
    late = [row(number, "shadow", 1, 1) for number in range(2, 14)]  # a shadow answers after the control
    watch.read([row(1, "control", 12, 0), *late], [("0", {"control": 1.0})])
    assert watch.arms["shadow"].evidence("errors", watch.sums["shadow"], BOUND) > needed(LEVEL)


def test_where_the_control_gets_no_traffic_the_bound_alone_decides(workspace, router) -> None:
    workspace.experiment("news").start("news@2", share=1.0, guards=Guards(max_errors=0.02))
    for number in range(20):
        router.answered(router.assign("news", str(number)), seconds=0.1, error=number % 2 == 0)
    router.flush()
    (settled,) = workspace.settle()
    assert "10 of 20 answers were errors" in settled.done[0]


def test_errors_of_both_arms_roll_nothing_back_and_of_the_candidate_alone_do(workspace, router, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.5, guards=Guards(max_errors=0.02, max_seconds=2.0))
    for second, failing in enumerate([("control", "candidate")] * 5 + [("candidate",)] * 20):
        clock.now += 1
        for number in range(20):
            found = router.assign("news", f"{second} {number}")
            bad = found.arm in failing and number % 2 == 0
            router.answered(found, seconds=9.0 if bad else 0.1, error=bad)
        router.flush()
        (settled,) = workspace.settle()
        if settled.experiment.state == "ended":
            break
    assert second >= 5
    assert "answers were errors, the limit is 2%; of the control's" in settled.done[0]
