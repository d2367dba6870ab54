"""Several questions on one text: how tables ask them, what the loss counts, and the same numbers as elsewhere."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch.nn import functional as F

from turret.cli.answers import print_evaluation
from turret.cli.main import run
from turret.compare.results import Details
from turret.data import Labelled, TextPair
from turret.data.columns import with_answers
from turret.data.dataset import read_dataset, read_test
from turret.data.table import from_rows
from turret.errors import DataError, RecipeError
from turret.recipe import Data, Recipe
from turret.store.golden import Example as Golden
from turret.store.golden import GoldenSet
from turret.tasks import make_task, schemas, task_from_spec
from turret.tasks.questions import Questions
from turret.train.linear_start import cross_validated
from turret.workspace import Workspace
from turret.workspace.promoting import judge_answers
from turret.workspace.results import Evaluation

LABELS = ("topic: film", "topic: sport", "topic: war", "urgent: no", "urgent: yes")
TOPICS, URGENT = slice(0, 3), slice(3, 5)
ROWS = [
    {"text": f"text {n}", "topic": ("sport", "film", "war")[n % 3], "urgent": ("yes", "no", "")[n % 5 // 2]}
    for n in range(60)
]
EXAMPLES = [
    Labelled("a", ("topic: sport", "urgent: no")),
    Labelled("b", ("topic: film",)),
    Labelled("c", ("urgent: yes",)),
    Labelled("d", ("topic: war", "urgent: yes")),
]


def questions(**more: Any) -> Questions:
    return Questions(LABELS, small_models.tokenizer("bert"), 32, **more)


def logits(count: int = len(EXAMPLES), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, len(LABELS), generator=torch.Generator().manual_seed(seed))


def dataset(rows: list[dict[str, Any]], label: Any, kind: str | None = None, **data: Any) -> Any:
    recipe = Recipe(data={"source": rows, "label": label, **data}, task={"kind": kind} if kind else {})
    return read_dataset(recipe.data, schemas(recipe.task))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_list_of_columns_asks_a_question_for_each_and_rows_may_lack_answers() -> None:
    found = dataset(ROWS, ["topic", "urgent"], test=10)
    assert (found.kind, found.labels) == ("questions", LABELS)
    assert found.columns == {"text": "text", "label": "topic, urgent"}
    every = {example.text: example.label for each in (found.train, found.test) for example in each}
    assert every["text 0"] == ("topic: sport", "urgent: yes")
    assert every["text 4"] == ("topic: film",)
    assert "the given rows: 12 texts had no 'urgent', which is not counted" in found.notes


def test_a_row_without_any_answer_is_left_out_and_pairs_of_texts_are_read() -> None:
    rows = [{"premise": "a", "hypothesis": str(n), **row} for n, row in enumerate(ROWS)]
    for row in rows:
        del row["text"]
    rows[7] |= {"topic": None, "urgent": " "}
    found = dataset(rows, ["topic", "urgent"])
    assert isinstance(found.train[0].text, TextPair)
    assert len(found.train) + len(found.test) == 59
    assert any("1 of 60 rows without 'topic, urgent' is left out" in note for note in found.notes)


def test_other_tables_are_read_by_the_names_of_the_columns_and_class_numbers_by_theirs() -> None:
    table = from_rows("t", ("text", "TOPIC", "urgent"), [{"text": "a", "TOPIC": 1, "urgent": True}])
    table.classes["TOPIC"] = ("film", "sport")  # type: ignore[index]
    whole = with_answers(table, ["topic", "urgent"])
    assert whole.columns == ("text", "topic, urgent")
    assert list(whole.read(["topic, urgent", "text"])) == [(1, ({"topic": "sport", "urgent": True}, "a"))]
    assert with_answers(table, ["topic", "mood"]) is table


def test_classes_are_renamed_and_respelt_within_their_column() -> None:
    rows = [dict(row) for row in ROWS]
    rows[0]["topic"], rows[1]["topic"] = "Sport", "flim"
    found = dataset(rows, ["topic", "urgent"], rename={"topic: flim": "topic: film"}, normalize_labels=True)
    assert found.labels == LABELS
    with pytest.raises(DataError, match="keep 'topic: ' in front"):
        dataset(rows, ["topic", "urgent"], rename={"topic: flim": "film"})


@pytest.mark.parametrize(
    ("label", "kind", "said"),
    [
        (["topic"], None, "a list of 2 to 64, given 1"),
        (["topic", "to: whom"], None, "rename the column 'to: whom'"),
        (["topic", " Topic"], None, "expected different columns"),
        (["topic", "urgency"], None, "there is no column 'urgency'.* did you mean 'urgent'?"),
        (["topic", "urgent"], "classify", "classify reads one column of answers, and data.label is a list"),
        (["topic", "urgent"], "regression", "regression reads one column of answers, and data.label is a list"),
        ("topic", "questions", "questions answers several questions: name their columns"),
        (["topic", "same"], None, "column 'same' has one class, 'x'"),
        (["topic", "empty"], None, "column 'empty' has no labels at all"),
        (["topic", "half"], None, "column 'topic, half': half: the label 0.5 is not a whole number"),
        (["topic", "both"], None, "column 'both' has several labels in a cell, such as 'a;b'"),
    ],
)
def test_a_mistake_is_one_line(label: Any, kind: str | None, said: str) -> None:
    rows = [
        {**row, "same": "x", "empty": None, "half": 0.5, "both": ("a", "b", "a;b")[n % 3]} for n, row in enumerate(ROWS)
    ]
    with pytest.raises((DataError, RecipeError), match=said) as caught:
        dataset(rows, label, kind)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_a_version_refuses_a_table_with_other_questions() -> None:
    source, schema = Recipe(data={"source": ROWS}).data.source, Questions.schema()
    with pytest.raises(DataError, match="questions answers several questions"):
        read_test(Data(source=source, label="topic"), schema, labels=LABELS)
    with pytest.raises(DataError, match="which the adapter does not know"):
        read_test(Data(source=source, label=["topic", "urgent"]), schema, labels=LABELS[1:])
    assert len(read_test(Data(source=source, label=["topic", "urgent"]), schema, labels=LABELS).examples) == 60


def test_the_command_line_takes_labels_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("mails.csv").open("w") as file:
        table = csv.DictWriter(file, ["text", "topic", "urgent"])
        table.writeheader()
        table.writerows(ROWS)
    assert run(["init", "mails.csv", "--label", "topic", "--label", "urgent"]) == 0
    drafted = tomllib.loads(Path("mails.toml").read_text())
    assert drafted["data"]["label"] == ["topic", "urgent"]
    assert drafted["task"] == {"kind": "questions", "max_tokens": 64}
    recipe = Recipe.load("mails.toml")
    assert read_dataset(recipe.data, schemas(recipe.task)).labels == LABELS
    named = Recipe(data="mails.csv").with_overrides({"data.label": '["topic", "urgent"]', "data.ignore": "a, b"})
    assert (named.data.label, named.data.ignore) == (["topic", "urgent"], ["a", "b"])
    assert run(["train", "mails.csv", "--label", "topic", "--label", "urgncy", "--store", "s"]) == 1
    assert "there is no column 'urgncy'" in capsys.readouterr().err


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_texts_of_the_mean_over_the_questions_that_they_answer() -> None:
    task, z = questions(), logits().requires_grad_()
    targets = task.targets(EXAMPLES)
    assert targets.tolist() == [[1, 0], [0, -1], [-1, 1], [2, 1]]
    topic = [F.cross_entropy(z[row, TOPICS], torch.tensor(wanted)) for row, wanted in ((0, 1), (1, 0), (3, 2))]
    urgent = [F.cross_entropy(z[row, URGENT], torch.tensor(wanted)) for row, wanted in ((0, 0), (2, 1), (3, 1))]
    expected = ((topic[0] + urgent[0]) / 2 + topic[1] + urgent[1] + (topic[2] + urgent[2]) / 2) / 4
    loss = task.loss(z, targets)
    torch.testing.assert_close(loss, expected)
    torch.autograd.backward(loss)
    assert z.grad is not None
    assert z.grad[1, URGENT].abs().sum() == z.grad[2, TOPICS].abs().sum() == 0
    assert bool((z.grad[0] != 0).all())


def test_guessing_is_the_lowest_loss_of_an_answer_that_ignores_the_text() -> None:
    for task in (questions(), questions(class_weights={"urgent: yes": 3.0})):
        same, targets = torch.zeros(len(LABELS), requires_grad=True), task.targets(EXAMPLES)
        optimiser = torch.optim.SGD([same], lr=2.0)
        for _ in range(300):
            optimiser.zero_grad()
            loss = task.loss(same.expand(len(EXAMPLES), -1), targets)
            torch.autograd.backward(loss)
            optimiser.step()
        assert task.guessing_loss(EXAMPLES) == pytest.approx(loss.item(), abs=1e-5)


def test_weights_are_balanced_within_each_question() -> None:
    settings = Recipe(data="x", task={"class_weights": "balanced"}).task
    found = dataset(ROWS, ["urgent", "topic"], train=48, test=12)
    task = make_task(settings, found, small_models.tokenizer("bert"), "encoder")
    assert task.labels == (*LABELS[URGENT], *LABELS[TOPICS])  # in the order of the recipe
    counts = {label: sum(label in example.labels for example in found.train) for label in LABELS}
    answered = counts["urgent: no"] + counts["urgent: yes"]
    weights = task.spec()["class_weights"]
    assert weights["urgent: no"] == pytest.approx(answered / (2 * counts["urgent: no"]))
    assert sum(weights[label] * counts[label] for label in LABELS[TOPICS]) == pytest.approx(48)
    with pytest.raises(DataError, match="names 'urgent', which is no answer"):
        questions(class_weights={"urgent": 2.0})


def test_classes_of_one_example_do_not_make_the_penalty_of_the_linear_start_large() -> None:
    labels = (*(f"topic: {number:02}" for number in range(12)), "urgent: no", "urgent: yes")
    task = Questions(labels, small_models.tokenizer("bert"), 32)
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.stack([(features[:, 0] > 0).long(), (features[:, 1] > 0).long()], dim=1)
    targets[:10, 0] = torch.arange(2, 12)  # no fold without the row can predict its topic
    penalty, loss = cross_validated(features, targets, task.loss, len(labels))
    assert penalty < 1  # 100, which predicts nothing, if these rows count
    assert loss < 1


# --- answers ----------------------------------------------------------------------------------------------------------


def test_metrics_of_each_question_are_those_of_scikit_learn() -> None:
    task = questions()
    examples, z = EXAMPLES * 10, logits(40)
    metrics, answers = task.judge(z, examples)
    topic = [place for place, example in enumerate(examples) if example.label[0] in LABELS[TOPICS]]
    true = [examples[place].label[0].removeprefix("topic: ") for place in topic]
    given = [answers[place]["answers"]["topic"]["label"] for place in topic]
    own = metrics["per_question"]["topic"]
    assert own["examples"] == 30
    assert own["accuracy"] == pytest.approx(accuracy_score(true, given))
    assert own["macro_f1"] == pytest.approx(f1_score(true, given, average="macro"))
    losses = [metrics["per_question"][question]["loss"] for question in ("topic", "urgent")]
    assert min(losses) < metrics["loss"] < max(losses)
    scores = [
        task.score(task.prediction_of(answer), example) for answer, example in zip(answers, examples, strict=True)
    ]
    assert metrics["accuracy"] == pytest.approx(sum(scores) / 40)
    assert set(scores) == {0.0, 0.5, 1.0}
    assert list(metrics["per_class"]) == list(LABELS)


def test_an_evaluation_on_the_screen_has_a_line_for_each_question(capsys: pytest.CaptureFixture[str]) -> None:
    metrics, _ = questions().judge(logits(), EXAMPLES)
    found = Evaluation(
        "mails@1", "sha256:a", {"source": "a.csv", "examples": 4}, metrics, 1.0, Details((), "questions")
    )
    print_evaluation(found, [])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    accuracies = {line[1]: line[3] for line in lines if line[:1] == ["question"]}
    assert accuracies == {f"{name}:": f"{each['accuracy']:.3f}" for name, each in metrics["per_question"].items()}


def test_a_question_without_an_example_does_not_count() -> None:
    task = questions()
    examples = [example for example in EXAMPLES * 10 if example.label[0] in LABELS[TOPICS]]
    topics = [Labelled(example.text, example.label[:1]) for example in examples]
    metrics, _ = task.judge(logits(len(topics)), topics)
    assert metrics["per_question"]["urgent"]["examples"] == 0
    assert metrics["macro_f1"] == metrics["per_question"]["topic"]["macro_f1"] > 0


def test_an_answer_names_a_class_and_the_probabilities_of_each_question() -> None:
    task, z = questions(), logits()
    answer = task.answers(z)[0]
    chances = z[0, TOPICS].double().softmax(-1).tolist()
    expected = dict(zip(("film", "sport", "war"), chances, strict=True))
    assert answer["answers"]["topic"]["probabilities"] == pytest.approx(expected)
    assert answer["answers"]["topic"]["label"] == max(expected, key=expected.__getitem__)
    printed = dict[str, Any]()
    exec(task.print_line(task.spec()).replace("print(", "said = ("), {"logits": z[0], "labels": LABELS}, printed)
    assert printed["said"] == task.prediction_of(answer)
    assert task.line(answer).startswith(f"{printed['said'][0]} ")


def drawn(count: int, seed: int, *, sure: float) -> tuple[torch.Tensor, list[Labelled]]:
    """Logits of a head that is too sure of the topic, and of the urgency rightly sure; a third lack the urgency."""
    generator = torch.Generator().manual_seed(seed)
    true = 1.6 * torch.randn(count, len(LABELS), generator=generator)
    topics = torch.multinomial(true[:, TOPICS].softmax(-1), 1, generator=generator)[:, 0].tolist()
    urgent = torch.multinomial(true[:, URGENT].softmax(-1), 1, generator=generator)[:, 0].tolist()
    both = [(LABELS[topic], LABELS[3 + own]) for topic, own in zip(topics, urgent, strict=True)]
    examples = [Labelled("", labels if place % 3 else labels[:1]) for place, labels in enumerate(both)]
    return torch.cat([sure * true[:, TOPICS], true[:, URGENT]], dim=1), examples


@pytest.mark.slow
def test_each_question_has_a_temperature_of_its_own() -> None:
    known, test = drawn(2000, 1, sure=2.5), drawn(3000, 2, sure=2.5)
    task = questions().calibrated(*known, chose_weights=False)
    assert task.calibrations["topic"].temperature == pytest.approx(2.5, rel=0.1)
    assert task.calibrations["urgent"].temperature == pytest.approx(1.0, abs=0.1), "the control: it was right before"
    assert [each.examples for each in task.calibrations.values()] == [2000, 1333]
    before, (after, answers) = questions().judge(*test)[0], task.judge(*test)
    assert before["per_question"]["topic"]["ece"] > 0.1
    for question, part in (("topic", TOPICS), ("urgent", URGENT)):
        own = after["per_question"][question]
        there = [place for place, example in enumerate(test[1]) if any(question in each for each in example.label)]
        rows = [answers[place]["answers"][question] for place in there]
        names = [label.removeprefix(f"{question}: ") for label in LABELS[part]]
        right = [next(e for e in test[1][p].label if e.startswith(question)).partition(": ")[2] for p in there]
        chances = np.array([[row["probabilities"][name] for name in names] for row in rows])
        assert own["loss"] == pytest.approx(log_loss(right, chances, labels=names), abs=1e-6)
        hits = np.array([row["label"] == each for row, each in zip(rows, right, strict=True)])
        assert own["ece"] == pytest.approx(binned_error(chances.max(1), hits), abs=1e-9)
        assert own["ece"] < 0.03
        assert own["accuracy"] == before["per_question"][question]["accuracy"]
    assert after["ece"] == pytest.approx(sum(each["ece"] for each in after["per_question"].values()) / 2)
    again = task_from_spec(json.loads(json.dumps(task.spec())), small_models.tokenizer("bert"))
    assert again.answers(test[0]) == task.answers(test[0])
    assert "calibration" not in questions().spec()


def test_a_question_with_few_answers_has_no_temperature() -> None:
    logits, examples = drawn(50, 1, sure=2.5)
    few = [each if place < 25 else Labelled("", each.label[:1]) for place, each in enumerate(examples)]
    assert set(questions().calibrated(logits, few, chose_weights=False).calibrations) == {"topic"}


def binned_error(sure: np.ndarray, right: np.ndarray) -> float:
    """ECE in 15 bins."""
    places = np.clip(np.ceil(sure * 15).astype(int) - 1, 0, 14)
    inside = [places == place for place in range(15)]
    return float(sum(abs(sure[own].sum() - right[own].sum()) for own in inside) / len(sure))


def test_a_golden_example_names_every_answer() -> None:
    task = questions()
    given = [task.prediction_of(answer) for answer in task.answers(logits())]
    wanted = [tuple(each) for each in given]
    wanted[3] = (wanted[3][0], "urgent: yes" if "urgent: no" in wanted[3] else "urgent: no")
    golden = GoldenSet(tuple(Golden("a text", "label", each) for each in wanted))
    found = judge_answers("sha256:0", golden, given)
    assert (found.passed, found.total) == (3, 4)
    assert found.first is not None
    assert found.first["given"] == given[3]


def test_the_manifest_makes_an_equal_task_and_other_names_of_outputs_are_refused() -> None:
    task = questions(class_weights={"urgent: yes": 3.0}, pairs=True, prefix_text="a")
    again = task_from_spec(json.loads(json.dumps(task.spec())), small_models.tokenizer("bert"))
    assert again.spec() == task.spec()
    assert Questions.labels_of_outputs(LABELS) == LABELS
    for wrong in (("film", "sport"), LABELS[2:], (*LABELS, "topic: tv"), (*LABELS, "urgent: yes")):
        with pytest.raises(DataError, match="the answers are"):
            Questions.labels_of_outputs(wrong)


@pytest.mark.slow
def test_two_questions_learnt_together_are_answered_as_well_as_by_an_adapter_each(tmp_path: Path) -> None:
    words = ("bank", "film", "story", "fox")
    rows = [
        {
            "text": f"{words[n % 4]} {('quick', 'lazy')[n * 7 % 11 % 2]}",
            "topic": words[n % 4],
            "speed": ("quick", "lazy")[n * 7 % 11 % 2],
        }
        for n in range(160)
    ]
    base = small_models.save_base("bert", tmp_path / "bert")
    workspace = Workspace(tmp_path / "store")
    accuracy = dict[str, float]()
    for name, label in {"topic": "topic", "speed": "speed", "both": ["topic", "speed"]}.items():
        recipe = Recipe(
            name=name,
            base=str(base),
            data={"source": rows, "label": label, "test": 40},
            train={"epochs": 4, "lr": 5e-3, "batch_size": 16},
        )
        found = workspace.train(recipe).metrics["test"]
        accuracy[name] = found["accuracy"]
        accuracy |= {
            f"{question} of both": each["accuracy"] for question, each in found.get("per_question", {}).items()
        }
    assert workspace.resolve("both").lineage["recipe"].count('label = ["topic", "speed"]') == 1
    for question in ("topic", "speed"):
        assert accuracy[question] > 0.9  # it can be learnt
        assert accuracy[f"{question} of both"] >= accuracy[question] - 0.075, accuracy
