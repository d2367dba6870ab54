"""Metrics of answers, from plain lists.

- accuracy, precision, recall and F1 are fractions; a class that is neither true nor predicted counts 0 in macro F1
- ROUGE-1, ROUGE-2 and ROUGE-L are F-measures as fractions, with the Porter stemmer, averaged over examples
- BLEU is sacrebleu's corpus score, 0 to 100
- perplexity is `exp(mean loss per target token)`
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from turret.json_types import JsonObject

ROUGE = ("rouge1", "rouge2", "rougeL")
_LARGEST_EXPONENT = 700.0  # exp of more overflows, and JSON has no infinity

ClassNumbers = Sequence[int] | Sequence[Sequence[int]]  # one class for each text, or a row of ones and zeros


def one_class(given: Sequence[int], true: Sequence[int], labels: Sequence[str], loss: float) -> JsonObject:
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
) -> JsonObject:
    """Metrics of any number of classes for each text. Accuracy counts texts whose classes are all right.

    given, true: a row of ones and zeros for each text.
    """
    right = sum(list(g) == list(t) for g, t in zip(given, true, strict=True))
    hits = sum(g & t for gs, ts in zip(given, true, strict=True) for g, t in zip(gs, ts, strict=True))
    total = sum(map(sum, given)) + sum(map(sum, true))
    report = _report(true, given, labels)
    return {
        "accuracy": right / len(true) if true else 0.0,
        "micro_f1": 2 * hits / total if total else 0.0,
        "macro_f1": _macro(report),
        "loss": loss,
        "per_class": report,
    }


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
        label: {
            "precision": hits[each] / answers[each] if answers[each] else 0.0,
            "recall": hits[each] / support[each] if support[each] else 0.0,
            "f1": 2 * hits[each] / (answers[each] + support[each]) if answers[each] + support[each] else 0.0,
            "support": support[each],
        }
        for each, label in enumerate(labels)
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
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score_multi(list(each), text) for text, each in zip(given, references, strict=True)]
    values = {name: sum(s[name].fmeasure for s in scores) / len(scores) if scores else 0.0 for name in ROUGE}
    most = max((len(each) for each in references), default=0)
    streams = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    values["bleu"] = float(BLEU().corpus_score(list(given), streams).score) if given else 0.0
    if mean_loss is not None:
        values |= {"loss": float(mean_loss), "perplexity": perplexity(mean_loss)}
    return values


def rouge_l(given: str, reference: str) -> float:
    """ROUGE-L of one text, as a fraction."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, given)["rougeL"].fmeasure)


def perplexity(mean_loss: float) -> float:
    """`exp(mean_loss)`, limited to a finite number."""
    return math.exp(min(float(mean_loss), _LARGEST_EXPONENT))
