"""The statistics of a comparison, on simulated scores whose truth is known: how often an interval holds it, how often a
verdict is wrong, and what each of the two mends is for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated_comparison import dataset, result

from turret.compare.comparison import score_of
from turret.compare.design import Cell, candidates
from turret.compare.verdict import (
    MOST_RESAMPLED,
    Futures,
    group_columns,
    interval,
    judge,
    mcnemar,
    rank_correlation_interval,
    rate,
    variance_components,
)
from turret.recipe import Recipe
from turret.statistics import sign_flips, sign_test, smallest

Grow = Callable[[int, int], np.ndarray]


def simulated(
    rng: np.random.Generator,
    seeds: int,
    examples: int,
    difference: float,
    *,
    luck: float = 0.0,
    accuracy: float = 0.9,
    shared: float = 0.7,
) -> np.ndarray:
    """Right or wrong of two methods, as differences (S, N), whose expected mean is `difference`.

    luck: standard deviation of a training's own accuracy; shared: how often an example is as hard for both methods.
    """
    hard = rng.random(examples)  # an example's own difficulty, the same for all trainings
    out = np.empty((seeds, examples))
    for s in range(seeds):
        rates = accuracy + difference + luck * rng.standard_normal(), accuracy + luck * rng.standard_normal()
        right = []
        for each in rates:
            own = np.where(rng.random(examples) < shared, hard, rng.random(examples))
            right.append(own < np.clip(each, 0, 1))
        out[s] = right[0].astype(float) - right[1].astype(float)
    return out


def coverage(repeats: int, seeds: int, examples: int, difference: float, **more: float) -> float:
    rng, held = np.random.default_rng(7), 0
    for _ in range(repeats):
        found = interval(simulated(rng, seeds, examples, difference, **more), rng, resamples=500)
        held += found.low <= difference <= found.high
    return held / repeats


def verdicts(repeats: int, seeds: int, examples: int, difference: float, margin: float = 1, **more: float) -> dict:
    rng, said = np.random.default_rng(11), dict.fromkeys(("within", "worse", "better", "undecided"), 0.0)
    for _ in range(repeats):
        d = simulated(rng, seeds, examples, difference, **more)
        said[judge(d, margin, rng, resamples=500).word] += 1 / repeats
    return said


def test_a_draw_as_extreme_as_the_sample_is_never_more_likely_than_certain() -> None:
    rng = np.random.default_rng(0)
    # of 2^60 signs only two are as extreme: the sample alone counts
    assert sign_flips(np.ones(60), rng, 999) == 1 / 1000
    assert sign_flips(np.array([1.0, -1.0]), rng, 999) == 1.0
    assert sign_flips(np.array([0.3]), rng, 1200) == 1.0  # every sign is as extreme, in each of the three parts


@given(st.integers(1, 5000), st.sampled_from([0.0, 0.02, 0.3]))
def test_the_smallest_number_is_found_within_its_share(wanted: int, within: float) -> None:
    found = smallest(lambda number: number >= wanted, within=within)
    assert found is not None
    assert wanted <= found <= max(wanted, wanted * (1 + within) / (1 - within))


def test_no_number_up_to_the_most_is_none() -> None:
    tried: list[int] = []
    assert smallest(lambda number: bool(tried.append(number)), most=100) is None
    assert tried == [1, 2, 4, 8, 16, 32, 64, 100]
    assert smallest(lambda number: number >= 64, most=100) == 64


@pytest.mark.parametrize("wanted", [65, 80, 97])
def test_a_number_between_the_last_doubling_and_the_most_is_found(wanted: int) -> None:
    assert smallest(lambda number: number >= wanted, most=97) == wanted
    assert smallest(lambda number: number >= wanted, most=wanted - 1) is None


@pytest.mark.parametrize(("seeds", "luck"), [(2, 0.01), (5, 0.02)])
def test_an_interval_holds_the_truth_about_as_often_as_it_says(seeds: int, luck: float) -> None:
    assert 0.92 <= coverage(150, seeds, 200, -0.01, luck=luck) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("luck", [0.0, 0.005, 0.02])
@pytest.mark.parametrize("examples", [50, 200, 1000])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_hold_the_truth_over_many_designs(seeds: int, examples: int, luck: float) -> None:
    """Two trainings that differ much by luck are the hardest case: there it is 91%, which the documentation says, and
    asked so often that one unlucky run of draws in a hundred cannot pass for a fault."""
    repeats = 1600 if seeds == 2 and luck == 0.02 else 400
    assert coverage(repeats, seeds, examples, -0.01, luck=luck) >= (0.89 if seeds == 2 else 0.915)


def test_an_interval_is_not_much_wider_than_it_must_be() -> None:
    rng, means, widths = np.random.default_rng(7), [], []
    for _ in range(100):
        d = simulated(rng, 5, 500, -0.01, luck=0.01)
        found = interval(d, rng, resamples=300)
        means.append(found.mean)
        widths.append(found.high - found.low)
    assert np.median(widths) < 1.7 * 2 * 1.96 * np.std(means)


@pytest.mark.slow
def test_resampling_examples_alone_would_be_too_sure_of_itself() -> None:
    """The control: with trainings that differ by luck, an interval over examples alone often misses it."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(150):
        d = simulated(rng, 3, 400, -0.01, luck=0.03)
        found = interval(d.mean(0, keepdims=True), rng, resamples=300)
        held += found.low <= -0.01 <= found.high
    assert held / 150 < 0.8


