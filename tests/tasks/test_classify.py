"""Classification: tokens equal the tokenizer's, losses equal torch's, and a spec makes an equal task."""

from __future__ import annotations

import json
import random
import time
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support
from small_models import FAMILIES, tokenizer
from torch.nn import functional as F

from turret.data import Labelled
from turret.errors import AdapterError, DataError
from turret.recipe import Task
from turret.tasks import make_task, metrics, task_from_spec
from turret.tasks.classify import Classify, balanced_weights

TOKENIZERS = {family: tokenizer(family) for family in FAMILIES}
LABELS = ("bad", "fine", "good")


def classifier(family: str = "bert", max_tokens: int = 16, **settings: Any) -> Classify:
    return Classify(LABELS, TOKENIZERS[family], max_tokens, **settings)


# --- texts -----------------------------------------------------------------------------------------------------------

LETTERS = st.text(st.sampled_from("abc xyz,.!\n\t\u00e9\u65e5"), max_size=60)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(LETTERS, min_size=1, max_size=4), max_tokens=st.integers(3, 20))
def test_a_text_is_encoded_and_cut_as_the_tokenizer_itself_would(
    family: str, texts: list[str], max_tokens: int
) -> None:
    known = TOKENIZERS[family]
    task = classifier(family, max_tokens)
    for text, encoded in zip(texts, task.encode_sources(texts), strict=True):
        expected = known(text, truncation=True, max_length=max_tokens)["input_ids"]
        assert encoded.ids.tolist() == (expected or [known.eos_token_id])
        assert encoded.ids.dtype == torch.long
        assert encoded.cut == (len(known(text)["input_ids"]) > max_tokens)
        assert torch.equal(task.encode_sources([text])[0].ids, encoded.ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "a", "\x00", "\u200b", "日本語", "🎬", "[PAD][SEP]</s><pad>", "\ufffd"]
)
def test_every_text_has_at_least_one_token(family: str, text: str) -> None:
    encoded = classifier(family).encode_sources([text])[0]
    assert 1 <= len(encoded.ids) <= 16
    assert int(encoded.ids.max()) < len(TOKENIZERS[family])


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("piece", ["a quick film ", "x", " ", "\u200b", "[SEP] ", "word\n"])
def test_a_text_of_100000_tokens_is_cut_quickly_and_exactly(family: str, piece: str) -> None:
    text = piece * (20_000 if len(piece) > 1 else 100_000)
    started = time.perf_counter()
    encoded = classifier(family).encode_sources([text])[0]
    assert time.perf_counter() - started < 5
    known = TOKENIZERS[family]
    assert encoded.ids.tolist() == (known(text, truncation=True, max_length=16)["input_ids"] or [known.eos_token_id])


def test_a_prefix_text_goes_before_every_text() -> None:
    task = classifier(prefix_text="film: ")
    assert torch.equal(task.encode_sources(["great"])[0].ids, classifier().encode_sources(["film: great"])[0].ids)


def test_no_texts_give_no_rows() -> None:
    assert classifier().encode_sources([]) == []
    assert classifier().targets([]).shape == (0,)


@pytest.mark.parametrize(("max_tokens", "prefix"), [(2, ""), (3, "film: ")])
def test_a_limit_without_room_for_a_text_is_refused(max_tokens: int, prefix: str) -> None:
    with pytest.raises(DataError, match=r"task.max_tokens = . leaves no room for the text: .* set it to \d+ or more"):
        classifier("bert", max_tokens, prefix_text=prefix)


# --- targets and losses ----------------------------------------------------------------------------------------------


def test_targets_are_numbers_in_the_order_of_the_labels() -> None:
    assert classifier().targets([Labelled("x", "good"), Labelled("y", "bad")]).tolist() == [2, 0]
    many = classifier(multi_label=True).targets([Labelled("x", ("good", "bad")), Labelled("y", ())])
    assert many.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_an_unknown_label_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="label 'odd' is unknown to this classifier: it knows 'bad', 'fine', 'good'"):
        classifier().targets([Labelled("x", "odd")])


def test_the_loss_is_cross_entropy() -> None:
    logits, targets = torch.randn(5, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 2, 1])
    assert torch.equal(classifier().loss(logits, targets), F.cross_entropy(logits.float(), targets))


def test_class_weights_scale_each_examples_loss() -> None:
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    task = classifier(class_weights={"good": 3.0})
    each = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(task.loss(logits, targets), (each * torch.tensor([1.0, 1, 3, 3, 1])).mean())


def test_several_labels_use_binary_cross_entropy() -> None:
    logits, targets = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    task = classifier(multi_label=True, class_weights={"bad": 2.0})
    expected = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=torch.tensor([2.0, 1, 1]))
    torch.testing.assert_close(task.loss(logits, targets), expected)


@pytest.mark.parametrize("many", [False, True])
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(many: bool) -> None:
    task = classifier(multi_label=many, class_weights={"bad": 5.0, "good": 0.2})
    logits = torch.randn(7, 3)
    targets = torch.randint(0, 2, (7, 3)).float() if many else torch.tensor([0, 0, 2, 1, 2, 0, 1])
    parts = sum(task.loss(logits[a:b], targets[a:b]) * (b - a) / 7 for a, b in ((0, 3), (3, 4), (4, 7)))
    torch.testing.assert_close(parts, task.loss(logits, targets))


