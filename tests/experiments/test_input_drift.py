"""The test that live texts are like the examples: valid under the null, by simulation, and quick to see a change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from turret.data import Labelled
from turret.errors import Corrupt
from turret.experiments.input_drift import (
    MOST_REFERENCES,
    InputTest,
    Score,
    distinct_vectors,
    needed_e_value,
    pack_vectors,
    reference_texts,
    unpack_vectors,
)
from turret.workspace.progress import silent
from turret.workspace.promising import _embed_examples, _unseen

if TYPE_CHECKING:
    from turret.train.asking import Asking

LEVEL, RUNS = 0.1, 200
LIMIT = LEVEL + 3 * (LEVEL * (1 - LEVEL) / RUNS) ** 0.5  # of the share of false warnings
Floats = NDArray[np.float64]


class Peeking(InputTest):
    """The control: its score has learnt the pair that it bets on."""

    def _bet(self, live: Floats, reference: Floats) -> None:
        self._score.learn(live, reference)
        self._score.pairs -= 1
        super()._bet(live, reference)


def draws(seed: int, count: int, shift: float = 0.0, size: int = 12) -> Floats:
    """Points around 0; shifted along the first axis. Their spreads differ from axis to axis."""
    found = np.random.default_rng(seed).normal(size=(count, size)) * np.linspace(3, 0.1, size)
    found[:, 0] += 3 * shift
    return found


def warned(test: InputTest, live: Floats, level: float = LEVEL) -> int | None:
    """How many texts were needed to warn, looking after each."""
    for row in live:
        test.see(row[None])
        if test.wealth.now >= math.log(1 / level):
            return test.pairs
    return None


def share_of_warnings(kind: type[InputTest], runs: int = RUNS, shift: float = 0.0) -> float:
    found = [warned(kind(draws(seed, 60)), draws(10_000 + seed, 60, shift)) for seed in range(runs)]
    return sum(each is not None for each in found) / runs


def test_texts_of_the_same_kind_warn_in_at_most_the_stated_share() -> None:
    assert share_of_warnings(InputTest) <= LIMIT


def test_control_a_score_that_has_seen_the_text_that_it_bets_on_warns_too_often() -> None:
    assert share_of_warnings(Peeking, 60) > 2 * LIMIT


@pytest.mark.parametrize(("shift", "median"), [(0.5, 180), (1.0, 70), (2.0, 35)])
def test_the_further_texts_have_moved_the_sooner_it_warns(shift, median) -> None:
    found = [warned(InputTest(draws(seed, 200)), draws(10_000 + seed, 200, shift), 0.05) for seed in range(15)]
    assert np.median([each or 999 for each in found]) <= median


def test_a_change_of_the_spread_alone_is_not_what_a_linear_score_sees() -> None:
    """What the test cannot see: the mean of every direction stays."""
    found = 0
    for seed in range(10):
        live = draws(10_000 + seed, 200)
        live[:, 0] *= 3
        found += warned(InputTest(draws(seed, 200)), live) is not None
    assert found <= 3


def test_a_stream_is_the_same_whether_it_comes_at_once_or_one_by_one() -> None:
    references, live = draws(0, 50), draws(1, 60, 0.3)
    once, each = InputTest(references), InputTest(references)
    once.see(live)
    for row in live:
        each.see(row[None])
    assert once.wealth.now == each.wealth.now
    assert once.over
    assert once.pairs == each.pairs == 50


def test_a_text_that_comes_again_and_again_counts_once() -> None:
    references, live = draws(0, 80), draws(1, 20)
    test = InputTest(references)
    test.see(np.vstack([live] * 4))
    assert test.pairs == 20
    assert test.wealth.peak < math.log(1 / LEVEL)


def test_wealth_is_the_product_of_the_bets() -> None:
    """A plain reference: the same payoffs, bets and products, with a score of its own."""
    references, live = draws(0, 40), draws(1, 40, 1.0)
    test = InputTest(references)
    score, wealth, payoffs = Score(np.empty((80, 12))), 1.0, list[float]()
    for y, x in zip(live, references, strict=True):
        payoff = score.of(y) - score.of(x)
        total = sum(payoffs)
        stake = min(max(total / (0.25 + sum(each * each for each in payoffs)), 0.0), 0.95)
        wealth *= 1 + stake * payoff
        payoffs.append(payoff)
        score.learn(y, x)
        test.see(y[None])
        assert test.wealth.now == pytest.approx(math.log(wealth))
    assert wealth > 1


def test_the_levels_of_all_rounds_sum_to_the_level() -> None:
    assert needed_e_value(0.05, 1) == pytest.approx(40)
    assert sum(1 / needed_e_value(0.05, each) for each in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_references_are_different_texts_and_not_too_many() -> None:
    twice = np.vstack([draws(0, 300), draws(0, 300)])
    assert len(distinct_vectors(twice)) == 300
    assert len(distinct_vectors(draws(0, 2 * MOST_REFERENCES))) == MOST_REFERENCES
    assert (distinct_vectors(twice) == draws(0, 300)).all(), "in the order in which they came"


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.integers(1, 8), st.integers(0, 5))
def test_reference_texts_are_different_ones_of_those_that_were_drawn(drawn: list[str], most: int, seed: int) -> None:
    found = reference_texts(drawn, most, seed)
    assert len(found) == len(set(found)) == min(len(set(drawn)), most)
    assert set(found) <= set(drawn)


def test_a_frequent_text_is_an_early_reference() -> None:
    drawn = [str(each) for each in range(100)] + ["frequent"] * 100
    places = [reference_texts(drawn, seed=seed).index("frequent") for seed in range(50)]
    assert np.mean(places) < 3, "its place among different texts alone would be 50 on average"


# --- texts that come again --------------------------------------------------------------------------------------------


COMMON, ROWS, MOST, STREAMS = 100, 1000, 100, 30


class Traffic:
    """Texts of which 80% are one of a few common ones, which lie apart. A text is its place among the vectors."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self.vectors = draws(seed, COMMON + 2 * ROWS)
        self.vectors[:COMMON, 0] += 6
        self.held, self.live = self._texts(COMMON), self._texts(COMMON + ROWS)

    def _texts(self, first: int) -> list[int]:
        common = self._generator.integers(COMMON, size=ROWS)
        is_common = self._generator.random(ROWS) < 0.8
        return [int(each) for each in np.where(is_common, common, np.arange(first, first + ROWS))]

    def text_embeddings(self, texts: list[str], most: int) -> Tensor:
        """As `Asking` has it."""
        return from_numpy(self.vectors[[int(each) for each in texts]])

    def warns(self, used: set[str], shift: float = 0.0) -> bool:
        """Whether live texts warn. used: the texts of training."""
        held = _unseen([Labelled(str(each), "label") for each in self.held], used, "file", "test")
        rows, notes = _embed_examples(cast("Asking", self), held, silent)
        assert notes == []
        test, live = InputTest(unpack_vectors(rows, 12)[:MOST]), self.vectors[self.live]
        live[:, 0] += 3 * shift
        test.see(live)
        assert test.over
        return bool(test.wealth.peak >= math.log(1 / LEVEL))


