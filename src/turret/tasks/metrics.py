"""Metrics of answers, from plain lists.

- accuracy, precision, recall and F1 are fractions; a class that is neither true nor predicted counts 0 in macro F1
- ROUGE-1, ROUGE-2 and ROUGE-L are F-measures as fractions, averaged over examples, of the tokens of `RougeTokens`
- BLEU is sacrebleu's corpus score, 0 to 100
- perplexity is `exp(mean loss per target token)`
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING
from unicodedata import category, normalize

import numpy as np

from turret.tasks.shapes import MetricValue

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

ROUGE = ("rouge1", "rouge2", "rougeL")
_LARGEST_EXPONENT = 700.0  # exp of more overflows, and JSON has no infinity

_LETTERS = ("L", "M", "Nd", "Nl")  # categories of Unicode: letters, the marks on them, digits, and numerals like 〇
# Scripts without blanks between words: Thai and Lao, Burmese, Khmer, Chinese and Japanese.
_SINGLE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_SINGLE}][^\w\s]*|(?:[^\W\d{_SINGLE}][^\w\s]*|\d)+")  # among letters, [^\w\s] is a mark

ClassNumbers = Sequence[int] | Sequence[Sequence[int]]  # one class for each text, or a row of ones and zeros


def one_class(given: ClassNumbers, true: ClassNumbers, labels: Sequence[str], loss: float) -> dict[str, MetricValue]:
    """Metrics of one class for each text. given, true: class numbers."""
    right = sum(g == t for g, t in zip(given, true, strict=True))
    report = _report(true, given, labels)
    return {
        "accuracy": right / len(true) if true else 0.0,
        "macro_f1": _macro(report),
        "loss": loss,
        "per_class": report,
    }


def many_classes(
    given: Sequence[Sequence[int]], true: Sequence[Sequence[int]], labels: Sequence[str], loss: float
) -> dict[str, MetricValue]:
    """Metrics of any number of classes for each text. Accuracy counts texts whose classes are all right.

    given, true: a row of ones and zeros for each text.
    """
    hits = sum(g & t for gs, ts in zip(given, true, strict=True) for g, t in zip(gs, ts, strict=True))
    total = sum(map(sum, given)) + sum(map(sum, true))
    found = one_class(given, true, labels, loss)
    return {"accuracy": found["accuracy"], "micro_f1": 2 * hits / total if total else 0.0, **found}


def _report(true: ClassNumbers, given: ClassNumbers, labels: Sequence[str]) -> dict[str, dict[str, float | int]]:
    """Precision, recall and F1 of each class, and how often it is true. scikit-learn would take 100 MB of a process."""
    if not true:
        return {}
    hits, answers, support = Counter[int](), Counter[int](), Counter[int]()
    for given_row, true_row in zip(map(_numbers, given), map(_numbers, true), strict=True):
        hits.update(given_row & true_row)
        answers.update(given_row)
        support.update(true_row)
    return {
        label: precision_and_recall(hits[each], answers[each], support[each]) | {"support": support[each]}
        for each, label in enumerate(labels)
    }


def precision_and_recall(hits: int, given: int, true: int) -> dict[str, float]:
    """Precision, recall and F1; 0 where there is nothing, as scikit-learn and seqeval."""
    return {
        "precision": hits / given if given else 0.0,
        "recall": hits / true if true else 0.0,
        "f1": 2 * hits / (given + true) if given + true else 0.0,
    }


def _numbers(classes: int | Sequence[int]) -> set[int]:
    """The numbers of a text's classes."""
    return {classes} if isinstance(classes, int) else {number for number, each in enumerate(classes) if each}


def _macro(report: dict[str, dict[str, float | int]]) -> float:
    return sum(row["f1"] for row in report.values()) / len(report) if report else 0.0


