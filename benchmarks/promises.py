"""Claim: a promise is broken in at most the stated share, a shift is noticed, and missing outcomes fool nobody.

A logistic regression on words, and on how many words two sentences share, is trained on 700 rows of each set. It
answers the others, which stand for all texts: what is wrong at a threshold among all of them is known exactly. A
promise asks only for answers and how sure they are, so any classifier would do. Then:

- 1,000 times, 500 of these answers are drawn as held-out examples, and a promise at 95% confidence is chosen on them.
  Is more than the bound wrong among what it decides, of all texts? The naive threshold is the loosest one at which at
  most the bound was wrong in the 500.
- 1,000 times, such a promise decides, and outcomes arrive one by one. `steady`: nothing changes in 2,000. `shift`:
  after 500 outcomes, 3 times the bound is wrong, at most all. How many outcomes later does the alarm come, if it comes
  within 1,500?
- `missing`: 30% of the outcomes are missing at random, and the promise claims so (missing_bound 0).
- `selected`: after the shift the wrong answers send an outcome three times as rarely as the right ones. What is said
  after all outcomes, with the usual bound of 5% on missing ones?

    python benchmarks/promises.py --data DATA
    python benchmarks/promises.py --report

DATA is a folder with train.jsonl in imdb, skewed and multilabel (text, label or labels), pairs (premise, hypothesis,
label) and stsb (sentence1, sentence2, score).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
from defaults import SETS
from numpy.typing import NDArray

from turret.experiments.experiment import MISSING_BOUND
from turret.experiments.risk_control import Bound, Watch, choose_threshold, promise_state

NAME = "promises"
CLAIM = "a promise is broken in at most the stated share, a shift is noticed, and missing outcomes fool nobody"
BOUNDS = {"reviews": 0.1, "spam": 0.01, "emotions": 0.5, "similar": 0.2, "pairs": 0.4}
TRAINED, HELD, RUNS, STREAMS, CONFIDENCE = 700, 500, 1000, 1000, 0.95
BEFORE, AFTER, LOOK = 500, 1500, 20  # outcomes before and after the shift, and between two looks
WORSE, MISSING, RARER = 3.0, 0.3, 3.0
Bools = NDArray[np.bool_]


def main() -> None:
    options = _options()
    if not options.report:
        for name in options.sets:
            run = measured(name, options)
            record.keep(NAME, CLAIM, run)
            print(name, run["chosen"], run["watched"], flush=True)
    print(chosen_report(record.load(NAME)), watched_report(record.load(NAME)), sep="\n\n")


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train on one set, then choose and watch promises on its other rows."""
    started = time.process_time()
    given, right, probability = answers(name, options.data)
    bound = Bound.parse("error", BOUNDS[name], CONFIDENCE, ())
    generator = np.random.default_rng(0)
    chosen = choices(bound, given, right, probability, generator, options.runs)
    wrong = np.array(given) != np.array(right)
    thresholds = [each for each in chosen.pop("thresholds") if each is not None]
    watched = watching(bound, wrong, probability, thresholds, generator, options.streams) if thresholds else None
    return {
        "settings": {
            "set": name,
            "trained": TRAINED,
            "held_out": HELD,
            "runs": options.runs,
            "streams": options.streams,
            "error": bound.error,
            "confidence": CONFIDENCE,
            "before": BEFORE,
            "after": AFTER,
            "look": LOOK,
            "worse": WORSE,
            "missing": MISSING,
            "rarer": RARER,
        },
        "rows": len(given),
        "wrong": float(wrong.mean()),
        "chosen": chosen,
        "watched": watched,
        "seconds": round(time.process_time() - started, 1),
        "machine": record.machine(options.threads),
    }