USED = [set[str](), {str(each) for each in range(COMMON)}]


@pytest.mark.parametrize("used", USED, ids=["of its own", "of the common ones"])
def test_the_same_kind_of_texts_with_many_repeats_warns_in_at_most_the_stated_share(used: set[str]) -> None:
    """Also if training used the common ones, so that no threshold was chosen on them."""
    assert sum(Traffic(seed).warns(used) for seed in range(STREAMS)) <= LEVEL * STREAMS


@pytest.mark.parametrize("used", USED, ids=["of its own", "of the common ones"])
def test_control_other_texts_with_many_repeats_are_noticed(used: set[str]) -> None:
    assert all(Traffic(seed).warns(used, shift=2) for seed in range(5))


def test_control_references_in_another_order_than_that_of_first_occurrence_warn_too_often() -> None:
    found = 0
    for seed in range(STREAMS):
        traffic = Traffic(seed)
        texts = reference_texts([str(each) for each in dict.fromkeys(traffic.held)], MOST)
        test = InputTest(traffic.vectors[[int(each) for each in texts]])
        test.see(traffic.vectors[traffic.live])
        found += test.wealth.peak >= math.log(1 / LEVEL)
    assert found > 2 * LEVEL * STREAMS


@given(st.lists(st.lists(st.floats(-6e4, 6e4, width=16), min_size=5, max_size=5), max_size=20))
def test_embeddings_are_read_as_they_were_written(vectors: list[list[float]]) -> None:
    rows = pack_vectors(np.array(vectors).reshape(-1, 5))
    assert [len(row) for row in rows] == [10] * len(vectors)
    assert unpack_vectors(rows, 5).tolist() == vectors


@given(st.lists(st.binary(max_size=12), max_size=5))
def test_what_is_no_embedding_is_an_error_or_finite(rows: list[bytes]) -> None:
    try:
        found = unpack_vectors(rows, 4)
    except Corrupt:
        return
    assert np.isfinite(found).all()
    assert pack_vectors(found) == [bytes(row) for row in rows]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_a_number_that_float16_has_not_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="not finite"):
        pack_vectors([[1.0, bad]])
