"""Sample ratio, discoveries, and paired comparisons."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from turret.experiments import analyze, validity
from turret.experiments.evidence import OutcomeTally, evidence_needed, find_discoveries
from turret.experiments.validity import NEEDED
from turret.statistics import sign_test
from turret.workspace import evaluation

HALF = {"control": 0.5, "candidate": 0.5}
UNITS = 0  # the class


def closed(splits: list[tuple[dict[str, float], dict[str, int]]]) -> float:
    """The reference of the sample ratio: a likelihood ratio in closed form, from the counts of each split."""
    logs = []
    for k in validity.CONCENTRATIONS:
        log = 0.0
        for pi, n in splits:
            log += math.lgamma(k) - math.lgamma(k + sum(n.values()))
            for arm, count in n.items():
                log += math.lgamma(k * pi[arm] + count) - math.lgamma(k * pi[arm]) - count * math.log(pi[arm])
        logs.append(log)
    return float(np.logaddexp.reduce(logs)) - math.log(len(logs))


def fallen(*splits: tuple[dict[str, float], list[str]]) -> validity.SampleRatio:
    """The arms of units, one split after the other."""
    found, planned = validity.SampleRatio(), dict(enumerate(pi for pi, _ in splits))
    for revision, (_, arms) in enumerate(splits):
        found = found.after([((revision, UNITS), arm) for arm in arms], planned)
    return found


def drawn(generator: np.random.Generator, share: float, units: int) -> list[str]:
    return ["candidate" if one else "control" for one in generator.random(units) < share]


def test_units_that_fall_as_planned_raise_no_alarm_at_any_look_through_a_ramp() -> None:
    generator, runs = np.random.default_rng(0), 200
    splits = [{"control": 1 - share, "candidate": share} for share in (0.05, 0.5)]
    alarms = 0
    for _ in range(runs):
        found = fallen(*((pi, drawn(generator, pi["candidate"], 1000)) for pi in splits))
        alarms += found.process.peak >= math.log(1 / 0.05)
    assert alarms <= stats.binom.ppf(0.999, runs, 0.05)


def test_the_ratio_unit_by_unit_is_the_closed_form_however_it_is_cut() -> None:
    generator = np.random.default_rng(0)
    splits = [({"control": 0.8, "candidate": 0.2}, drawn(generator, 0.2, 300)), (HALF, drawn(generator, 0.6, 200))]
    counts = [(pi, {arm: arms.count(arm) for arm in pi}) for pi, arms in splits]
    whole, pieces = fallen(*splits), validity.SampleRatio()
    for revision, (_, arms) in enumerate(splits):
        for start, end in itertools.pairwise((0, 1, 50, 300)):
            seen = [((revision, UNITS), arm) for arm in arms[start:end]]
            pieces = pieces.after(seen, {0: splits[0][0], 1: HALF})
    assert whole.process.now == pytest.approx(closed(counts))
    assert pieces.process.logs == pytest.approx(whole.process.logs)
    assert pieces.process.peak == pytest.approx(whole.process.peak)


def test_units_that_are_missing_from_an_arm_are_noticed_and_a_ramp_is_not_taken_for_it() -> None:
    generator = np.random.default_rng(1)
    found = fallen((HALF, drawn(generator, 0.46, 9500)))
    assert found.process.peak > math.log(NEEDED)
    slow = {"control": 0.95, "candidate": 0.05}
    assert fallen((slow, drawn(generator, 0.05, 5000)), (HALF, drawn(generator, 0.5, 5000))).process.peak < 3
    pooled = [*drawn(generator, 0.05, 5000), *drawn(generator, 0.5, 5000)]
    assert fallen((HALF, pooled)).process.peak > 100


def test_an_alarm_stays_when_later_units_fall_as_planned() -> None:
    """The current evidence falls below the threshold again; its peak does not."""
    skewed = ["control"] * 60 + ["control", "candidate"] * 30
    found = fallen((HALF, skewed))
    assert found.process.peak >= math.log(NEEDED)
    after = found.after([((0, UNITS), arm) for arm in ["candidate"] * 60 + ["control", "candidate"] * 3000], {0: HALF})
    assert after.process.now < math.log(NEEDED)  # the evidence before
    assert after.process.peak >= math.log(NEEDED)


def test_a_unit_in_an_arm_without_traffic_is_a_mismatch_at_once() -> None:
    assert fallen(({"control": 1.0}, ["control"] * 10 + ["candidate"])).process.peak > 100


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.9), (0.2, 0.3, 0.5)])
def test_summed_over_all_splits_of_six_units_the_ratio_expects_one(shares) -> None:
    names = ("a", "b", "c")[: len(shares)]
    planned, expected = dict(zip(names, shares, strict=True)), 0.0
    for fell in itertools.product(names, repeat=6):
        chance = math.prod(planned[name] for name in fell)
        expected += chance * math.exp(fallen((planned, list(fell))).process.now)
    assert expected == pytest.approx(1)


def test_of_many_experiments_the_largest_are_named() -> None:
    e = {"a": math.log(400), "b": math.log(60), "c": math.log(15), "d": 0.0}
    assert find_discoveries(e, 0.05) == {"a", "b"}  # 80 for one, 40 for two, 27 for three
    assert find_discoveries({"only": math.log(19)}, 0.05) == frozenset()
    assert find_discoveries({}, 0.05) == frozenset()


def false_discoveries(expected: float, alpha: float = 0.1) -> float:
    """The mean share of false discoveries, with 5 true effects among 25 experiments.

    Args:
        expected: the expectation of a null e-value, at most 1 if it is valid. It is 0, or just enough to be a discovery
            together with the true effects, which is the worst case.
    """
    generator, runs, null, true = np.random.default_rng(0), 2000, 20, 5
    enough = (null + true) / ((true + 1) * alpha)
    named_falsely = []
    for _ in range(runs):
        reached = generator.random(null) < expected / enough
        evidence = {f"null{n}": math.log(enough) + 1e-9 if high else -math.inf for n, high in enumerate(reached)}
        found = find_discoveries(evidence | {f"true{n}": 12.0 for n in range(true)}, alpha)
        assert len(found) == true + reached.sum()
        named_falsely.append(reached.sum() / len(found))
    return float(np.mean(named_falsely))


def test_few_of_the_named_are_false_as_long_as_null_evidence_is_worth_at_most_one() -> None:
    assert 0.04 < false_discoveries(1.0) <= 0.1
    assert false_discoveries(2.0) > 0.1  # invalid e-values give too many false discoveries


def test_what_one_more_experiment_needs_is_what_names_it() -> None:
    others = [math.log(value) for value in (200.0, 120.0, 30.0, 1.0, 0.5)]
    enough = evidence_needed(others, 0.05)
    assert math.exp(enough) == pytest.approx(6 / (0.05 * 4))  # the fourth, with 200, 120 and 30
    assert "one" in find_discoveries({str(log): log for log in others} | {"one": enough}, 0.05)
    assert "one" not in find_discoveries({str(log): log for log in others} | {"one": enough - 1e-6}, 0.05)
    assert math.exp(evidence_needed([], 0.05)) == pytest.approx(20)
    assert math.exp(evidence_needed([-math.inf] * 19, 0.05)) == pytest.approx(400)


MANY, REAL, UNITS_EACH, STEP = 20, 4, 2400, 100


def evidence_of(seed: int, place: int) -> list[tuple[float, str | None]]:
    """The evidence of one experiment of a store after each look; the first few have a real difference."""
    generator = np.random.default_rng([seed, place])
    arm = (generator.random(UNITS_EACH) < 0.5).astype(np.int64)
    chance = np.where(arm == 1, 0.45 if place < REAL else 0.3, 0.3)
    y, share = (generator.random(UNITS_EACH) < chance).astype(np.float64), np.full(UNITS_EACH, 0.5)
    found, known = [], OutcomeTally.empty(binary=True, margin=None, decides=analyze.deciding_evidence(0.05))
    for start in range(0, UNITS_EACH, STEP):
        known = known.after(*(part[start : start + STEP] for part in (arm, y, share)))
        found.append((known.equality(), known.verdict))
    return found


def ended(paths: list[list[tuple[float, str | None]]], *, waits: bool) -> frozenset[str]:
    """The discoveries, if each experiment ends at its verdict, or waits until it is a discovery."""
    now, over = [0.0] * len(paths), [False] * len(paths)
    for look in range(UNITS_EACH // STEP):
        for place, path in enumerate(paths):
            now[place] = now[place] if over[place] else path[look][0]
        for place, path in enumerate(paths):
            enough = evidence_needed(now[:place] + now[place + 1 :], 0.05)
            over[place] |= path[look][1] is not None and (not waits or now[place] >= enough)
    return find_discoveries({str(place): log for place, log in enumerate(now)}, 0.05)


def test_four_real_differences_among_twenty_are_discoveries_where_experiments_wait_for_it() -> None:
    stores = [[evidence_of(seed, place) for place in range(MANY)] for seed in range(3)]
    early = [name for paths in stores for name in ended(paths, waits=False)]
    found = [name for paths in stores for name in ended(paths, waits=True)]
    assert len(early) <= 2  # evidence of 20, with which each ended, is rarely enough
    assert sum(int(name) < REAL for name in found) >= 11
    assert sum(int(name) >= REAL for name in found) <= 1


def test_right_and_wrong_are_compared_by_mcnemar_and_texts_by_sign_flips() -> None:
    a, b = [1.0] * 40 + [0.0] * 20 + [1.0] * 4, [1.0] * 40 + [1.0] * 20 + [0.0] * 4
    found = evaluation.compare_scores(a, b)
    assert (found.only_a, found.only_b, found.equal, found.test) == (4, 20, 40, "McNemar")
    assert found.p == pytest.approx(stats.binomtest(4, 24).pvalue)
    assert found.verdict == "better"
    assert found.difference == pytest.approx(16 / 64)
    assert found.low < found.difference < found.high
    generator = np.random.default_rng(0)
    base = generator.random(60) * 0.9
    assert evaluation.compare_scores(base, base + 0.05 + 0.01 * generator.normal(size=60)).verdict == "better"
    assert evaluation.compare_scores(base, base).verdict == "undecided"
    assert evaluation.compare_scores(b, a).verdict == "worse"


def test_two_versions_that_are_equally_good_are_told_apart_hardly_ever() -> None:
    generator, runs = np.random.default_rng(0), 200
    wrong = 0
    for _ in range(runs):
        wrong += sign_test(*(int(count) for count in np.bincount(generator.integers(0, 2, 60), minlength=2))) < 0.05
    assert wrong <= stats.binom.ppf(0.999, runs, 0.05)