def confusion(given: Sequence[str], true: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """How often each class (row) was answered with each class (column)."""
    place = {label: number for number, label in enumerate(labels)}
    counts = [[0] * len(labels) for _ in labels]
    for answered, right in zip(given, true, strict=True):
        counts[place[right]][place[answered]] += 1
    return counts


def texts(given: Sequence[str], references: Sequence[tuple[str, ...]], mean_loss: float | None) -> dict[str, float]:
    """Metrics of generated texts. Loss and perplexity if a mean loss is given.

    With several references, ROUGE is that of the nearest one, and BLEU counts an n-gram that occurs in any of them,
    with the length of the nearest one. Source: Lin, 2004 (ROUGE); Papineni et al., 2002 (BLEU).

    Args:
        references: one or more for each text.
    """
    from sacrebleu.metrics.bleu import BLEU

    scorer = _scorer(*ROUGE)
    scores = [scorer.score_multi(list(each), text) for text, each in zip(given, references, strict=True)]
    values = {name: sum(s[name].fmeasure for s in scores) / len(scores) if scores else 0.0 for name in ROUGE}
    most = max((len(each) for each in references), default=0)
    streams = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    values["bleu"] = float(BLEU().corpus_score(list(given), streams).score) if given else 0.0
    if mean_loss is not None:
        values |= {"loss": float(mean_loss), "perplexity": perplexity(mean_loss)}
    return values


def numbers(given: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """Mean absolute error, root of the mean squared error, and the correlations of Pearson and Spearman.

    A correlation with numbers that are all equal is 0. Spearman's is Pearson's of the ranks; equal numbers share one.
    """
    count = max(1, len(true))
    errors = [g - t for g, t in zip(given, true, strict=True)]
    return {
        "mae": math.fsum(map(abs, errors)) / count,
        "rmse": math.sqrt(math.fsum(each * each for each in errors) / count),
        "pearson": pearson(given, true),
        "spearman": pearson(ranks(given), ranks(true)),
    }


def pearson(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's correlation; 0 if either does not vary."""
    count = max(1, len(one))
    a, b = ([each - math.fsum(values) / count for each in values] for values in (one, other))
    norm = math.sqrt(math.fsum(each * each for each in a)) * math.sqrt(math.fsum(each * each for each in b))
    return max(-1.0, min(1.0, math.fsum(x * y for x, y in zip(a, b, strict=True)) / norm)) if norm else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal values have the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place].tolist()


def quadratic_kappa(given: Sequence[int], true: Sequence[int], levels: int) -> float:
    """Cohen's kappa with squared weights of ordered levels, numbered from 0: 1 is perfect, 0 is chance.

    1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij with w_ij = (i - j)^2; E is what independent answers would give.
    Source: Cohen 1968, Weighted kappa.
    """
    seen = sum((g - t) ** 2 for g, t in zip(given, true, strict=True))
    a, b = Counter(given), Counter(true)
    chance = sum(a[i] * b[j] * (i - j) ** 2 for i in range(levels) for j in range(levels)) / max(1, len(true))
    return 1 - seen / chance if chance else 0.0


def rankings(given: Sequence[float], true: Sequence[float], queries: Sequence[int], most: int = 10) -> dict[str, float]:
    """MRR and nDCG at `most`: means over the queries with a passage that is relevant, 0 if there is none.

    Equal scores keep the order of the rows. nDCG has the gain `true` and the discount log2(1 + rank).
    Source: Jarvelin and Kekalainen 2002, Cumulated gain-based evaluation of IR techniques.

    Args:
        given, true: the relevance of each row, as answered and as it is.
        queries: the number of each row's query.
    """
    rows: dict[int, list[int]] = {}
    for place, query in enumerate(queries):
        rows.setdefault(query, []).append(place)

    def gain(order: Sequence[int]) -> float:
        return sum(true[place] / math.log2(rank + 1) for rank, place in enumerate(order[:most], 1))

    reciprocal, discounted = list[float](), list[float]()
    for places in rows.values():
        if not any(true[place] > 0 for place in places):
            continue
        order = sorted(places, key=lambda place: -given[place])
        first = next(rank for rank, place in enumerate(order, 1) if true[place] > 0)
        reciprocal.append(1 / first if first <= most else 0.0)
        discounted.append(gain(order) / gain(sorted(places, key=lambda place: -true[place])))
    count = max(1, len(reciprocal))
    return {"mrr": math.fsum(reciprocal) / count, "ndcg": math.fsum(discounted) / count}


def rouge_l(given: str, reference: str) -> float:
    """ROUGE-L of one text, as a fraction."""
    return float(_scorer("rougeL").score(reference, given)["rougeL"].fmeasure)


@cache
def _scorer(*names: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(names, tokenizer=RougeTokens())


class RougeTokens:
    """The tokens of ROUGE, a `Tokenizer` of rouge_score.

    Words in ASCII are those of its `DefaultTokenizer`, with the Porter stemmer, which is made for English. Words with
    other letters are kept whole and are not stemmed, without regard to case and to how Unicode encodes a letter
    (NFKC). Scripts without blanks between words, such as Chinese, give a token for each letter with its marks.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        letters = "".join(each if category(each).startswith(_LETTERS) else " " for each in text)
        words = _TOKEN.findall(normalize("NFKC", letters).casefold())
        return [token for word in words for token in (self._english.tokenize(word) if word.isascii() else [word])]


def perplexity(mean_loss: float) -> float:
    """`exp(mean_loss)`, limited to a finite number."""
    return math.exp(min(float(mean_loss), _LARGEST_EXPONENT))
