"""Two texts in one row, numbers and levels: tokens equal the tokenizer's, metrics equal scikit-learn's and SciPy's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import small_models
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, ndcg_score
from small_models import FAMILIES, tokenizer
from small_tables import load
from torch.nn import functional as F

from turret import adapters
from turret.adapters import packed
from turret.adapters.hooks import hook_model
from turret.data import Labelled, Prompt, Scored, TextPair
from turret.data.dataset import read_inputs, read_rows
from turret.errors import DataError
from turret.recipe import Data, Task
from turret.tasks import make_task, metrics, task_from_spec
from turret.tasks.regression import Regression
from turret.tasks.rerank import Rerank
from turret.tasks.score import Score
from turret.tasks.text_pairs import TextPairs
from turret.train.batches import EncodedRows

TOKENIZERS = {family: tokenizer(family) for family in FAMILIES}
LABELS = ("no", "yes")
TEXTS = st.text(st.sampled_from("abc xyz,.!"), min_size=1, max_size=40)
SEPARATED = [
    name for name, known in TOKENIZERS.items() if len(known("a", "b").input_ids) - len(known("a").input_ids) > 1
]


def pairs(family: str = "bert", max_tokens: int = 64, **more: Any) -> TextPairs:
    return TextPairs(LABELS, TOKENIZERS[family], max_tokens, pairs=True, **more)


def numbers(pairs: bool = False, low: float = 0.0, high: float = 5.0) -> Regression:
    return Regression(TOKENIZERS["bert"], mean=2.0, deviation=1.5, low=low, high=high, pairs=pairs)


def levels(*labels: str) -> Score:
    return Score(labels or ("1", "2", "3"), TOKENIZERS["bert"])


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEPARATED)
@settings(max_examples=40, deadline=None)
@given(first=TEXTS, second=TEXTS, max_tokens=st.integers(6, 24))
def test_two_texts_are_encoded_and_cut_as_the_tokenizer_itself_would(
    family: str, first: str, second: str, max_tokens: int
) -> None:
    known = TOKENIZERS[family]
    assume(known(first, add_special_tokens=False)["input_ids"] and known(second, add_special_tokens=False)["input_ids"])
    (encoded,) = pairs(family, max_tokens).encode_sources([TextPair(first, second)])
    expected = known(first, second, truncation="longest_first", max_length=max_tokens)
    types = expected.get("token_type_ids", [0] * len(expected["input_ids"]))
    if encoded.ids.ndim == 2:
        assert encoded.ids[:, 1].tolist() == types
    else:
        assert not any(types)
    ids = encoded.ids if encoded.ids.ndim == 1 else encoded.ids[:, 0]
    assert ids.tolist() == expected["input_ids"]
    assert encoded.cut == (len(known(first, second)["input_ids"]) > max_tokens)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SEPARATED])
def test_a_tokenizer_that_parts_two_texts_by_nothing_gets_a_line_break(family: str) -> None:
    known = TOKENIZERS[family]
    plain = lambda text: known(text, add_special_tokens=False)["input_ids"]
    (encoded,) = pairs(family).encode_sources([TextPair("a fox", "a dog")])
    assert encoded.ids.ndim == 1
    ids = encoded.ids.tolist()
    middle = [*plain("a fox"), *plain("\n"), *plain("a dog")]
    assert any(ids[at : at + len(middle)] == middle for at in range(len(ids)))


def test_an_instruction_is_before_the_first_text_and_never_cut() -> None:
    task = pairs(max_tokens=20, prefix_text="a dull story ")
    (encoded,) = task.encode_sources([TextPair("fox " * 30, "dog " * 30)])
    text = TOKENIZERS["bert"].decode(encoded.ids[:, 0].tolist())
    assert text.startswith("[CLS] a dull story f")
    assert text.count("dog") >= 1
    (encoded,) = pairs(max_tokens=14, prefix_text="a dull story ").encode_sources([TextPair("fox " * 30, "dog " * 30)])
    assert TOKENIZERS["bert"].decode(encoded.ids[:, 0].tolist()).startswith("[CLS] a dull story ")
    with pytest.raises(DataError, match="max_tokens = 12 leaves no room"):
        pairs(max_tokens=12, prefix_text="a dull story ")


def test_rows_with_segments_come_out_of_the_cache_as_they_went_in() -> None:
    texts = [TextPair("a fox", "a lazy dog"), TextPair("great", "a film")]
    rows = EncodedRows(pairs(), [Labelled(each, "no") for each in texts])
    first, again = rows.take([0, 1]), rows.take([1, 0])
    assert first[0].source.ndim == 2
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one.source, other.source)
        assert one.source.dtype == other.source.dtype == torch.long


def test_an_input_of_another_kind_is_one_line() -> None:
    with pytest.raises(DataError, match=r"this text_pairs reads two texts, and one was given"):
        pairs().encode_sources(["a fox"])
    with pytest.raises(DataError, match="two texts were given, and this one is regression: give one text"):
        numbers().encode_sources([TextPair("a", "b")])
    with pytest.raises(DataError, match="a conversation is asked of a task that generates, and this one is score"):
        levels().encode_sources([Prompt.of("a")])


# --- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "roberta", "t5", "llama"])
def test_a_pass_of_rows_with_segments_gives_what_transformers_gives(family: str) -> None:
    model = small_models.build(family, "classify").eval()
    known = tokenizer(family)
    both = [("a fox", "a lazy dog"), ("a dull story about the bank", "great")]
    asked = [TextPair(*each) for each in both]
    own = [each.ids for each in TextPairs(LABELS, known, 64, pairs=True).encode_sources(asked)]
    alone = [torch.tensor(known("a film")["input_ids"])]  # a row without segments in the same pass
    expected = []
    for row in [*own, *alone]:
        types = {"token_type_ids": row[None, :, 1]} if row.ndim == 2 else {}
        ids = row[None, :, 0] if row.ndim == 2 else row[None]
        with torch.no_grad():
            expected.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), **types).logits[0])
    hook_model(model)
    with torch.no_grad():
        found = packed.classify_logits(model, [*own, *alone], [0, 0, 0])
        without = packed.classify_logits(model, [each if each.ndim == 1 else each[:, 0] for each in own], [0, 0])
    adapters.detach(model)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    if family == "bert":  # the control: the segments matter
        assert not torch.allclose(found[:2], without, atol=1e-3)


# --- tables ----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_columns_of_two_texts_are_found_and_rows_without_one_are_counted(tmp_path: Path) -> None:
    rows = [{"premise": f"a fox {i}", "hypothesis": "a dog", "label": LABELS[i % 2]} for i in range(20)]
    rows += [{"premise": "a cat", "hypothesis": "", "label": "yes"}, {"premise": "a cat", "hypothesis": "b"}]
    data = load(write(tmp_path / "a.jsonl", rows))
    assert data.kind == "text_pairs"
    assert data.columns == {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    assert isinstance(data.train[0].asked, TextPair)
    assert any("1 of 22 rows without 'hypothesis' is left out" in note for note in data.notes)
    assert any("1 of 22 rows without 'label' is left out" in note for note in data.notes)


def test_a_row_of_inputs_with_a_blank_beside_a_text_is_named(tmp_path: Path) -> None:
    rows = [{"premise": "a fox", "hypothesis": "a dog"}, {"premise": "a cat", "hypothesis": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"a\.jsonl line 2 has a blank in 'premise', 'hypothesis', which are read togeth"
    ):
        read_inputs(Data(source=str(path)), TextPairs.schema())
    asked = [row.input for row in read_rows(Data(source=str(path)), TextPairs.schema()).read()]
    assert asked == [TextPair("a fox", "a dog"), ""]  # `predict --out` flags the second one


def test_a_named_text_and_label_are_one_text_although_there_is_a_second(tmp_path: Path) -> None:
    rows = [{"question1": f"a fox {i}", "question2": "a dog", "label": LABELS[i % 2]} for i in range(20)]
    data = load(write(tmp_path / "a.jsonl", rows), text="question1", label="label")
    assert data.kind == "classify"
    assert load(write(tmp_path / "a.jsonl", rows), text="question1", text_pair="question2", label="label").kind == (
        "text_pairs"
    )


def test_numbers_are_read_also_with_a_decimal_comma_and_wrong_ones_are_one_line(tmp_path: Path) -> None:
    rows = [
        {"text": f"a fox {i}", "score": value} for i, value in enumerate([1, 2.5, "3,5", " 4.25 ", "n/a", *range(9)])
    ]
    data = load(write(tmp_path / "a.jsonl", rows))
    assert data.kind == "regression"
    found = {example.value for example in (*data.train, *data.test) if isinstance(example, Scored)}
    assert {2.5, 3.5, 4.25} <= found
    assert any("1 of 14 rows without 'score' is left out" in note for note in data.notes)
    for wrong in ("much", "1e999", "1_0", True, [1], "inf"):
        with pytest.raises(DataError, match=r"line 15, column 'score': expected a number such as 3\.5"):
            load(write(tmp_path / "b.jsonl", [*rows, {"text": "b", "score": wrong}]))


def test_a_label_of_fractions_is_no_class_but_a_score_when_asked(tmp_path: Path) -> None:
    rows = [{"text": f"a fox {i}", "rating": i % 5 + 1} for i in range(30)]
    assert load(write(tmp_path / "a.jsonl", rows), "score").kind == "score"
    assert load(write(tmp_path / "a.jsonl", rows), "regression", text="text", label="rating").kind == "regression"


def test_values_that_are_all_equal_teach_nothing(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [{"text": f"a fox {i}", "score": 2.5} for i in range(20)]))
    with pytest.raises(DataError, match="all training values are equal"):
        make_task(Task(), data, TOKENIZERS["bert"], "encoder")


def test_the_order_of_levels_that_are_words_is_asked_for(tmp_path: Path) -> None:
    rows = [{"text": f"a fox {i}", "level": ["low", "medium", "high"][i % 3]} for i in range(30)]
    data = load(write(tmp_path / "a.jsonl", rows), "score")
    with pytest.raises(DataError, match=r'the order of .*high.* is not known: set task.levels = \["lowest"'):
        make_task(Task(), data, TOKENIZERS["bert"], "encoder")
    with pytest.raises(DataError, match=r"task\.levels lacks 'high'"):
        make_task(Task(levels=["low", "medium"]), data, TOKENIZERS["bert"], "encoder")
    task = make_task(Task(levels=["low", "medium", "high"]), data, TOKENIZERS["bert"], "encoder")
    assert task.labels == ("low", "medium", "high")
    assert task.num_labels(task.labels) == 2


# --- numbers ---------------------------------------------------------------------------------------------------------

VALUES = st.lists(st.integers(-20, 20).map(lambda each: each / 4), min_size=3, max_size=30)


@settings(max_examples=60, deadline=None)
@given(values=VALUES, data=st.data())
def test_correlations_equal_those_of_scipy(values: list[float], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.integers(-20, 20).map(float), min_size=len(values), max_size=len(values)))
    assert metrics.ranks(values) == scipy.stats.rankdata(values).tolist()
    found = metrics.numbers(values, other)
    assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(values, other, strict=True)) / len(values))
    if len(set(values)) > 1 and len(set(other)) > 1:
        assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(values, other)[0], abs=1e-9)
        assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(values, other)[0], abs=1e-9)
    else:
        assert found["pearson"] == 0.0 == found["spearman"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_kappa_equals_that_of_scikit_learn(both: list[tuple[int, int]]) -> None:
    one, other = map(list, zip(*both, strict=True))
    assume(len(set(one)) > 1 or len(set(other)) > 1)
    expected = cohen_kappa_score(one, other, weights="quadratic", labels=range(4))
    assert metrics.quadratic_kappa(one, other, 4) == pytest.approx(expected, abs=1e-12)


def test_a_number_comes_back_in_units_of_the_data() -> None:
    task, examples = numbers(), [Scored("a", 0.5), Scored("b", 5.0)]
    targets = task.targets(examples)
    assert task.values(targets[:, None]) == pytest.approx([0.5, 5.0])
    assert task.loss(targets[:, None] + 1.0, targets).item() == pytest.approx(1.0)
    found = task.metrics(task.targets([Scored("", 1.5), Scored("", 4.0)])[:, None], targets)
    assert (found["mae"], found["nearness"], found["pearson"]) == pytest.approx((1.0, 0.8, 1.0), abs=1e-6)
    answer = task.answers(torch.tensor([[1.0]]))[0]
    assert answer == {"value": pytest.approx(3.5)}
    assert task.score(task.prediction_of(answer), Scored("", 3.0)) == pytest.approx(0.9)
    assert task.score("99", Scored("", 3.0)) == 0.0
    assert task_from_spec(json.loads(json.dumps(task.spec())), TOKENIZERS["bert"]).spec() == task.spec()
    shares = torch.tensor([1.0, 4.0, 4.0])
    assert task.guessing_loss([Scored("", float(each)) for each in shares]) == pytest.approx(
        float(((shares - shares.mean()) / 1.5).square().mean())
    )


def test_levels_have_probabilities_that_sum_to_one_and_the_median_is_answered() -> None:
    task = levels()
    logits = torch.tensor([[3.0, -3.0], [-2.0, -4.0], [2.0, 1.0], [-1.0, 1.0]])  # the last row does not fall
    answers = task.answers(logits)
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
        assert all(p >= 0 for p in answer["probabilities"].values())
    assert [answer["label"] for answer in answers] == ["2", "1", "3", "1"]
    targets = torch.tensor([1, 0, 2, 0])
    above = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(task.loss(logits, targets), F.binary_cross_entropy_with_logits(logits, above))
    found = task.metrics(logits, targets)
    assert (found["accuracy"], found["mae"], found["quadratic_kappa"], found["nearness"]) == (1.0, 0.0, 1.0, 1.0)
    assert task.score("1", Labelled("", "3")) == 0.0
    assert task.score("2", Labelled("", "3")) == 0.5


def test_no_constant_answer_has_a_lower_loss_than_guessing() -> None:
    task = levels("1", "2", "3", "4")
    examples = [Labelled("", each) for each in "1112233334"]
    free = torch.zeros(1, 3, requires_grad=True)
    targets, optimiser = task.targets(examples), torch.optim.LBFGS([free], max_iter=50)

    def closure() -> Any:
        optimiser.zero_grad()
        loss = task.loss(free.expand(10, 3), targets)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert closure().item() == pytest.approx(task.guessing_loss(examples), abs=1e-4)


def test_levels_are_calibrated_and_their_sets_hold_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    task, wanted = levels(), torch.randint(0, 3, (400,), generator=generator)
    logits = 4.0 * (wanted[:, None] - torch.tensor([0.5, 1.5]) + torch.randn(400, 1, generator=generator))
    examples = [Labelled("", task.labels[place]) for place in wanted.tolist()]
    fitted = task.calibrated(logits, examples, chose_weights=False)
    before, after = task.metrics(logits, wanted)["ece"], fitted.metrics(logits, wanted)["ece"]
    assert after < before
    sets = fitted.label_sets(logits, 0.9)
    inside = sum(task.labels[right] in each for right, each in zip(wanted.tolist(), sets, strict=True)) / 400
    assert 0.88 <= inside <= 0.95


# --- relevance -------------------------------------------------------------------------------------------------------


def relevance(highest: float = 1.0) -> Rerank:
    return Rerank(TOKENIZERS["bert"], highest=highest)


def graded(queries: int = 12, passages: int = 14, highest: int = 3, seed: int = 0) -> tuple[list[Scored], torch.Tensor]:
    """Passages with a grade for each query, shuffled, and logits that know a little of the grades."""
    draw = torch.Generator().manual_seed(seed)
    grades = torch.randint(0, highest + 1, (queries, passages), generator=draw)
    logits = grades.double().flatten()[:, None] + torch.randn(queries * passages, 1, generator=draw).double()
    rows = [
        Scored(TextPair(f"query {query}", f"passage {passage}"), float(grades[query, passage]))
        for query in range(queries)
        for passage in range(passages)
    ]
    order = torch.randperm(len(rows), generator=draw).tolist()
    return [rows[place] for place in order], logits[order]


def test_relevance_is_measured_as_scikit_learn_measures_it() -> None:
    task, (examples, logits) = relevance(highest=3.0), graded()
    targets = task.targets(examples)
    found = task.metrics(logits, targets)
    by_query: dict[str, tuple[list[float], list[float]]] = {}
    for example, logit in zip(examples, logits[:, 0].tolist(), strict=True):
        true, given = by_query.setdefault(example.text.text, ([], []))
        true.append(example.value / 3)
        given.append(logit)
    assert len(by_query) == 12
    assert found["ndcg"] == pytest.approx(
        sum(ndcg_score([true], [given], k=10) for true, given in by_query.values()) / len(by_query)
    )
    ranks = [
        1 + sum(other > max(g for g, t in zip(given, true, strict=True) if t > 0) for other in given)
        for true, given in by_query.values()
    ]
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    shares = [example.value / 3 for example in examples]
    given = logits[:, 0].sigmoid().tolist()
    assert found["accuracy"] == sum((a >= 0.5) == (b >= 0.5) for a, b in zip(given, shares, strict=True)) / len(shares)
    losses = [-b * math.log(a) - (1 - b) * math.log(1 - a) for a, b in zip(given, shares, strict=True)]
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    mean = sum(shares) / len(shares)
    assert task.guessing_loss(examples) == pytest.approx(-mean * math.log(mean) - (1 - mean) * math.log(1 - mean))
    worse = task.metrics(-logits, targets)
    assert all(worse[each] < found[each] for each in ("accuracy", "mrr", "ndcg")), "the control"


def test_a_temperature_changes_how_sure_relevance_is_and_no_rank() -> None:
    task, (examples, logits) = relevance(highest=3.0), graded(queries=60)
    logits = 6 * (logits - logits.mean())  # far too sure
    calibrated = task.calibrated(logits, examples, chose_weights=False)
    targets = task.targets(examples)
    before, after = task.metrics(logits, targets), calibrated.metrics(logits, targets)
    assert after["ece"] < before["ece"]
    assert after["loss"] < before["loss"]
    assert [after[each] for each in ("accuracy", "mrr", "ndcg")] == [
        before[each] for each in ("accuracy", "mrr", "ndcg")
    ]
    again = task_from_spec(json.loads(json.dumps(calibrated.spec())), TOKENIZERS["bert"])
    assert again.metrics(logits, targets) == after
    assert again.spec() == calibrated.spec()


def test_relevance_is_a_share_of_the_highest_and_never_below_zero() -> None:
    task = relevance(highest=2.0)
    pair = TextPair("a film", "a great film")
    rows = [Scored(pair, 0.0), Scored(pair, 1.0), Scored(pair, 2.0), Scored(TextPair("a book", "a film"), 4.0)]
    assert task.targets(rows).tolist() == [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert [task.score("0.6", row) for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert [task.score("0.4", row) for row in rows] == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(DataError, match=r"the relevance -1 is below 0"):
        task.targets([Scored(pair, -1.0)])
    with pytest.raises(DataError, match=r"no passage of the training table is relevant"):
        relevance(highest=0.0)