def test_balanced_weights_have_mean_one_over_the_examples() -> None:
    examples = [Labelled("x", label) for label in ["bad"] * 6 + ["good"] * 2]
    weights = balanced_weights(LABELS, examples, multi_label=False)
    assert weights == {"bad": pytest.approx(8 / 12), "fine": 1.0, "good": 2.0}
    assert sum(weights[str(e.label)] for e in examples) / len(examples) == pytest.approx(1)


def test_balanced_weights_of_several_labels_balance_yes_and_no() -> None:
    examples = [Labelled("x", ("bad",)), Labelled("x", ()), Labelled("x", ()), Labelled("x", ("bad", "good"))]
    assert balanced_weights(LABELS, examples, multi_label=True) == {"bad": 1.0, "fine": 1.0, "good": 3.0}


def test_weights_for_a_class_that_is_not_there_are_refused() -> None:
    with pytest.raises(DataError, match=r"task.class_weights names 'odd', which is not a class: the classes are"):
        classifier(class_weights={"odd": 1.0})


# --- answers and metrics ---------------------------------------------------------------------------------------------


def test_an_answer_is_the_likeliest_label_with_all_probabilities() -> None:
    [answer] = classifier().answers(torch.tensor([[0.0, 1.0, 3.0]]))
    assert answer["label"] == "good"
    assert list(answer["probabilities"]) == list(LABELS)
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert json.loads(json.dumps(answer)) == answer


def test_an_answer_of_several_labels_has_those_with_a_probability_from_a_half_on() -> None:
    first, second = classifier(multi_label=True).answers(torch.tensor([[0.0, -1.0, 3.0], [-1.0, -1.0, -1.0]]))
    assert first["label"] == ["bad", "good"]
    assert second["label"] == []
    assert first["probabilities"]["bad"] == 0.5


def test_metrics_have_accuracy_macro_f1_loss_and_a_row_for_each_class() -> None:
    task = classifier()
    logits = torch.eye(3)[[0, 0, 2, 2]] * 5
    targets = torch.tensor([0, 2, 2, 2])
    found = task.metrics(logits, targets)
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)))
    assert found["per_class"]["good"] == {
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
        "support": 3,
    }
    assert found["per_class"]["fine"]["f1"] == 0.0
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0 + 0.8) / 3)
    json.dumps(found)


def test_accuracy_of_several_labels_counts_texts_with_every_label_right() -> None:
    task = classifier(multi_label=True)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    found = task.metrics(torch.tensor([[3.0, -3, -3], [-3, -3, -3]]), targets)
    assert found["accuracy"] == 0.5
    assert found["micro_f1"] == pytest.approx(2 / 3)
    json.dumps(found)


# --- the spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"multi_label": True}, {"class_weights": {"bad": 2.0}}, {"prefix_text": "film: "}, {"max_tokens": 40}],
)
def test_a_spec_survives_json_and_makes_the_same_task(settings: dict[str, Any]) -> None:
    task = classifier(**settings)
    again = task_from_spec(json.loads(json.dumps(task.spec())), TOKENIZERS["bert"])
    assert isinstance(again, Classify)
    assert again.spec() == task.spec()
    assert torch.equal(
        again.encode_sources(["a great film and a dull story"])[0].ids,
        task.encode_sources(["a great film and a dull story"])[0].ids,
    )


@pytest.mark.parametrize("spec", [{}, {"kind": "paint"}, {"kind": "classify"}, {"kind": "classify", "labels": 3}])
def test_a_broken_spec_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match="the adapter's task cannot be read"):
        task_from_spec(spec, TOKENIZERS["bert"])


def test_the_task_of_a_recipe_has_its_settings_and_the_datas_labels() -> None:
    class Data:
        kind = "classify"
        columns: ClassVar = {"text": "text", "label": "label"}
        labels = LABELS
        train = (Labelled("x", "bad"), Labelled("y", "bad"), Labelled("z", "good"))

    task = make_task(Task(max_tokens=9, class_weights="balanced"), Data(), TOKENIZERS["bert"], "encoder")
    assert isinstance(task, Classify)
    assert (task.max_tokens, task.labels) == (9, LABELS)
    assert task.class_weights == {"bad": 0.75, "fine": 1.0, "good": 1.5}


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "a"]])
def test_one_class_or_a_repeated_class_is_refused(labels: list[str]) -> None:
    with pytest.raises(DataError, match="classes must be different and at least 2"):
        Classify(labels, TOKENIZERS["bert"])


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_metrics_of_each_class_are_those_of_scikit_learn(multi_label: bool) -> None:
    """Bit for bit, also for classes that are never true, never answered, or neither."""
    draw = random.Random(0)
    for classes, count in ((2, 1), (2, 40), (5, 7), (7, 60)):
        numbers, labels = range(classes), [f"class {number}" for number in range(classes)]
        drawn: list[Any] = []
        for most in (classes - 1, classes):  # the last class is never true
            if multi_label:
                drawn.append([[int(each < most and draw.random() < 0.4) for each in numbers] for _ in range(count)])
            else:
                drawn.append([draw.randrange(most) for _ in range(count)])
        true, answered = drawn
        measure = metrics.many_classes if multi_label else metrics.one_class
        found = measure(answered, true, labels, 0.0)
        columns = precision_recall_fscore_support(true, answered, labels=list(numbers), average=None, zero_division=0)
        wanted = [{"precision": p, "recall": r, "f1": f, "support": n} for p, r, f, n in zip(*columns, strict=True)]
        assert list(found["per_class"].values()) == wanted
        assert list(found["per_class"]) == labels
    assert len({row["f1"] for row in wanted}) > 3  # the numbers differ
