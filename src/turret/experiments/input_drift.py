"""Whether the texts that arrive are like those that a promise was chosen on: a sequential two-sample test by betting.

Axes: N references, D numbers of an embedding, t pairs so far.

The t-th live text y_t is paired with a reference x_t that no pair had before. A score g, learnt from the pairs before,
bets that it tells them apart, and a bettor stakes a share lambda of the wealth:

    h_t = sigmoid(g(y_t)) - sigmoid(g(x_t))                        in (-1, 1); g from the pairs 1 ... t-1
    K_t = K_(t-1) (1 + lambda_t h_t),   K_0 = 1
    lambda_t = sum h / (PRIOR + sum h^2),  within [0, MOST]        over 1 ... t-1: the approximate growth-rate bet

If live texts and references are independent draws of one distribution, x_t and y_t could be exchanged, whatever g is.
So E[h_t | past] = 0, K is a nonnegative martingale, and by Ville's inequality K reaches 1 / level in at most a share
`level` of the streams, however often one looks. Once the references are used up, round k + 1 begins with new live texts
and K = 1. Round k has the level

    level / (k (k + 1)),    which sum to `level`

so over all rounds false warnings stay below `level`, though all rounds pair the references in one order.

No text counts twice. Both sides have each text where it first occurs among draws with all repeats, so on both sides the
frequent texts tend to come first. References in another order would differ from live texts at each t, and a score would
learn that. With repeats the pairs are exchangeable no more, given those before: a text that one side had can still come
on the other. The score takes it for one of the side that had it, so such bets tend to lose. That this keeps the level
is simulated, not proved.

The score is a logistic regression with a ridge on standardized
embeddings, by a few steps of Nesterov's gradient method from where it was. g is divided by its root mean square on the
pairs before, so that a score that knows little yet still bets enough to gain from what it knows.

Sources: Podkopaev & Ramdas, "Sequential predictive two-sample and independence testing", 2023; Shekhar & Ramdas,
"Nonparametric two-sample testing by betting", 2023; the bet: Waudby-Smith & Ramdas, "Estimating means of bounded random
variables by betting", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from turret.errors import Corrupt
from turret.statistics import EProcess, Floats, capped_e_value

MOST_REFERENCES, FEWEST_REFERENCES = 512, 30
MOST_TOKENS = 256  # that are read of a text
EQUAL = 0.9995  # cosine of two embeddings of one text, whose last bits depend on the batch
PRIOR, MOST = 0.25, 0.95  # of the bet
RIDGE, STEPS, MOMENTUM = 100.0, 3, 0.7  # of the score
EACH, THEN = 64, 8  # the score learns from each of so many pairs, then from every eighth


# --- stored form ------------------------------------------------------------------------------------------------------


def pack_vectors(vectors: Sequence[Sequence[float]] | Floats) -> list[bytes]:
    """Each vector as little-endian float16. Raises ValueError for a number that is not finite there."""
    with np.errstate(over="ignore"):
        rows = np.asarray(vectors, dtype="<f2")
    if not np.isfinite(rows).all():
        raise ValueError("an embedding has a number that is not finite in float16")
    return [row.tobytes() for row in rows]


def unpack_vectors(rows: Sequence[bytes], size: int) -> Floats:
    """The vectors of `pack_vectors`: (N, D).

    Raises Corrupt for one of another length, or with a number that is not finite.

    Args:
        size: D.
    """
    if any(len(row) != 2 * size for row in rows):
        raise Corrupt(f"an embedding of a promise has not {size} numbers: make the promise again")
    found = np.frombuffer(b"".join(rows), dtype="<f2").astype(np.float64).reshape(len(rows), size)
    if not np.isfinite(found).all():
        raise Corrupt("an embedding of a promise has a number that is not finite: make the promise again")
    return found


def reference_texts(drawn: Sequence[str], most: int = MOST_REFERENCES, seed: int = 0) -> list[str]:
    """At most so many different texts, as they first occur among all that were drawn, in an order by the seed.

    Args:
        drawn: with all repeats, so that a frequent text tends to come early, as it does among live texts.
    """
    order = np.random.default_rng(seed).permutation(len(drawn))
    return list(dict.fromkeys(drawn[place] for place in order))[:most]


def distinct_vectors(vectors: Floats, most: int = MOST_REFERENCES) -> Floats:
    """At most so many of the vectors, in their order, and none that equals an earlier one: (N, D)."""
    kept = np.empty((0, vectors.shape[1]))
    for row in vectors:
        if len(kept) < most and not _has(kept, row):
            kept = np.vstack([kept, row])
    return kept


def _has(known: Floats, row: Floats) -> bool:
    """Whether one of the vectors is that of the same text. known: (N, D), row: (D,)."""
    if not len(known):
        return False
    lengths = np.linalg.norm(known, axis=1) * np.linalg.norm(row)
    return bool((known @ row >= EQUAL * lengths).any())


# --- the test ---------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """g: tells live embeddings from references. It learns from pairs."""

    rows: Floats  # (2N, D), of which the first 2 `pairs` are learnt: a live one and its reference, in turns
    pairs: int = 0
    weights: Floats = field(init=False)  # (D,)

    def __post_init__(self) -> None:
        size = self.rows.shape[1]
        self.weights, self._mean, self._spread = np.zeros(size), np.zeros(size), np.ones(size)
        self._sum, self._squares = np.zeros(size), np.zeros(size)
        self._scale = 1.0

    def of(self, row: Floats) -> float:
        """sigmoid(g(row)); 1/2 before the first pair."""
        g = float(((row - self._mean) / self._spread) @ self.weights) / self._scale
        return 1 / (1 + math.exp(-min(max(g, -30.0), 30.0)))

    def learn(self, live: Floats, reference: Floats) -> None:
        """Learn from one more pair. Both: (D,)."""
        self.rows[2 * self.pairs], self.rows[2 * self.pairs + 1] = live, reference
        self.pairs += 1
        self._sum += live + reference
        self._squares += live * live + reference * reference
        if self.pairs <= EACH or self.pairs % THEN == 0:
            self._fit()

    def _fit(self) -> None:
        """A few steps towards min_w  sum log(1 + exp(-s z.w)) + RIDGE |w|^2 / 2, with z of a mean length of 1."""
        n = 2 * self.pairs
        self._mean = self._sum / n
        variance = np.maximum(self._squares / n - self._mean**2, 0) + 1e-12
        self._spread = np.sqrt(variance * self.rows.shape[1])
        z = (self.rows[:n] - self._mean) / self._spread  # (n, D)
        is_live = np.tile([1.0, 0.0], self.pairs)
        step = 1 / (n / 8 + RIDGE)
        at = old = self.weights
        for _ in range(STEPS):
            p = 1 / (1 + np.exp(-np.clip(z @ at, -30, 30)))
            new = at - step * (z.T @ (p - is_live) + RIDGE * at)
            at, old = new + MOMENTUM * (new - old), new
        self.weights = old
        self._scale = max(float(np.sqrt(np.mean((z @ old) ** 2))), 1e-12)


class InputTest:
    """One round of the test.

    Args:
        references: (N, D), none twice, in the order in which they are paired: that of first occurrence.
    """

    def __init__(self, references: Floats) -> None:
        self._references = references
        self._score = Score(np.empty((2 * len(references), references.shape[1])))
        self._sum = self._squares = 0.0  # of the payoffs
        self.wealth = EProcess.of(1)

    @property
    def pairs(self) -> int:
        """Live texts so far."""
        return self._score.pairs

    @property
    def peak(self) -> float:
        """The largest e-value so far that the texts are not alike."""
        return capped_e_value(self.wealth.peak)

    @property
    def over(self) -> bool:
        """Whether the references are used up."""
        return self.pairs == len(self._references)

    def see(self, live: Floats) -> None:
        """Bet on more live texts, in the order in which they came, until the references are used up. live: (M, D).

        A text that was seen already is left out: the references have none twice.
        """
        for row in live:
            if self.over:
                return
            if not _has(self._score.rows[: 2 * self.pairs : 2], row):
                self._bet(row, self._references[self.pairs])

    def _bet(self, live: Floats, reference: Floats) -> None:
        payoff = self._score.of(live) - self._score.of(reference)
        stake = min(max(self._sum / (PRIOR + self._squares), 0.0), MOST)
        self.wealth = self.wealth.through(np.log1p([[stake * payoff]]))
        self._sum += payoff
        self._squares += payoff * payoff
        self._score.learn(live, reference)


def needed_e_value(level: float, number: int) -> float:
    """The e-value that warns in a round. number: of the round, from 1."""
    return number * (number + 1) / level
