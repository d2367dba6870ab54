"""Each task says itself what is wrong in some answers, the worst first, and how its metrics are shown."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import small_models

from turret.compare.evaluation_page import as_html
from turret.compare.results import Details
from turret.data import Conversation, Labelled, Pair, Preferred, Scored, TextPair, Turn
from turret.tasks import TASKS, main_metric, measure_of, task_measured_by
from turret.tasks.chat import Chat
from turret.tasks.classify import Classify
from turret.tasks.generate import Generate
from turret.tasks.preference import Preference
from turret.tasks.regression import Regression
from turret.tasks.rerank import Rerank
from turret.tasks.score import Score
from turret.tasks.text_pairs import TextPairs
from turret.workspace.evaluation import write_mistakes
from turret.workspace.results import Evaluation

ENCODER, DECODER = small_models.tokenizer("bert"), small_models.tokenizer("llama")


def chances(label: str, sure: float, labels: tuple[str, ...]) -> dict[str, Any]:
    rest = (1 - sure) / (len(labels) - 1)
    return {"label": label, "probabilities": {each: sure if each == label else rest for each in labels}}


def page(task: Any, examples: Any, answers: Any, metrics: dict[str, float]) -> str:
    found = Details(tuple(task.worst(examples, answers)), task.kind, numbers=tuple(task.numbers(examples, answers)))
    data = {"source": "a.csv", "examples": len(examples)}
    return as_html(Evaluation("it@1", "sha256:a", data, metrics, 1.0, found), texts=True)


def test_of_numbers_the_largest_residual_is_first() -> None:
    task = Regression(ENCODER, mean=2, deviation=1, low=0, high=5, pairs=False)
    examples = [Scored(text, value) for text, value in (("near", 2.0), ("far", 4.5), ("right", 1.0), ("low", 3.0))]
    answers = [{"value": value} for value in (2.25, 1.0, 1.0, 1.0)]
    found = task.worst(examples, answers)
    assert [(each.row, each.text, each.right, each.given, each.error) for each in found] == [
        (1, "far", "4.5", "1", "-3.5"),
        (3, "low", "3", "1", "-2"),
        (0, "near", "2", "2.25", "+0.25"),
    ]
    assert task.numbers(examples, answers)[1] == (4.5, 1.0)
    html = page(task, examples, answers, {"nearness": 0.7, "mae": 1.4, "loss": 1.2})
    assert html.index("<p>far</p>") < html.index("<p>low</p>") < html.index("<p>near</p>")
    for words in ("The largest residuals", "-3.5", "1 - MAE / range 70.0%", "loss (× variance)", "On the dashed line"):
        assert words in html
    assert "nats" not in html


def test_of_levels_the_furthest_is_first_and_of_equal_ones_the_surest(tmp_path: Path) -> None:
    task = Score(("1", "2", "3", "4"), ENCODER)
    examples = [Labelled("by one", "2"), Labelled("surely by one", "2"), Labelled("by three", "4"), Labelled("no", "1")]
    given = (("3", 0.5), ("1", 0.9), ("1", 0.4), ("1", 0.9))
    found = task.worst(examples, [chances(*each, task.labels) for each in given])
    assert [(each.text, each.error) for each in found] == [
        ("by three", "3 levels too low"),
        ("surely by one", "1 level too low"),
        ("by one", "1 level too high"),
    ]
    details = Details(tuple(found), task.kind)
    write_mistakes(Evaluation("it@1", "sha256:a", {}, {}, 1.0, details), tmp_path / "wrong.csv")
    with (tmp_path / "wrong.csv").open(newline="") as file:
        rows = [(row["confidence"], row["error"]) for row in csv.DictReader(file)]
    assert rows == [("0.4", "3 levels too low"), ("0.9", "1 level too low"), ("0.5", "1 level too high")]


def test_of_pairs_both_texts_are_shown() -> None:
    labels = ("no", "yes")
    pairs = TextPairs(labels, ENCODER, pairs=True)
    examples = [Labelled(TextPair("it rains", "it is wet"), "yes"), Labelled(TextPair("a cat", "a dog"), "no")]
    found = pairs.worst(examples, [chances("no", 0.6, labels), chances("yes", 0.8, labels)])
    assert [(each.row, each.confidence, each.error) for each in found] == [(1, 0.8, "0.80"), (0, 0.6, "0.60")]
    assert found[1].as_json() == {
        "row": 0, "text": "it rains", "text_pair": "it is wet", "right": "yes", "given": "no", "score": 0.0,
        "confidence": 0.6, "error": "0.60",
    }  # fmt: skip
    ranks = Rerank(ENCODER, highest=2.0)
    passages = [
        Scored(TextPair("wet", "rain"), 2.0),
        Scored(TextPair("wet", "sun"), 0.0),
        Scored(TextPair("a", "b"), 0.0),
    ]
    answers = [{"value": 0.4}, {"value": 0.9}, {"value": 0.3}]
    worst = ranks.worst(passages, answers)
    assert [(each.row, each.right, each.given, each.error) for each in worst] == [
        (1, "0", "0.9", "+0.9"),
        (0, "1", "0.4", "-0.6"),
    ]
    html = page(ranks, passages, answers, {"accuracy": 1 / 3, "loss": 0.9})
    assert "The worst pairs" in html
    for name, text in (("query", "wet"), ("passage", "sun")):
        assert f"<dt>{name}</dt><dd>{text}</dd>" in html


def test_of_preferences_the_most_wrong_margin_is_first_with_both_answers() -> None:
    task = Preference(DECODER, max_tokens=64)
    examples = [Preferred((Turn("user", f"question {n}"),), f"better {n}", f"worse {n}") for n in range(4)]
    answers = [{"label": "x", "margin": margin} for margin in (-0.1, 2.0, -3.0, 0.5)]
    found = task.worst(examples, answers)
    assert [(each.row, each.right, each.given, each.error) for each in found] == [
        (2, "better 2", "worse 2", "margin -3"),
        (0, "better 0", "worse 0", "margin -0.1"),
    ]
    html = page(task, examples, answers, {"accuracy": 0.5, "margin": 0.1, "loss": 0.7})
    for words in ("question 2", "chosen", "better 2", "more likely", "worse 2", "margin -3", "wrong on 2 of 4"):
        assert words in html


def test_of_texts_the_lowest_score_is_first_with_the_reference_and_every_turn() -> None:
    writes = Generate(DECODER, "decoder")
    examples = [Pair("one", "the quick brown fox"), Pair("two", "a lazy dog"), Pair("three", "so it is")]
    answers = [{"text": text, "finish_reason": "stop"} for text in ("the quick brown cat", "rain", "so it is")]
    found = writes.worst(examples, answers)
    assert [(each.text, each.error) for each in found] == [("two", "ROUGE-L 0.00"), ("one", "ROUGE-L 0.75")]
    assert (found[0].right, found[0].given) == ("a lazy dog", "rain")
    turns = (
        Turn("user", "hello"),
        Turn("assistant", "good day"),
        Turn("user", "and now?"),
        Turn("assistant", "x " * 60),
    )
    html = page(Chat(DECODER, max_tokens=64), [Conversation(turns)], answers[1:2], {"rougeL": 0.0, "loss": 2.0})
    for name, text in (("user", "hello"), ("assistant", "good day"), ("user", "and now?"), ("answered", "rain")):
        assert f"<dt>{name}</dt><dd" in html
        assert text in html
    assert "<dt>reference</dt>" in html
    assert "messages" not in html  # turns, and no JSON


def test_several_labels_are_wrong_by_their_surest_wrong_decision() -> None:
    task = Classify(("a", "b", "c"), ENCODER, multi_label=True)
    examples = [Labelled("one", ("a",)), Labelled("two", ("b",)), Labelled("three", ())]
    answers = [
        {"label": ["a", "b"], "probabilities": {"a": 0.9, "b": 0.6, "c": 0.1}},
        {"label": [], "probabilities": {"a": 0.1, "b": 0.05, "c": 0.1}},
        {"label": [], "probabilities": {"a": 0.1, "b": 0.1, "c": 0.1}},
    ]
    assert [(each.text, round(each.confidence or 0, 6)) for each in task.worst(examples, answers)] == [
        ("two", 0.95),
        ("one", 0.6),
    ]
    assert task.certainty(answers[0]) == pytest.approx((0.2, 0.6))  # b is nearest to its threshold
    assert Classify(("a", "b"), ENCODER).certainty(chances("a", 0.7, ("a", "b"))) == pytest.approx((0.4, 0.7))


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "main", "unit"),
    [
        ({"accuracy": 0.9, "macro_f1": 0.9, "loss": 0.1, "ece": 0.1, "per_class": {}}, "classify", "accuracy", "nats"),
        ({"nearness": 0.9, "mae": 0.4, "rmse": 0.5, "loss": 0.1}, "regression", "nearness", "× variance"),
        ({"accuracy": 0.9, "nearness": 0.8, "quadratic_kappa": 0.7, "loss": 0.1}, "score", "nearness", "nats"),
        ({"accuracy": 0.9, "margin": 0.3, "loss": 0.6}, "preference", "accuracy", "nats"),
        ({"loss": 2.0, "perplexity": 7.4}, "generate", "loss", "nats"),  # during a training
        ({"rouge1": 0.4, "rougeL": 0.3, "bleu": 3.0, "loss": 2.0}, "summarize", "rougeL", "nats"),
    ],
)
def test_metrics_alone_say_which_task_they_are_of(values: dict[str, Any], kind: str, main: str, unit: str) -> None:
    for known in (None, kind):
        assert main_metric(values, known) == main
        assert measure_of("loss", values, known).unit == unit
    assert task_measured_by(values).metric == TASKS[kind].metric


def test_a_page_says_100_percent_only_where_all_are_right() -> None:
    per_class: Any = {label: {"precision": 0.9996, "recall": 1.0, "f1": 0.9998, "support": 5000} for label in "ab"}
    html = page(Classify(("a", "b"), ENCODER), [], [], {"accuracy": 0.9996, "loss": 0.1, "per_class": per_class})
    assert "<b>99.9%</b>" in html
    assert html.count('<td class="n">99.9%</td><td class="n">100.0%</td><td class="n">99.9%</td>') == 2


def test_every_task_describes_its_own_metric_and_loss() -> None:
    for kind, task in TASKS.items():
        assert {task.metric, "loss"} <= task.measures.keys(), kind
        assert all(each.name and each.says for each in task.measures.values()), kind
    assert measure_of("some_new_one", {"some_new_one": 1.0}).name == "some new one"