def answers(name: str, data: Path) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """What a classifier of 700 rows answers to the others, what is right, and how sure it is."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rows = [(str(each["text"]), str(each["label"])) for each in SETS[name].rows(data)]
    random.Random(0).shuffle(rows)
    known = {label for _, label in rows[:TRAINED]}
    rows = [*rows[:TRAINED], *(row for row in rows[TRAINED:] if row[1] in known)]
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    last = [text.rpartition(" [SEP] ")[2] for text in texts]  # the whole text, or its second sentence
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(last[:TRAINED])
    features = hstack([words.transform(last), csr_matrix([alike(text) for text in texts])]).tocsr()
    model = LogisticRegression(C=10.0, max_iter=2000).fit(features[:TRAINED], labels[:TRAINED])
    chances = model.predict_proba(features[TRAINED:])
    given = [str(model.classes_[place]) for place in chances.argmax(1)]
    return given, labels[TRAINED:], chances.max(1)


def alike(text: str) -> list[float]:
    """How many words two sentences share, of all, of the first and of the second; zeros for one text."""
    first, second, third = text.partition(" [SEP] ")
    a, b = set(first.lower().split()), set(third.lower().split())
    if not second or not a or not b:
        return [0.0, 0.0, 0.0]
    return [3 * len(a & b) / len(each) for each in (a | b, a, b)]


def choices(
    bound: Bound,
    given: Sequence[str],
    right: Sequence[str],
    probability: NDArray[np.float64],
    generator: np.random.Generator,
    runs: int,
) -> dict[str, Any]:
    """How often a promise is broken by all texts, and how often a naive threshold is."""
    wrong = np.array(given) != np.array(right)
    order = np.argsort(-probability, kind="stable")
    ranked, cumulated = probability[order], np.cumsum(wrong[order])

    def risk(threshold: float) -> float:
        decided = int(np.searchsorted(-ranked, -threshold, side="right"))
        return float(cumulated[decided - 1] / decided) if decided else 0.0

    thresholds, broken, naive, shares = [], 0, 0, []
    for _ in range(runs):
        drawn = generator.integers(0, len(given), HELD)
        own = [given[each] for each in drawn], [right[each] for each in drawn], probability[drawn]
        found = choose_threshold(bound, *own)
        thresholds.append(found.threshold)
        shares.append(0.0 if found.threshold is None else float((probability >= found.threshold).mean()))
        broken += found.threshold is not None and risk(found.threshold) > bound.error
        naive += risk(_naive(bound, wrong[drawn], probability[drawn])) > bound.error
    fits = np.flatnonzero(cumulated / np.arange(1, len(ranked) + 1) <= bound.error)
    return {
        "broken": broken,
        "naive_broken": naive,
        "without": sum(each is None for each in thresholds),
        "decided": statistics.fmean(shares),
        "possible": float((fits[-1] + 1) / len(ranked)) if len(fits) else 0.0,
        "thresholds": thresholds,
    }


def _naive(bound: Bound, wrong: Bools, probability: NDArray[np.float64]) -> float:
    """The loosest threshold at which at most the bound was wrong."""
    order = np.argsort(-probability, kind="stable")
    fits = np.flatnonzero(np.cumsum(wrong[order]) / np.arange(1, len(order) + 1) <= bound.error)
    return float(probability[order][fits[-1]]) if len(fits) else 2.0


def watching(
    bound: Bound,
    wrong: Bools,
    probability: NDArray[np.float64],
    thresholds: Sequence[float],
    generator: np.random.Generator,
    runs: int,
) -> dict[str, Any]:
    """What the outcomes of promises say, each of another draw of held-out examples."""
    found: dict[str, Any] = {"kept": 0}
    steadily, shifted, early = 0, list[int](), 0
    said = {"missing": dict[str, int](), "selected": dict[str, int]()}
    for run in range(runs):
        decided = wrong[probability >= thresholds[run % len(thresholds)]]
        rate = float(decided.mean())
        if rate > bound.error:
            continue  # it was broken from the start, and an alarm would be right
        found["kept"] += 1
        before = generator.random(BEFORE) < rate
        steady = np.concatenate([before, generator.random(AFTER) < rate])
        shift = np.concatenate([before, generator.random(AFTER) < min(WORSE * bound.error, 1.0)])
        steadily += Watch(bound).after(steady).tipping is not None  # at any of these outcomes
        at = _alarm(bound, shift)
        early += at is not None and at <= BEFORE
        shifted += [at - BEFORE] if at is not None and at > BEFORE else []
        told = generator.random(len(steady)) >= MISSING
        _count(said["missing"], _state(bound, steady[told], 1 - told.mean(), 0.0))
        told = ~shift | (generator.random(len(shift)) < 1 / RARER)
        _count(said["selected"], _state(bound, shift[told], 1 - told.mean(), MISSING_BOUND))
    return found | {
        "false_alarms": steadily,
        "false_alarms_missing": said["missing"].get("broken", 0),
        "early": early,
        "noticed": len(shifted),
        "outcomes": shifted,
        "missing_states": said["missing"],
        "selected_states": said["selected"],
    }


def _alarm(bound: Bound, wrong: Bools) -> int | None:
    """After how many outcomes the promise is called broken, looked at every 20; None if it never is."""
    watch = Watch(bound)
    if watch.after(wrong).tipping is None:  # the evidence counts at its peak, so no look in between found it
        return None
    for start in range(0, len(wrong), LOOK):
        watch = watch.after(wrong[start : start + LOOK])
        if watch.tipping is not None:
            return start + LOOK
    raise AssertionError("the peak was not found again")


def _state(bound: Bound, wrong: Bools, missing: float, missing_bound: float) -> str:
    return promise_state(Watch(bound, missing_bound).after(wrong), silent=missing, missing=missing).state


def _count(counts: dict[str, int], state: str) -> None:
    counts[state] = counts.get(state, 0) + 1


# --- report -----------------------------------------------------------------------------------------------------------


def _newest(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return list({run["settings"]["set"]: dict(run) for run in runs}.values())


def chosen_report(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in _newest(runs):
        settings, found = run["settings"], run["chosen"]
        total = settings["runs"]
        lines.append(
            [
                settings["set"],
                f"{run['wrong']:.1%}",
                f"{settings['error']:.0%}",
                f"{found['broken'] / total:.1%}",
                f"{found['naive_broken'] / total:.1%}",
                f"{found['without'] / total:.1%}",
                f"{found['decided']:.1%}",
                f"{found['possible']:.1%}",
            ]
        )
    header = ["set", "wrong, all decided", "bound", "promises broken", "naive thresholds broken", "no promise"]
    return record.table([*header, "decided", "decided if all were known"], lines)


def watched_report(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in _newest(runs):
        found = run["watched"]
        if found is None:
            continue
        kept, late = found["kept"], found["outcomes"]
        unknown = found["selected_states"].get("cannot be known", 0)
        lines.append(
            [
                run["settings"]["set"],
                str(kept),
                f"{found['false_alarms'] / kept:.1%}",
                f"{found['false_alarms_missing'] / kept:.1%}",
                f"{(found['noticed'] + found['early']) / kept:.1%}",
                f"{statistics.median(late):.0f}, {np.quantile(late, 0.95):.0f}" if late else "",
                f"{unknown / kept:.1%}",
                f"{found['selected_states'].get('broken', 0) / kept:.1%}",
                f"{found['selected_states'].get('holds so far', 0) / kept:.1%}",
            ]
        )
    header = ["set", "promises", "false alarms", "false alarms, 30% missing", "shifts noticed"]
    more = ["outcomes needed: median, 95%", "selected: cannot be known", "selected: broken"]
    return record.table([*header, *more, "selected: holds so far"], lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--sets", nargs="+", choices=list(BOUNDS), default=list(BOUNDS))
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 2)))
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