@pytest.mark.slow
def test_a_method_just_worse_than_the_margin_is_rarely_called_within() -> None:
    assert verdicts(150, 3, 400, -0.01, margin=1, luck=0.005)["within"] <= 0.06


@pytest.mark.slow
def test_a_method_as_good_is_rarely_called_worse_or_better() -> None:
    said = verdicts(150, 3, 400, 0.0, margin=1, luck=0.005)
    assert said["worse"] + said["better"] <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("luck", [0.0, 0.01])
def test_each_verdict_is_wrong_at_most_about_once_in_forty(seeds: int, luck: float) -> None:
    at_margin = verdicts(800, seeds, 500, -0.01, margin=1, luck=luck)
    assert at_margin["within"] <= 0.04
    assert at_margin["worse"] <= 0.04
    assert verdicts(800, seeds, 500, 0.0, margin=1, luck=luck)["better"] <= 0.04


@pytest.mark.slow
def test_clear_cases_are_decided() -> None:
    assert verdicts(20, 5, 2000, 0.0, margin=2, accuracy=0.95)["within"] > 0.9
    assert verdicts(20, 5, 1000, -0.10, margin=1)["worse"] > 0.9
    assert verdicts(20, 5, 1000, 0.08, margin=1, accuracy=0.8)["better"] > 0.9


def test_a_share_is_never_above_all_or_below_none() -> None:
    rng = np.random.default_rng(0)
    for shares in (np.ones((3, 40)), np.zeros((3, 40))):
        found = interval(shares, rng, between=(0, 1))
        assert 0 <= found.low <= found.mean <= found.high <= 1
        assert found.high - found.low > 0.01


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_the_interval_of_spearmans_correlation_holds_the_truth_as_often_as_it_says(correlation: float) -> None:
    rng, held, repeats = np.random.default_rng(5), 0, 300
    truth = 600 / np.pi * np.arcsin(correlation / 2)  # of two normal variables (Pearson 1907), in points
    (spec,) = candidates("lora", Recipe(name="tiny", base="small", data="tiny.csv"), "classify")
    trained = result(Cell(spec, 0, 1.0, spec.recipe), dataset(100), 0.9, 0)
    for _ in range(repeats):
        right = rng.standard_normal(100)
        given = correlation * right + np.sqrt(1 - correlation**2) * rng.standard_normal(100)
        y, z = (stats.zscore(stats.rankdata(each)) for each in (right, given))
        scores = 1 - (z - y) ** 2 / 2  # as `Embedding.scores`
        metrics = dict.fromkeys(("main_score", "spearman"), float(scores.mean()))
        found = score_of([dataclasses.replace(trained, kind="embedding", scores=scores, metrics=metrics)], rng)
        assert found.low <= found.mean <= found.high
        held += found.low <= truth <= found.high
    assert held >= stats.binom.ppf(0.01, repeats, 0.95)


def test_an_order_without_a_mistake_is_no_certainty() -> None:
    found = rank_correlation_interval(np.ones((3, 40)))
    assert found.low < 0.99
    assert found.mean == found.high == 1


def test_fifty_examples_without_a_disagreement_are_no_certainty() -> None:
    rng = np.random.default_rng(0)
    few = judge(np.zeros((3, 50)), 1.0, rng)
    assert few.word == "undecided"
    assert few.difference.low < -2
    assert judge(np.zeros((3, 2000)), 1.0, rng).word == "within"


def test_one_seed_never_decides() -> None:
    verdict = judge(np.full((1, 500), -1.0), 1.0, np.random.default_rng(0))
    assert verdict.word == "undecided"
    assert "at least two" in verdict.advice()


@pytest.mark.slow
def test_stored_versions_are_judged_by_the_examples_alone() -> None:
    rng = np.random.default_rng(11)
    said = [judge(simulated(rng, 1, 400, -0.05), 1.0, rng, resamples=500, fixed=True) for _ in range(200)]
    assert sum(each.difference.low <= -5 <= each.difference.high for each in said) >= 186
    assert sum(each.word in ("within", "better") for each in said) <= 8
    assert judge(simulated(rng, 1, 1000, -0.10), 1.0, rng, fixed=True).word == "worse"
    few = judge(np.repeat([[1.0, -1.0, 0.0]], [4, 4, 52], axis=1), 1.0, rng, fixed=True)
    assert few.word == "undecided"
    assert "more test examples would settle it" in few.sentence()
    assert "seed" not in few.sentence()


