"""Spans of texts: how tables say them, how long texts are read, what is right, and the same numbers as elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turret import bases
from turret.adapters import attach, detach, packed
from turret.data import Dataset, Tagged
from turret.data.cells import spans_in, spans_of_tags, words_of
from turret.data.dataset import read_dataset
from turret.errors import BaseModelError, DataError
from turret.families import FAMILIES
from turret.methods import LoRA
from turret.recipe import Data
from turret.tasks import task_from_spec
from turret.tasks.token_classification import TokenClassification

WORDS = ["Anna", "Lee", "met", "Bo", "in", "Rome", "."]
TAGGED = [family for family in (*small_models.FAMILIES, *small_models.RELATIVES) if FAMILIES[family].tag_modules]


def tagger(
    max_tokens: int = 256, labels: tuple[str, ...] = ("LOC", "PER"), family: str = "bert"
) -> TokenClassification:
    return TokenClassification(labels, small_models.tokenizer(family), max_tokens)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tags",
    [
        ["B-PER", "I-PER", "O", "B-PER", "O", "B-LOC", "O"],  # IOB2
        ["I-PER", "I-PER", "O", "I-PER", "O", "I-LOC", "O"],  # IOB
        ["B-PER", "E-PER", "O", "S-PER", "O", "S-LOC", "O"],  # BIOES
        ["B_PER", "L_PER", "O", "U_PER", "O", "U_LOC", "O"],  # BILOU
        ["PER", "PER", "", "PER", "O", "LOC", "_"],
    ],
)
def test_every_way_to_write_tags_gives_the_same_spans(tags: list[str]) -> None:
    text, spans = spans_of_tags(WORDS, tags)
    assert text == "Anna Lee met Bo in Rome ."
    assert [(text[start:end], label) for start, end, label in spans] == [
        ("Anna Lee", "PER"),
        ("Bo", "PER"),
        ("Rome", "LOC"),
    ]


def test_a_new_span_may_follow_at_once() -> None:
    _, spans = spans_of_tags(["Anna", "Bo"], ["B-PER", "B-PER"])
    assert spans == [(0, 4, "PER"), (5, 7, "PER")]
    _, spans = spans_of_tags(["Anna", "Bo"], ["I-PER", "I-LOC"])
    assert spans == [(0, 4, "PER"), (5, 7, "LOC")]
    _, spans = spans_of_tags(["Anna", "Bo"], ["S-PER", "I-PER"])
    assert spans == [(0, 4, "PER"), (5, 7, "PER")]


@pytest.mark.parametrize(
    "items",
    [
        [{"start": 0, "end": 9, "label": "PER"}],
        [{"start_offset": 0, "end_offset": 8, "type": "PER"}],
        [[0, 8, "PER"]],
    ],
)
def test_spans_are_read_as_tools_for_annotation_write_them(items: Any) -> None:
    assert spans_in(items, "Anna Lee met Bo") == [(0, 8, "PER")]  # blanks at the ends do not belong to a span


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([[0, 4, "A"], [2, 6, "B"]], "the spans 0-4 A and 2-6 B overlap"),
        ([[0, 99, "A"]], "outside its text of 15 characters"),
        ([[4, 4, "A"]], "outside its text"),
        ([{"start": "0", "end": 4, "label": "A"}], "expected a span with start, end and label"),
        ([[True, 4, "A"]], "expected a span"),
        ([[0, 4, ""]], "has no label"),
        (["PER"], "expected a span"),
    ],
)
def test_a_wrong_span_is_one_line(items: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        spans_in(items, "Anna Lee met Bo")
    assert len(str(error.value)) < 300


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_kinds_of_table_give_the_same_examples(tmp_path: Path) -> None:
    tags = ["B-PER", "I-PER", "O", "B-PER", "O", "B-LOC", "O"]
    words = [{"tokens": [*WORDS, str(n)], "ner_tags": [*tags, "O"]} for n in range(12)]
    spans = [(0, 8, "PER"), (13, 15, "PER"), (19, 23, "LOC")]
    texts = [{"text": f"{' '.join(WORDS)} {n}", "entities": spans} for n in range(12)]
    table = [read_all(write(tmp_path / name, rows)) for name, rows in (("a.jsonl", words), ("b.jsonl", texts))]
    assert table[0].kind == table[1].kind == "token_classification"
    assert set(table[0].train) == set(table[1].train)
    assert table[0].labels == ("LOC", "PER")


def read_all(path: Path, **data: Any) -> Dataset:
    return read_dataset(Data(source=str(path), **data), [TokenClassification.schema()])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "1 tags for 2 words"),
        ({"tokens": ["a"], "tags": [3]}, "a number that the table does not name"),
        ({"tokens": ["a"], "tags": [None]}, "expected a tag such as B-PER"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, said: str) -> None:
    good = {"tokens": ["Anna", "b"], "tags": ["B-PER", "O"]}
    with pytest.raises(DataError, match=said):
        read_all(write(tmp_path / "t.jsonl", [good] * 9 + [row]))


def test_labels_can_be_renamed_and_left_out(tmp_path: Path) -> None:
    rows = [{"tokens": [f"Anna{n}", "in", "Rome"], "tags": ["B-PRE", "O", "B-X"]} for n in range(12)]
    found = read_all(write(tmp_path / "t.jsonl", rows), rename={"PRE": "PER", "X": ""})
    assert found.labels == ("PER",)
    assert all(example.labels == ("PER",) for example in found.train)


def test_words_of_a_cell() -> None:
    assert words_of(["a", "b c", None]) == "a b_c"
    assert words_of('["a", "b"]') == "a b"
    assert words_of("a b") == "a b"
    assert words_of([]) is None


# --- windows ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["Anna", "walked", "to", "unbelievable", ".", "(", "日本語", "naïve", "😀", "x" * 30])),
    st.integers(8, 40),
)
@settings(max_examples=60, deadline=None)
def test_each_word_is_answered_by_one_window(words: list[str], most: int) -> None:
    task, text = tagger(most), " ".join(words)
    rows = task.windows([text])[0]
    assert all(len(row.ids) <= most for row in rows)
    read = [row.ids[row.read].tolist() for row in rows]
    whole = tagger(4096).windows([text])[0]
    assert [token for each in read for token in each] == whole[0].ids[whole[0].read].tolist()


def test_a_span_at_the_seam_is_read_whole() -> None:
    """Near a seam a word is answered by a window that reads several tokens on both of its sides."""
    task = tagger(40)
    text = " ".join(f"film {n}" for n in range(200))
    rows = task.windows([text])[0]
    assert len(rows) > 3
    for place, row in enumerate(rows):
        before, after = int(row.read[0]) - 1, len(row.ids) - 2 - int(row.read[-1])
        assert before >= 3 or place == 0
        assert after >= 3 or place == len(rows) - 1


@given(st.lists(st.sampled_from(["Anna", "Lee", "went", "Rome", ".", "and"]), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_pieces_for_training_are_the_text_with_its_spans(words: list[str]) -> None:
    tags = {"Anna": "B-PER", "Lee": "I-PER", "Rome": "B-LOC"}
    text, spans = spans_of_tags(words, [tags.get(word, "O") for word in words])
    task = tagger(16)
    pieces = task.pieces([Tagged(text, tuple(spans))])
    assert " ".join(piece.input for piece in pieces) == text
    assert all(len(task.windows([piece.input])[0]) == 1 for piece in pieces)
    moved, at = set(), 0
    for piece in pieces:
        assert isinstance(piece, Tagged)
        moved |= characters(piece.text, piece.spans, at)
        at += len(piece.text) + 1
    assert moved == characters(text, spans, 0)


def characters(text: str, spans: Any, at: int) -> set[tuple[int, str, str]]:
    """The characters inside of spans, but blanks: a span that is longer than a piece is divided."""
    return {
        (at + place, text[place], label)
        for start, end, label in spans
        for place in range(start, end)
        if text[place] != " "
    }


# --- answers ----------------------------------------------------------------------------------------------------------


def logits_of(task: TokenClassification, tags: list[str]) -> torch.Tensor:
    found = torch.zeros(len(tags), len(task.tags))
    for place, tag in enumerate(tags):
        found[place, task.tags.index(tag)] = 9.0
    return found


def test_answers_have_places_in_the_text_and_probabilities() -> None:
    task, text = tagger(), "Anna Lee met Bo."
    (answer,) = task.answers(logits_of(task, ["B-PER", "I-PER", "O", "I-LOC", "O"]), [text])
    (first, second) = answer["spans"]
    assert (first["start"], first["end"], first["text"], first["label"]) == (0, 8, "Anna Lee", "PER")
    assert (second["start"], second["end"], second["label"]) == (13, 15, "LOC")
    assert first["probability"] == pytest.approx(float(logits_of(task, ["O"]).softmax(-1).max()))
    with pytest.raises(DataError, match="ask with the text"):
        task.answers(torch.zeros(1, 5))


def test_metrics_count_whole_spans() -> None:
    task = tagger()
    examples = [
        Tagged("Anna Lee met Bo", ((0, 8, "PER"), (13, 15, "PER"))),
        Tagged("in Rome", ((3, 7, "LOC"),)),
        Tagged("nothing", ()),
    ]
    tags = ["B-PER", "O", "O", "B-PER", "O", "B-LOC", "O"]  # Anna alone is wrong, Bo and Rome are right
    metrics, answers = task.judge(logits_of(task, tags), examples)
    assert metrics["precision"] == metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["per_class"]["LOC"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert metrics["text_f1"] == pytest.approx((0.5 + 1 + 1) / 3)
    scores = [task.score(task.prediction_of(answer), each) for answer, each in zip(answers, examples, strict=True)]
    assert sum(scores) / 3 == pytest.approx(metrics["text_f1"])


def drawn(texts: int, words: int, *, sure: float, seed: int = 0) -> tuple[torch.Tensor, list[Tagged]]:
    """Logits (N, C) of a tagger that is too sure, and texts whose words are spans as often as they say without that."""
    generator, task = torch.Generator().manual_seed(seed), tagger()
    true = 1.5 * torch.randn(texts * words, len(task.tags), generator=generator)
    true[:, 2::2] = -30.0  # no tag I
    tags = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0].reshape(texts, words).tolist()
    spans = [
        tuple((5 * place, 5 * place + 4, task.labels[(tag - 1) // 2]) for place, tag in enumerate(own) if tag)
        for own in tags
    ]
    return sure * true, [Tagged(" ".join(["anna"] * words), each) for each in spans]


def test_one_temperature_for_all_words_makes_spans_as_probable_as_they_are() -> None:
    known, test = drawn(200, 10, sure=2.5), drawn(300, 10, sure=2.5, seed=1)
    task = tagger().calibrated(*known, chose_weights=False)
    assert task.calibration is not None
    assert task.calibration.temperature == pytest.approx(2.5, rel=0.1), "the control: the head is too sure"
    assert task.calibration.examples == 200, "a text counts once"
    before, (after, answers) = tagger().judge(*test)[0], task.judge(*test)
    assert (before["f1"], before["text_f1"]) == (after["f1"], after["text_f1"])
    assert before["ece"] > 0.15
    assert after["ece"] < 0.04
    spans = [(each, span) for answer, each in zip(answers, test[1], strict=True) for span in answer["spans"]]
    sure = np.array([span["probability"] for _, span in spans])
    right = np.array([(span["start"], span["end"], span["label"]) in each.spans for each, span in spans])
    bins = np.clip(np.ceil(sure * 15).astype(int) - 1, 0, 14)
    expected = sum(abs(sure[bins == place].sum() - right[bins == place].sum()) for place in range(15)) / len(sure)
    assert after["ece"] == pytest.approx(expected, abs=1e-9)
    chances = (test[0].double() / task.calibration.temperature).softmax(-1)
    own = chances[torch.arange(len(chances)), task.targets(test[1])]
    assert after["loss"] == pytest.approx(float(-own.log().mean()), abs=1e-5)
    assert after["loss"] < before["loss"]
    again = task_from_spec(json.loads(json.dumps(task.spec())), small_models.tokenizer("bert"))
    assert again.answers(test[0], [each.text for each in test[1]]) == answers


def test_many_words_of_few_texts_are_no_evidence_for_a_temperature() -> None:
    task = tagger().calibrated(*drawn(40, 60, sure=2.5), chose_weights=False)
    assert task.calibration is not None
    assert (task.calibration.temperature, task.calibration.examples) == (1.0, 40)
    assert tagger().calibrated(*drawn(19, 60, sure=2.5), chose_weights=False).calibration is None


def test_targets_are_the_tags_of_the_words_that_are_read() -> None:
    task = tagger()
    examples = [Tagged("Anna Lee met Bo", ((0, 8, "PER"),)), Tagged("", ())]
    assert [task.tags[each] for each in task.targets(examples).tolist()] == ["B-PER", "I-PER", "O", "O"]
    rows = task.encode_sources([each.asked for each in examples])
    assert [len(row.read) for row in rows] == [4, 0]
    with pytest.raises(DataError, match="unknown to this tagger"):
        task.targets([Tagged("Anna", ((0, 4, "ANIMAL"),))])


# --- the same numbers as transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TAGGED)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    base = bases.load(str(small_models.save_base(family, tmp_path)), task="tag", num_labels=5, dtype="float32")
    texts = ["a great film", "a dull story about the bank", "quick"]
    rows = [base.tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    with torch.no_grad():
        expected = torch.cat([base.model(input_ids=row[None]).logits[0] for row in rows])
        attach(base.model, LoRA(r=2))
        found = packed.tag_logits(base.model, [(row, torch.arange(len(row))) for row in rows])
        some = packed.tag_logits(base.model, [(row, torch.tensor([len(row) - 1, 0])) for row in rows])
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    starts = ends + 1 - torch.tensor([len(row) for row in rows])
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(some, expected[torch.stack([ends, starts], 1).flatten()], atol=1e-4)
    detach(base.model)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_base_without_a_head_for_tokens_is_one_line(family: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no head for tokens here"):
        bases.load(str(small_models.save_base(family, tmp_path)), task="tag", num_labels=5)
