"""Choose a threshold that bounds the errors of a classifier's answers, and watch that bound on the outcomes that come.

Axes: N labelled examples, m of them decided. Every function is pure.

**Choosing** (Learn then Test; Angelopoulos, Bates, Candes, Jordan & Lei, "Learn then Test: calibrating predictive
algorithms to achieve risk control", 2021). An answer is decided if its probability is at least the threshold, and a
person decides the others. The thresholds are tested from the strictest to the loosest, and the loosest one that passes
is chosen. With m examples decided of which k are wrong, the p-value of "the error among decided is above the bound" is
exact:

    p = P(Binomial(m, bound) <= k)        that of Clopper and Pearson, 1934

The number m of decided examples is fixed before each test, and the threshold is the m-th highest probability. Given the
next one, the m examples above are independent and each is wrong with the error among decided. So p is valid although
the threshold depends on the probabilities. In a fixed sequence one may go on as long as every test passes, each at the
whole level; so the chance that any passed threshold breaks the bound is at most the level. One unlucky example at the
strict end would stop the sequence, so with enough examples it starts anew at a second place. The two share the level,
and a half that was not lost is carried on (the fallback procedure; Wiens, "A fixed sequence Bonferroni procedure for
testing multiple endpoints", 2003).

The share of a label's examples that are decided as something else never rises with the threshold. So the loosest
threshold whose number of misses still passes is valid without a sequence.

**Watching.** The n-th outcome is y = 1 if the decided answer was wrong. While the error is within the bound b, each
factor is not expected to exceed 1 (`guarding.log_over_bound`), and neither is a mean of products of them:

    E_n = mean over q, s of  prod_{s < i <= n}  (q / b)^y_i ((1 - q) / (1 - b))^(1 - y_i)        q > b

The products start at different outcomes s, so that a long time in which the promise held does not hide its end. By
Ville's inequality E ever reaches 1 / level in at most a share `level` of promises that hold, however often one looks.

**Missing outcomes.** If a share h of the decided answers hides right ones, the error among those with an outcome may be
b / (1 - h). The promise is broken only if the evidence against that larger bound decides too. If instead hidden answers
could all be wrong without it, nobody can know whether the promise holds (Manski, "Partial identification of probability
distributions", 2003).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from turret.amounts import percentage
from turret.errors import DataError, quote, quote_all
from turret.experiments.evidence import HIDDEN
from turret.experiments.guarding import ODDS, log_over_bound
from turret.json_types import JsonObject
from turret.statistics import EProcess, Floats, capped_e_value, smallest

Kind = Literal["error", "misses", "precision"]
Bools = NDArray[np.bool_]

# --- what is promised -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """At most a share `error` of what `kind` counts is wrong, with this confidence.

    Args:
        kind: `error`: of the decided answers. `precision`: of those that answer `label`. `misses`: of the texts whose
            right label is `label`.
    """

    kind: Kind
    label: str | None
    error: float
    confidence: float

    @classmethod
    def parse(cls, metric: str, error: float, confidence: float, labels: Sequence[str]) -> Bound:
        """Read `error`, `misses:LABEL` or `precision:LABEL`. Raises DataError.

        Args:
            labels: of the version.
        """
        if not 0 < error <= 0.5:
            raise DataError(f"an error of {error!r}: expected a share above 0 and at most 50%, such as 2%")
        if not 0.5 <= confidence < 1:
            raise DataError(f"a confidence of {confidence!r}: expected at least 50% and less than 100%, such as 95%")
        kind, _, label = metric.partition(":")
        if kind == "error" and not label:
            return cls("error", None, error, confidence)
        if kind not in ("misses", "precision") or not label:
            raise DataError(f"metric {quote(metric, 60)}: expected error, misses:LABEL or precision:LABEL")
        if label not in labels:
            raise DataError(
                f"metric {quote(metric, 60)}: no label {quote(label, 40)}, expected one of {quote_all(labels)}"
            )
        return cls("misses" if kind == "misses" else "precision", label, error, confidence)

    @property
    def metric(self) -> str:
        return self.kind if self.label is None else f"{self.kind}:{self.label}"

    @property
    def level(self) -> float:
        """The share of promises that may fail although all is as assumed."""
        return 1 - self.confidence

    def counts(self, given: str, right: str | None, *, decided: bool) -> bool:
        """Whether an answer is one of those that the bound is about. right: None if it is not known."""
        if self.kind == "misses":
            return right is None or right == self.label
        return decided and (self.kind == "error" or given == self.label)


# --- choosing ---------------------------------------------------------------------------------------------------------

ALLOWED = (0, 3)  # wrong examples that the first test bears, and the test where the sequence starts anew
FEWEST = 20  # decided examples, to guess from how many would be enough
MOST_NEEDED = 10_000_000  # examples, to guess


@dataclass(frozen=True)
class Choice:
    """The threshold that some examples carry, and what it costs."""

    threshold: float | None  # None: none passes
    examples: int  # all of them
    counted: int  # of those, how many the bound is about at this threshold
    wrong: int  # of those
    decided: int  # of all examples
    needed: int | None = None  # if none passes: about so many examples would carry it; None: no number would

    @property
    def share(self) -> float:
        """Of the examples that are decided."""
        return self.decided / self.examples if self.examples else 0.0


def choose_threshold(bound: Bound, given: Sequence[str], right: Sequence[str], probability: Floats) -> Choice:
    """The loosest threshold that keeps the bound, on examples that nothing was chosen by.

    Args:
        given, right: the answered and the right label of each example, (N,).
        probability: of the answered label, (N,).
    """
    wrong = np.array([a != b for a, b in zip(given, right, strict=True)], dtype=bool)
    if bound.kind == "misses":
        mine = np.array([each == bound.label for each in right], dtype=bool)
        threshold, needed = _for_misses(probability, mine, wrong, bound)
    else:
        mine = np.array([bound.label in (None, each) for each in given], dtype=bool)
        threshold, needed = _for_errors(probability[mine], wrong[mine], bound)
    decided = probability >= (math.inf if threshold is None else threshold)
    counted = mine if bound.kind == "misses" else mine & decided
    bad = int((counted & wrong & decided).sum())
    if threshold is None and needed is not None:
        needed = min(math.ceil(needed * len(given) / max(int(mine.sum()), 1)), MOST_NEEDED)
    return Choice(threshold, len(given), int(counted.sum()), bad, int(decided.sum()), needed)


def _for_errors(probability: Floats, wrong: Bools, bound: Bound) -> tuple[float | None, int | None]:
    """The threshold for the error among decided; or None, and how many examples would be enough."""
    order = np.argsort(-probability, kind="stable")
    ranked, k = probability[order], np.cumsum(wrong[order], dtype=np.int64)
    m = count_decidable(ranked, k, bound.error, bound.level)
    if m == 0:
        return None, _enough(k, bound)
    return (0.0 if m == len(ranked) else float(ranked[m - 1])), None


def count_decidable(ranked: Floats, k: NDArray[np.int64], error: float, level: float) -> int:
    """How many of the most probable answers can be decided; 0 if none.

    Args:
        ranked: falling probabilities, (N,).
        k: how many of the first m are wrong, (N,).
    """
    n = len(ranked)
    begins = starting_points(n, error, level)
    if not begins:
        return 0
    p = bdtr(k, np.arange(1, n + 1), error)
    ends = np.append(ranked[:-1] > ranked[1:], True)  # equal probabilities are decided together
    own, carried, best = level / len(begins), 0.0, 0
    for first, beyond in zip(begins, [*begins[1:], n + 1], strict=True):
        carried += own
        tested = np.flatnonzero(ends[first - 1 : beyond - 1]) + first
        failed = np.flatnonzero(p[tested - 1] > carried)
        passed = tested[: failed[0]] if len(failed) else tested
        best = int(passed[-1]) if len(passed) else best
        carried = 0.0 if len(failed) else carried
    return best


def starting_points(n: int, error: float, level: float) -> list[int]:
    """Numbers of decided examples at which the sequence starts: by the number of examples alone."""
    both = [fewest_decided(allowed, error, level / len(ALLOWED)) for allowed in ALLOWED]
    if both[-1] <= n / 2:
        return both
    one = fewest_decided(ALLOWED[0], error, level)
    return [one] if one <= n else []


def fewest_decided(wrong: int, error: float, level: float) -> int:
    """The smallest number of decided examples with which so many wrong ones pass the test."""
    found = smallest(lambda decided: bdtr(wrong, decided, error) <= level, wrong, wrong + 1)
    assert found is not None, "with enough examples any error passes"
    return found


def _for_misses(probability: Floats, mine: Bools, wrong: Bools, bound: Bound) -> tuple[float | None, int | None]:
    """The threshold for the misses of a label; or None, and how many of its examples would be enough."""
    n = int(mine.sum())
    passes = np.flatnonzero(bdtr(np.arange(n + 1), n, bound.error) <= bound.level)
    if not len(passes):
        return None, fewest_decided(0, bound.error, bound.level)
    missed = np.sort(probability[mine & wrong])[::-1]
    if len(missed) <= passes[-1]:
        return 0.0, None
    above = probability[probability > missed[passes[-1]]]
    return float(above.min() if len(above) else np.nextafter(missed[passes[-1]], 2.0)), None


def _enough(k: NDArray[np.int64], bound: Bound) -> int | None:
    """About how many examples would carry the bound, if the most probable ones err as often as these."""
    found = []
    for m in sorted({*np.linspace(FEWEST, len(k), 40, dtype=int).tolist()} if len(k) >= FEWEST else ()):
        rate = k[m - 1] / m
        if rate < bound.error and (decided := _at_rate(rate, bound)) is not None:
            found.append(math.ceil(decided * len(k) / m))
    return min(found, default=None)


def _at_rate(rate: float, bound: Bound) -> int | None:
    """How many decided examples pass the test, if this share of them is wrong."""
    level = bound.level / len(ALLOWED)
    return smallest(lambda n: bdtr(math.floor(rate * n), n, bound.error) <= level, most=MOST_NEEDED)


# --- watching ---------------------------------------------------------------------------------------------------------

STARTS = np.unique(np.concatenate([[0], np.round(25 * 1.3 ** np.arange(32))])).astype(np.int64)  # s, to 85,000
AT_ONCE = 2000  # outcomes in memory
State = Literal["holds so far", "broken", "cannot be known"]


@dataclass(frozen=True)
class Watch:
    """The evidence of some outcomes against a bound. Immutable; see `after`.

    Args:
        missing_bound: the share of the answers whose missing outcome may depend on whether they are wrong.
    """

    bound: Bound
    missing_bound: float = 0.0
    outcomes: int = 0
    wrong: int = 0
    processes: tuple[EProcess, ...] = ()  # for each of `hidden`

    @property
    def hidden(self) -> tuple[float, ...]:
        """Shares of the answers that may hide right ones: 0 to the bound on missing ones."""
        return tuple(each for each in (0.0, *HIDDEN) if each <= _tested_share(self.missing_bound))

    def after(self, wrong: Bools) -> Watch:
        """The evidence with more outcomes, in the order in which they came. wrong: (N,)."""
        found = self
        for start in range(0, len(wrong), AT_ONCE):
            found = found._after(wrong[start : start + AT_ONCE])
        return found

    def _after(self, wrong: Bools) -> Watch:
        old = self.processes or (EProcess.of(len(STARTS) * len(ODDS)),) * len(self.hidden)
        begun = (self.outcomes + np.arange(len(wrong)))[:, None] >= STARTS  # (N, starts)
        new = []
        for hidden, process in zip(self.hidden, old, strict=True):
            b = self.bound.error / (1 - hidden)
            steps = np.where(wrong[:, None], log_over_bound(1, 1, b), log_over_bound(0, 1, b))  # (N, odds)
            factors = np.where(begun[:, :, None], steps[:, None, :], 0.0)  # (N, starts, odds)
            new.append(process.through(factors.reshape(len(wrong), -1)))
        outcomes, bad = self.outcomes + len(wrong), self.wrong + int(wrong.sum())
        return Watch(self.bound, self.missing_bound, outcomes, bad, tuple(new))

    @property
    def evidence(self) -> float:
        """The largest e-value so far against the promise, if missing outcomes are like the others."""
        return capped_e_value(self.processes[0].peak) if self.processes else 1.0

    @property
    def tipping(self) -> float | None:
        """The largest share of hidden answers despite which the promise is broken; None if it is not."""
        needed = -math.log(self.bound.level)
        decided = (h for h, e in zip(self.hidden, self.processes, strict=False) if e.peak >= needed)
        return max(decided, default=None)

    @property
    def since(self) -> int:
        """The outcome after which the promise was probably broken."""
        logs = np.array(self.processes[0].logs).reshape(len(STARTS), len(ODDS))
        return int(STARTS[np.unravel_index(int(logs.argmax()), logs.shape)[0]])


@dataclass(frozen=True)
class Standing:
    """What the outcomes of a promise say."""

    state: State
    why: str
    outcomes: int  # of answers that the bound is about
    wrong: int
    missing: float  # share of such answers without an outcome after its time to live
    evidence: float  # an e-value; `needed` breaks the promise
    needed: float

    def as_json(self) -> JsonObject:
        return dict(vars(self))


def promise_state(watch: Watch, *, silent: float, missing: float) -> Standing:
    """The state of a promise.

    Args:
        silent: share of the answers that have no outcome yet.
        missing: share of the answers without one, among those whose time to live is over.
    """
    assumed = _tested_share(min(silent, watch.missing_bound))
    tipping, n = watch.tipping, watch.outcomes
    error = watch.wrong / n if n else 0.0
    hidden = min(missing, watch.missing_bound)
    worst = (1 - hidden) * error + hidden
    seen = f"{watch.wrong} of {n} outcomes are wrong"
    state: State = "holds so far"
    if tipping is not None and tipping >= assumed:
        state, why = "broken", f"{seen} ({percentage(error)}), and at most {watch.bound.error:.3g} was promised"
    elif not n:
        state, why = "cannot be known", "no outcome has come yet"
    elif tipping is not None:
        state, why = "cannot be known", f"{seen}, and right answers may hide among the {silent:.0%} without an outcome"
    elif worst >= watch.bound.error and hidden > 0:
        state, why = "cannot be known", f"{missing:.0%} of the outcomes are missing, and could hide too many wrong ones"
    else:
        why = seen
    return Standing(state, why, n, watch.wrong, missing, watch.evidence, 1 / watch.bound.level)


def _tested_share(share: float) -> float:
    """The smallest share that is tested and is at least this one."""
    return min((each for each in (0.0, *HIDDEN) if each >= share - 1e-9), default=HIDDEN[-1])