def test_undecided_by_luck_asks_for_seeds_and_undecided_by_few_examples_asks_for_examples() -> None:
    rng = np.random.default_rng(5)
    lucky = 0.03 * rng.standard_normal((3, 1)) + 0.002 * rng.standard_normal((3, 4000)) - 0.001
    asked = judge(lucky, 1.0, rng)
    assert asked.word == "undecided"
    assert asked.more_seeds
    assert f"about {asked.more_seeds} more seed" in asked.sentence()
    few = np.tile(simulated(rng, 1, 60, 0.0, shared=0.5), (5, 1))  # seeds agree, so more of them say nothing
    asked = judge(few, 1.0, rng)
    assert asked.more_seeds is None
    assert asked.more_examples
    assert "more test examples" in asked.sentence()


def test_the_seeds_that_are_asked_for_do_settle_it() -> None:
    rng = np.random.default_rng(9)
    first = 0.02 * rng.standard_normal((3, 1)) + 0.05 * rng.standard_normal((3, 800))
    first -= first.mean()  # as good
    asked = judge(first, 1.0, rng)
    assert asked.more_seeds
    settled = 0
    for _ in range(20):
        more = 0.02 * rng.standard_normal((3 + asked.more_seeds, 1))
        d = more - more.mean() + 0.05 * rng.standard_normal((len(more), 800))
        settled += judge(d, 1.0, rng, resamples=500).word != "undecided"
    assert settled >= 10


def grown(rng: np.random.Generator, by_seed: float, by_example: float, rest: float, mean: float) -> Grow:
    """Differences (S, N), of spreads in points, that keep what they were when seeds and examples are added."""
    key = int(rng.integers(2**31))

    def differences(seeds: int, examples: int) -> np.ndarray:
        rows = by_seed * np.random.default_rng([key, 1]).standard_normal((seeds, 1))
        columns = by_example * np.random.default_rng([key, 2]).standard_normal((1, examples))
        own = [np.random.default_rng([key, 3, s]).standard_normal(examples) for s in range(seeds)]
        return (mean + rows + columns + rest * np.stack(own)) / 100

    return differences


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "examples", "by_seed", "by_example", "rest", "means", "margin"),
    [
        (3, 150, 1.1, 14, 18, 2, 1.5),
        (4, 120, 2.2, 12, 16, 3, 2),
        (6, 150, 0.9, 17, 15, 3, 2),
        (2, 200, 1.6, 12, 14, 3, 2),
    ],
)
def test_the_advice_followed_settles_it_in_the_share_that_it_says(
    seeds: int, examples: int, by_seed: float, by_example: float, rest: float, means: float, margin: float
) -> None:
    """The same trainings and examples, with as many more as the advice asks for, or a quarter of them: the control."""
    rng, said, settled, by_less = np.random.default_rng(23), [], [], []
    for _ in range(250):
        of = grown(rng, by_seed, by_example, rest, means * rng.standard_normal())
        asked = judge(of(seeds, examples), margin, rng, resamples=300)
        more, wider = asked.more_seeds or 0, asked.more_examples or 0
        if asked.word != "undecided" or not more + wider or (seeds + more) * (examples + wider) > 100_000:
            continue
        said.append(asked.settles)
        settled.append(judge(of(seeds + more, examples + wider), margin, rng, resamples=300).word != "undecided")
        less = of(seeds + more // 4, examples + wider // 4)
        by_less.append(judge(less, margin, rng, resamples=300).word != "undecided")
        if len(said) == 50:
            break
    assert len(said) >= 15
    assert np.mean(settled) >= np.mean(said) - 0.15
    assert np.mean(by_less) < np.mean(settled)


@pytest.mark.parametrize(("seeds", "examples"), [(1, 50), (2, 400), (4, 50), (5, 400), (9, 400)])
def test_a_future_without_more_seeds_or_examples_is_the_present(seeds: int, examples: int) -> None:
    rng = np.random.default_rng(5)
    d = simulated(rng, seeds, examples, -0.01, luck=0.02)
    middle, half = Futures.after(100 * d, 1.0).intervals(0, 0)
    now = interval(d, rng)
    np.testing.assert_allclose(middle, 100 * d.mean(), atol=1e-9)
    assert np.ptp(half) < 1e-9
    assert half[0] == pytest.approx(50 * (now.high - now.low), rel=0.15)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("seeds", "fixed"), [(1, False), (1, True), (2, False), (5, False)])
