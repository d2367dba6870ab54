"""The rows of a comparison that train nothing, measured on small bases."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from small_tables import write_jsonl
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from turret.adapters import detach
from turret.data import Labelled, Pair
from turret.engine import untrained
from turret.engine.untrained import Question
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import TASKS, task_of
from turret.tasks.chat import bare_chat
from turret.workspace import measure, training
from turret.workspace.resident import PreparedTraining

GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")


HEADS = {"classify": ("text", "label"), "summarize": ("document", "summary")}


def ready_in(folder: Path, family: str = "bert", kind: str = "classify", **changes: str) -> PreparedTraining:
    base = folder / family
    small_models.save_base(family, base)
    heads = HEADS.get(kind, ("text", "stars"))
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(heads)
        for row in range(90):
            words, answer = (GOOD if row % 2 else BAD)[row // 2 % 3], "good" if row % 2 else "bad"
            if kind in HEADS:
                table.writerow([f"{words} {row}. More words here.", answer if kind == "classify" else f"{words} it is"])
            else:
                stars = row % 4  # so many good words of three
                table.writerow([" ".join([GOOD[0]] * stars + [BAD[0]] * (3 - stars)) + f" {row}.", stars])
    settings = {"data.test": "30"}
    if kind != "summarize":
        settings |= {"method": "head", "train.dtype": "float32", "task.kind": kind}
        settings |= {"data.text": heads[0], "data.label": heads[1]}
    made = Recipe(name="table", base=str(base), data=str(folder / "table.csv")).with_overrides(settings | changes)
    return training.prepare(Store(folder / "store"), made, training.Callbacks())


def asked(kind: str, ready: PreparedTraining) -> dict:
    return measure.baseline(kind, ready, lambda _: None)


def test_linear_is_scikit_learns_regression_on_the_mean_of_the_frozen_states(tmp_path: Path) -> None:
    """Against features that transformers computes one text at a time."""
    ready = ready_in(tmp_path)
    found = asked("linear", ready)
    reader, model = (
        AutoTokenizer.from_pretrained(tmp_path / "bert"),
        AutoModel.from_pretrained(tmp_path / "bert").float(),
    )

    def features(examples) -> np.ndarray:
        with torch.no_grad():
            rows = [model(**reader(each.text, return_tensors="pt")).last_hidden_state[0].mean(0) for each in examples]
        return torch.stack(rows).numpy()

    train, test = ready.dataset.train, ready.dataset.test
    scaler = StandardScaler().fit(features(train))
    strength = float(found["said"].rpartition(" = ")[2])
    known = LogisticRegression(C=strength, max_iter=300).fit(
        scaler.transform(features(train)), [each.label for each in train]
    )
    assert found["answers"] == known.predict(scaler.transform(features(test))).tolist()
    assert found["metrics"]["accuracy"] >= 0.9
    assert found["version"] is None
    assert found["parameters"]["trainable"] == 2 * (model.config.hidden_size + 1)
    assert found["timing"]["train_seconds"] > 0


def test_labels_that_mean_nothing_give_linear_nothing(tmp_path: Path) -> None:
    ready, chance = ready_in(tmp_path), random.Random(0)
    train = [Labelled(each.text, chance.choice(["good", "bad"])) for each in ready.dataset.train]
    found = asked("linear", replace(ready, dataset=replace(ready.dataset, train=train)))
    assert found["metrics"]["accuracy"] < 0.85


@pytest.mark.slow
def test_linear_takes_many_labels_and_a_class_without_training_examples(tmp_path: Path) -> None:
    ready = ready_in(tmp_path, **{"data.separator": ";", "task.multi_label": "true"})
    found = asked("linear", ready)
    assert found["metrics"]["accuracy"] >= 0.9
    assert set(map(tuple, found["answers"])) <= {("good",), ("bad",), (), ("bad", "good")}
    one = ready_in(tmp_path / "one") if (tmp_path / "one").mkdir() is None else None
    assert one is not None
    train = [each for each in one.dataset.train if each.label == "good"]
    found = asked("linear", replace(one, dataset=replace(one.dataset, train=train)))
    assert set(found["answers"]) == {"good"}


def test_linear_predicts_numbers_by_scikit_learns_ridge(tmp_path: Path) -> None:
    ready = ready_in(tmp_path, kind="regression")
    found = asked("linear", ready)
    features, targets = (measure._features(ready, ready.dataset.train), ready.task.targets(ready.dataset.train).numpy())
    scaler = StandardScaler().fit(features)
    known = Ridge(alpha=1 / float(found["said"].rpartition(" = ")[2])).fit(scaler.transform(features), targets)
    given = known.predict(scaler.transform(measure._features(ready, ready.dataset.test)))
    mean, deviation = ready.task.mean, ready.task.deviation
    assert [float(each) for each in found["answers"]] == pytest.approx(given * deviation + mean, abs=1e-4)
    assert "ridge regression" in found["said"]
    assert found["metrics"]["spearman"] > 0.9
    shuffled = random.Random(0).sample(ready.dataset.train, len(ready.dataset.train))
    mixed = [replace(a, value=b.value) for a, b in zip(ready.dataset.train, shuffled, strict=True)]
    detach(ready.base.model)
    control = asked("linear", replace(ready, dataset=replace(ready.dataset, train=mixed)))
    assert control["metrics"]["spearman"] < 0.6


def test_linear_grades_by_a_regression_for_each_level_but_the_last(tmp_path: Path) -> None:
    ready = ready_in(tmp_path, kind="score")
    found = asked("linear", ready)
    assert set(found["answers"]) == {"0", "1", "2", "3"}
    assert found["metrics"]["nearness"] > 0.85
    assert found["parameters"]["trainable"] == 3 * (ready.base.model.config.hidden_size + 1)


ROWS = {
    "classify": lambda word, row: {"text": word, "label": ("good", "bad")[row % 2]},
    "text_pairs": lambda word, row: {"premise": word, "hypothesis": word, "label": ("same", "other")[row % 2]},
    "regression": lambda word, row: {"text": word, "label": row + 0.5},
    "score": lambda word, row: {"text": word, "label": row % 4},
    "rerank": lambda word, row: {"query": word, "passage": f"{word} {row}", "relevance": row % 2},
    "questions": lambda word, row: {"text": word, "urgent": ("yes", "no")[row % 2], "topic": "abc"[row % 3]},
    "token_classification": lambda word, row: {"tokens": word.split(), "tags": ["B-X"] + ["O"] * word.count(" ")},
    "embedding": lambda word, row: {"anchor": word, "positive": f"{word} {row}"},
    "preference": lambda word, row: {"prompt": word, "chosen": "great film", "rejected": f"dull {row}"},
    "chat": lambda word, row: {
        "messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f"film {row}"}]
    },
    "generate": lambda word, row: {"instruction": word, "output": f"film {row}"},
    "summarize": lambda word, row: {"document": f"{word}. More.", "summary": f"film {row}"},
}
NAMED = {"regression": "label", "score": "label", "questions": ["urgent", "topic"]}  # columns that are not guessed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "which"), [(kind, each) for kind in TASKS for each in ("base", *task_of(kind).baselines)]
)
def test_every_baseline_of_every_task_is_measured(tmp_path: Path, kind: str, which: str) -> None:
    generates = task_of(kind).generates or task_of(kind).two_answers
    small_models.save_base("llama" if generates else "bert", tmp_path / "base")
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [ROWS[kind](f"{(GOOD if row % 2 else BAD)[row // 2 % 3]} number {row // 3}", row) for row in range(60)],
    )
    named = {"text": "text", "label": NAMED[kind]} if kind in NAMED else {}
    made = Recipe.model_validate(
        {
            "name": "table",
            "base": str(tmp_path / "base"),
            "data": {"source": str(data), "test": 20, **named},
            "task": {"kind": kind},
        }
    )
    ready = training.prepare(Store(tmp_path / "store"), made, training.Callbacks())
    found = asked(which, ready)
    assert len(found["scores"]) == len(ready.dataset.test) == 20
    assert np.isfinite(found["scores"]).all()
    assert ready.task.metric in found["metrics"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One thing. Another.", "One thing."),
        ("A headline\n\nThe body of it.", "A headline"),
        ("  What is it?  That.", "What is it?"),
        ('He said "stop." Then he left.', 'He said "stop."'),
        ("no end", "no end"),
        ("It is 3.5 metres. Long.", "It is 3.5 metres."),
        ("", ""),
        ("...", "..."),
    ],
)
def test_the_first_sentence_ends_where_a_reader_would_say(text: str, first: str) -> None:
    assert measure.first_sentence(text) == first


@pytest.mark.slow
def test_texts_have_baselines_that_are_scored_like_answers(tmp_path: Path) -> None:
    ready = ready_in(tmp_path, "llama", "summarize")
    lead, nearest = asked("lead", ready), asked("nearest", ready)
    assert lead["answers"] == [each.source.split(".")[0] + "." for each in ready.dataset.test]
    wanted = {each.source.split(" 1")[0]: each.target for each in ready.dataset.train}
    assert wanted
    right = [answer == each.target for answer, each in zip(nearest["answers"], ready.dataset.test, strict=True)]
    assert np.mean(right) > 0.9
    assert nearest["metrics"]["rougeL"] == pytest.approx(np.mean(nearest["scores"]), abs=1e-6)
    assert lead["metrics"]["rougeL"] < nearest["metrics"]["rougeL"]
    assert lead["latency"]["median_seconds"] >= 0
    silent = replace(ready.dataset, train=[Pair("", "nothing"), Pair("!", "either")])
    assert set(asked("nearest", replace(ready, dataset=silent))["answers"]) == {"nothing"}


@pytest.mark.slow
def test_a_base_that_generates_classifies_by_the_words_of_the_labels(tmp_path: Path) -> None:
    """Against the probabilities of whole labels that transformers computes, renormalised where the labels part."""
    ready = ready_in(tmp_path, "llama")
    found = asked("base", ready)
    assert "label whose words" in found["said"]
    assert found["seedless"]
    assert len(found["answers"]) == 30
    assert set(found["answers"]) <= {"good", "bad"}
    reader = AutoTokenizer.from_pretrained(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").float().eval()
    question, chat = Question(("bad", "good")), bare_chat(reader, 400, 16)

    def chances(text: str) -> torch.Tensor:
        pairs = [Pair(question.prompt(text), label) for label in question.labels]
        found = []
        for source, target in chat.encode_examples(pairs):
            ids = torch.cat([torch.as_tensor(source.ids), torch.as_tensor(target.ids)])
            with torch.no_grad():
                said = model(ids[None]).logits[0].log_softmax(-1)
            words = range(len(source.ids), len(ids))
            found.append(sum(float(said[place - 1, ids[place]]) for place in words))
        return torch.tensor(found).log_softmax(-1)

    silence = chances(untrained.EMPTY)
    wanted = [("bad", "good")[int((chances(each.text) - silence).argmax())] for each in ready.dataset.test]
    assert np.mean([answer == each for answer, each in zip(found["answers"], wanted, strict=True)]) > 0.95
