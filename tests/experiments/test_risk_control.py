"""Thresholds that bound errors, and the evidence of outcomes against the bound: exact numbers, and simulations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, binom

from turret.errors import DataError
from turret.experiments.guarding import ODDS, log_over_bound
from turret.experiments.risk_control import (
    Bound,
    Choice,
    Watch,
    choose_threshold,
    count_decidable,
    fewest_decided,
    promise_state,
    starting_points,
)
from turret.statistics import EProcess

RUNS = 200
LIMIT = 0.05 + 3 * (0.05 * 0.95 / RUNS) ** 0.5  # of the share of broken bounds at a level of 5%
Floats = NDArray[np.float64]


def bound(error: float = 0.05, metric: str = "error", confidence: float = 0.95) -> Bound:
    return Bound.parse(metric, error, confidence, ["a", "b"])


class World:
    """Answers `a` and `b` whose probabilities are right: an answer with p is right with p. It has 60% of `a`."""

    def __init__(self, seed: int, spread: float = 4.0) -> None:
        self.random, self.spread = np.random.default_rng(seed), spread

    def draw(self, n: int) -> tuple[list[str], list[str], Floats]:
        z = self.random.normal(size=n) * self.spread + 1
        p = 1 / (1 + np.exp(-np.abs(z)))
        given = np.where(z > 0, "a", "b")
        right = np.where(self.random.random(n) < p, given, np.where(given == "a", "b", "a"))
        return given.tolist(), right.tolist(), p

    def risks(self, bound: Bound) -> Callable[[float], float]:
        """What is wrong at a threshold, in many answers."""
        given, right, p = (np.array(each) for each in self.draw(200_000))
        mine = right == bound.label if bound.kind == "misses" else (given == bound.label) | (bound.kind == "error")
        order = np.argsort(-p[mine])
        ranked, wrong = p[mine][order], np.cumsum((given != right)[mine][order])

        def risk(threshold: float) -> float:
            decided = int(np.searchsorted(-ranked, -threshold, side="right"))
            bad = wrong[decided - 1] if decided else 0
            return float(bad / (len(ranked) if bound.kind == "misses" else max(decided, 1)))

        return risk


@pytest.mark.parametrize(
    ("wrong", "error", "level", "needed"), [(0, 0.02, 0.05, 149), (0, 0.05, 0.05, 59), (3, 0.05, 0.05, 153)]
)
def test_the_test_is_that_of_clopper_and_pearson(wrong: int, error: float, level: float, needed: int) -> None:
    assert fewest_decided(wrong, error, level) == needed
    upper = beta.ppf(1 - level, wrong + 1, needed - wrong)  # their upper bound, by the other formula
    assert upper <= error < beta.ppf(1 - level, wrong + 1, needed - 1 - wrong)
    assert binom.cdf(wrong, needed, error) <= level < binom.cdf(wrong, needed - 1, error)


def test_the_threshold_is_the_loosest_one_that_passes_in_the_sequence() -> None:
    """Checked by a plain loop over the same sequence."""
    random = np.random.default_rng(1)
    for n in (100, 400, 1500):
        ranked = np.sort(random.random(n))[::-1]
        ranked[10:14] = ranked[10]  # equal probabilities are decided together
        wrong = np.cumsum(random.random(n) < 0.06 * np.arange(n) / n)
        level, best, alive = 0.0, 0, False
        begins = starting_points(n, 0.05, 0.05)
        for m in range(1, n + 1):
            if m in begins:
                level, alive = (level if alive else 0.0) + 0.05 / len(begins), True
            if alive and (m == n or ranked[m - 1] > ranked[m]):
                alive = binom.cdf(wrong[m - 1], m, 0.05) <= level
                best = m if alive else best
        assert count_decidable(ranked, wrong, 0.05, 0.05) == best > 0


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["error", "precision:b", "misses:b"])
@pytest.mark.parametrize("n", [400, 1500])
def test_the_bound_is_broken_in_at_most_the_stated_share_and_a_naive_threshold_breaks_it(metric: str, n: int) -> None:
    world, wanted = World(n), bound(0.05, metric)
    risk = world.risks(wanted)
    broken = naive = passed = 0
    for _ in range(RUNS):
        given, right, p = world.draw(n)
        found = choose_threshold(wanted, given, right, p)
        if found.threshold is not None:
            passed += 1
            broken += risk(found.threshold) > wanted.error
        naive += risk(loosest(wanted, given, right, p)) > wanted.error
    assert passed > RUNS / 4, "the simulation says nothing if no threshold passes"
    assert broken / RUNS <= LIMIT
    assert naive / RUNS > 0.3, "the control: a threshold at which the examples have the wanted error"


def loosest(wanted: Bound, given: list[str], right: list[str], p: Floats) -> float:
    """The naive threshold: the loosest at which the share that was wrong in the examples is within the bound."""
    g, r = np.array(given), np.array(right)
    order = np.argsort(-p)
    if wanted.kind == "misses":
        mine = r == wanted.label
        share = np.cumsum((mine & (g != r))[order]) / mine.sum()
    else:
        mine = (g == wanted.label) | (wanted.kind == "error")
        share = np.cumsum((mine & (g != r))[order]) / np.maximum(np.cumsum(mine[order]), 1)
    fits = np.flatnonzero(share <= wanted.error)
    return float(p[order][fits[-1]]) if len(fits) else 2.0


def test_a_choice_counts_what_it_decides_and_what_was_wrong() -> None:
    given, right, p = World(2).draw(1500)
    found = choose_threshold(bound(), given, right, p)
    assert found.threshold is not None
    decided = p >= found.threshold
    wrong = np.array([a != b for a, b in zip(given, right, strict=True)])
    assert found == Choice(found.threshold, 1500, int(decided.sum()), int((decided & wrong).sum()), int(decided.sum()))
    of_b = choose_threshold(bound(metric="precision:b"), given, right, p)
    assert of_b.threshold is not None
    assert of_b.counted == int(((p >= of_b.threshold) & (np.array(given) == "b")).sum())
    missed = choose_threshold(bound(metric="misses:b"), given, right, p)
    assert missed.counted == right.count("b")


def test_without_wrong_examples_every_answer_is_decided() -> None:
    found = choose_threshold(bound(), ["a"] * 60, ["a"] * 60, np.linspace(0.5, 1, 60))
    assert (found.threshold, found.decided) == (0.0, 60)
    assert choose_threshold(bound(), ["a"] * 58, ["a"] * 58, np.linspace(0.5, 1, 58)).threshold is None


def test_examples_that_are_too_few_say_how_many_would_be_enough() -> None:
    given, right, p = World(3).draw(150)
    few = choose_threshold(bound(0.02), given, right, p)
    assert few.threshold is None
    assert few.needed is not None
    assert 150 < few.needed < 5000
    carried = [
        choose_threshold(bound(0.02), *World(seed).draw(2 * few.needed)).threshold is not None for seed in range(5)
    ]
    assert sum(carried) >= 4, "twice as many as it says are enough"
    noise = ["b"] * 150
    assert choose_threshold(bound(0.02), given, noise, np.full(150, 0.9)).needed is None, "no number would"
    scarce = choose_threshold(bound(0.02, "misses:b"), ["a"] * 100, ["b"] * 20 + ["a"] * 80, np.linspace(0.5, 1, 100))
    assert scarce.needed == 5 * 149


@pytest.mark.parametrize(
    ("metric", "error", "confidence", "says"),
    [
        ("error", 0.0, 0.95, "expected a share above 0"),
        ("error", 0.6, 0.95, "at most 50%"),
        ("error", float("nan"), 0.95, "expected a share"),
        ("error", 0.02, 1.0, "less than 100%"),
        ("misses", 0.02, 0.95, "expected error, misses:LABEL"),
        ("misses:c", 0.02, 0.95, "expected one of 'a', 'b'"),
        ("recall", 0.02, 0.95, "expected error, misses:LABEL"),
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(metric: str, error: float, confidence: float, says: str) -> None:
    with pytest.raises(DataError, match=says):
        bound(error, metric, confidence)


# --- watching ---------------------------------------------------------------------------------------------------------


def alarm(rate: float, n: int, seed: int, held: int = 0, error: float = 0.02) -> int | None:
    """The outcome at which the promise is broken, of n after `held` with half the error; None if it is not."""
    random = np.random.default_rng(seed)
    wrong = np.concatenate([random.random(held) < error / 2, random.random(n) < rate])
    watch = Watch(bound(error))
    for start in range(0, len(wrong), 50):
        watch = watch.after(wrong[start : start + 50])
        if watch.tipping is not None:
            return start + 50
    return None


@pytest.mark.slow
def test_a_promise_that_holds_is_called_broken_in_at_most_the_stated_share() -> None:
    """However often one looks; at its bound, where this is hardest."""
    alarms = 0
    for seed in range(RUNS):
        wrong = np.random.default_rng(seed).random(2000) < 0.02
        alarms += Watch(bound(0.02)).after(wrong).tipping is not None  # at any of these outcomes
    assert alarms / RUNS <= LIMIT


@pytest.mark.slow
def test_a_shift_is_found_also_after_a_long_time_in_which_the_promise_held() -> None:
    at = [alarm(0.06, 1500, seed, held=2000) for seed in range(20)]
    assert all(each is not None for each in at)
    late = sorted(each - 2000 for each in at if each is not None)
    assert late[0] > 0
    assert late[10] < 700
    plain = EProcess.of(len(ODDS))  # the control: without new starts
    random = np.random.default_rng(0)
    wrong = np.concatenate([random.random(2000) < 0.01, random.random(700) < 0.06])
    steps = np.where(wrong[:, None], log_over_bound(1, 1, 0.02), log_over_bound(0, 1, 0.02))
    assert plain.through(steps).peak < np.log(20)


def test_outcomes_in_parts_give_the_same_evidence_as_at_once() -> None:
    wrong = np.random.default_rng(4).random(300) < 0.1
    whole, parts = Watch(bound()).after(wrong), Watch(bound())
    for each in np.array_split(wrong, 7):
        parts = parts.after(each)
    assert parts.evidence == pytest.approx(whole.evidence)
    assert (parts.outcomes, parts.wrong) == (300, int(wrong.sum()))
    assert whole.since == parts.since


def test_the_outcome_at_which_it_broke_is_near_the_shift() -> None:
    random = np.random.default_rng(5)
    wrong = np.concatenate([random.random(1000) < 0.01, random.random(300) < 0.2])
    assert 800 < Watch(bound(0.02)).after(wrong).since < 1200


def state(rate: float, silent: float, missing: float, missing_bound: float, n: int = 1000) -> str:
    wrong = np.random.default_rng(6).random(n) < rate
    return promise_state(Watch(bound(0.05), missing_bound).after(wrong), silent=silent, missing=missing).state


def test_the_state_says_what_missing_outcomes_leave_open() -> None:
    good, bad = 0.01, 0.12
    assert state(good, 0.0, 0.0, 0.05) == "holds so far"
    assert state(bad, 0.0, 0.0, 0.05) == "broken"
    assert state(good, 0.0, 0.0, 0.05, n=0) == "cannot be known"
    assert state(good, 0.3, 0.3, 0.05) == "cannot be known", "5% hidden errors would be too many"
    assert state(good, 0.3, 0.3, 0.0) == "holds so far", "they are claimed to be missing at random"
    assert state(good, 0.9, 0.0, 0.05) == "holds so far", "the outcomes of young answers are not missing"
    assert state(bad, 0.3, 0.3, 0.05) == "broken", "also if right answers hide among them"
    slightly = 0.09
    assert state(slightly, 0.0, 0.0, 0.2, n=700) == "broken"
    assert state(slightly, 0.9, 0.9, 0.2, n=700) == "cannot be known"
    assert state(good, 0.01, 0.01, 0.05) == "holds so far", "1% more errors would still be few enough"


@pytest.mark.slow
def test_outcomes_missing_at_random_break_no_promise_that_holds() -> None:
    broken = 0
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        wrong = random.random(1000) < 0.02
        watch = Watch(bound(0.02)).after(wrong[random.random(1000) >= 0.3])
        broken += promise_state(watch, silent=0.3, missing=0.3).state == "broken"
    assert broken / RUNS <= LIMIT


def test_outcomes_that_are_sent_for_wrong_answers_alone_break_no_promise() -> None:
    """The promise holds, with 2% wrong; 90% of the right answers send nothing."""
    random = np.random.default_rng(7)
    wrong = random.random(4000) < 0.02
    sent = wrong | (random.random(4000) < 0.97)
    watch = Watch(bound(0.02), 0.05).after(wrong[sent])
    assert promise_state(watch, silent=0.03, missing=0.03).state == "cannot be known"