@pytest.mark.parametrize("score", [-1.0, 0.0, 0.5])
def test_one_test_example_is_judged_and_settles_nothing(seeds: int, fixed: bool, score: float) -> None:
    found = judge(np.full((seeds, 1), score), 1.0, np.random.default_rng(0), fixed=fixed)
    assert found.word == "undecided"
    assert found.difference.open
    assert np.isfinite(Futures.after(np.full((seeds, 1), 100 * score), 1.0).intervals(0, 0)).all()


def test_advice_that_needs_seeds_and_examples_says_both() -> None:
    """The examples alone would not settle it, since the sum assumes the seeds."""
    rng = np.random.default_rng(2)
    asked = judge(grown(rng, 1.5, 14, 18, -0.2)(3, 150), 1.5, rng)
    assert asked.more_seeds
    assert asked.more_examples
    assert re.search(
        r"about \d+ more seeds and [\d,]+ more test examples together would settle it in about \d+% of cases$",
        asked.sentence(),
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_any_scores_give_an_ordered_interval_and_finite_parts(seeds: int, examples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = rng.integers(-1, 2, size=(seeds, examples)).astype(float)
    found = interval(d, rng, resamples=50)
    assert found.low <= found.mean <= found.high
    assert np.isfinite([found.low, found.high]).all()
    parts = variance_components(d)
    assert min(parts.between_seeds, parts.between_examples, parts.rest) >= 0


def test_swapping_the_methods_turns_the_interval_round() -> None:
    d = simulated(np.random.default_rng(1), 3, 300, -0.03)
    one = interval(d, np.random.default_rng(2))
    other = interval(-d, np.random.default_rng(2))
    assert other.low == pytest.approx(-one.high, abs=2e-3)
    assert other.mean == pytest.approx(-one.mean)


def test_components_find_what_was_put_in() -> None:
    rng = np.random.default_rng(4)
    d = 2 * rng.standard_normal((60, 1)) + 3 * rng.standard_normal((1, 500)) + rng.standard_normal((60, 500))
    found = variance_components(d)
    assert found.between_seeds == pytest.approx(4, rel=0.5)
    assert found.between_examples == pytest.approx(9, rel=0.2)
    assert found.rest == pytest.approx(1, rel=0.05)


def test_one_seed_has_no_variance_but_that_of_its_examples() -> None:
    d = np.random.default_rng(3).standard_normal((1, 40))
    parts = variance_components(d)
    assert (parts.between_seeds, parts.rest) == (0.0, 0.0)
    assert parts.between_examples == pytest.approx(d.var(ddof=1))


@pytest.mark.parametrize("more", [0, 1, 5, MOST_RESAMPLED + 7])
def test_many_examples_are_resampled_in_groups_of_neighbours(more: int) -> None:
    d = np.random.default_rng(3).standard_normal((2, MOST_RESAMPLED + more))
    grouped = group_columns(d)
    size = 1 if not more else 2 if more < MOST_RESAMPLED else 3
    assert grouped.shape == (2, d.shape[1] // size)
    np.testing.assert_allclose(grouped[:, 1], d[:, size : 2 * size].mean(1))


def test_mcnemar_counts_the_disagreements_and_is_exact() -> None:
    first = np.array([True] * 9 + [False] + [True] * 50)
    second = np.array([False] * 9 + [True] + [True] * 50)
    wins, losses, p = mcnemar(first, second)
    assert (wins, losses) == (9, 1)
    assert p == pytest.approx(2 * 11 / 1024)
    assert sign_test(0, 0) == 1.0
    assert sign_test(5000, 5000) == pytest.approx(1.0)


@pytest.mark.parametrize(("wins", "losses"), [(9, 1), (0, 1), (3, 30), (20, 20), (700, 651)])
def test_the_sign_test_is_scipys_binomial_test(wins: int, losses: int) -> None:
    assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-12)


@pytest.mark.parametrize(("times", "trials"), [(0, 5), (5, 5), (1, 5), (37, 400)])
def test_a_rate_has_the_exact_interval_of_scipy(times: int, trials: int) -> None:
    expected = stats.binomtest(times, trials).proportion_ci(0.95, method="exact")
    found = rate(times, trials)
    assert (found.low / 100, found.high / 100) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("examples", [6, 80])
def test_flipped_signs_are_scipys_permutation_test(examples: int) -> None:
    d = np.random.default_rng(examples).normal(0.2, 1, examples)
    expected = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0).pvalue
    assert sign_flips(d, np.random.default_rng(0), 20_000) == pytest.approx(expected, abs=0.015)


def test_flipped_signs_are_mcnemars_test_for_one_seed() -> None:
    d = np.array([1.0] * 12 + [-1.0] * 3 + [0.0] * 100)
    assert sign_flips(d, np.random.default_rng(0), 20_000) == pytest.approx(sign_test(12, 3), abs=0.01)
