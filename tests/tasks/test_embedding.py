"""Embeddings: losses equal a plain reference and sentence-transformers' own, metrics equal SciPy's, rows keep texts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import tiny_training as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import tokenizer
from small_tables import load
from torch import Tensor
from torch.nn import functional as F

from turret import adapters
from turret.adapters.packed import texts_in
from turret.data import Example, Prompt, Related, Scored, TextPair
from turret.errors import DataError
from turret.methods import LoRA
from turret.recipe import Task
from turret.tasks import main_metric, make_task, task_from_spec
from turret.tasks.embedding import TextEmbedding
from turret.tasks.task import TOGETHER
from turret.train.batches import EncodedRows, micro_batches
from turret.train.evaluation import evaluate, example_losses

BERT = tokenizer("bert")
TEXTS = st.text(st.sampled_from("abc xyz,.!"), min_size=1, max_size=40)


def embedding(objective: str = "multiple_negatives", **more: Any) -> TextEmbedding:
    return TextEmbedding(BERT, objective=objective, **{"pooling": "mean", **more})  # type: ignore[arg-type]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def related(count: int, negatives: bool = False) -> list[Related]:
    return [Related(f"a{n}", f"p{n}", (f"n{n}",) if negatives else ()) for n in range(count)]


def scored(*values: float) -> list[Scored]:
    return [Scored(TextPair(f"a{n}", f"b{n}"), value) for n, value in enumerate(values)]


# --- losses, by loops -------------------------------------------------------------------------------------------------


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other) / (one.norm() * other.norm())


def multiple_negatives_by_loops(vectors: Tensor) -> Tensor:
    """No text is equal to another one."""
    B, K, _ = vectors.shape
    candidates = [vectors[row, number] for number in range(1, K) for row in range(B)]
    losses = []
    for row in range(B):
        logits = torch.stack([20 * cosine(vectors[row, 0], each) for each in candidates])
        losses.append(logits.logsumexp(0) - logits[row])
    return torch.stack(losses).mean()


def cosent_by_loops(vectors: Tensor, scores: Tensor) -> Tensor:
    total = vectors.new_tensor(1.0)
    cosines = [20 * cosine(*each) for each in vectors]
    for one, low in enumerate(scores):
        for other, high in enumerate(scores):
            if low < high:
                total = total + (cosines[one] - cosines[other]).exp()
    return total.log()


def triplet_by_loops(vectors: Tensor) -> Tensor:
    gaps = [(a - p + 1e-6).norm() - (a - n + 1e-6).norm() + 5 for a, p, n in vectors]
    return torch.stack([each.clamp(min=0) for each in gaps]).mean()


def loss_of(task: TextEmbedding, vectors: Tensor, examples: list[Any]) -> Tensor:
    return task.loss(vectors.flatten(0, 1), task.targets(examples))


@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("dimensions", [(), (6, 3)])
def test_multiple_negatives_equals_a_loop_over_all_candidates(negatives: bool, dimensions: tuple[int, ...]) -> None:
    vectors, task = drawn(5, 2 + negatives, 8), embedding(dimensions=dimensions)
    expected = [multiple_negatives_by_loops(vectors[..., :each]) for each in dimensions or (8,)]
    found = loss_of(task, vectors, related(5, negatives))
    assert found.item() == pytest.approx(sum(each.item() for each in expected), rel=1e-6)
    (own,), (true,) = (torch.autograd.grad(each, vectors) for each in (found, sum(expected)))
    assert torch.allclose(own, true, atol=1e-6)


def test_cosent_equals_a_loop_over_pairs_of_examples_and_equal_scores_are_no_pair() -> None:
    vectors, examples = drawn(6, 2, 8), scored(1, 3, 3, 0.5, 5, 1)
    expected = cosent_by_loops(vectors, torch.tensor([1, 3, 3, 0.5, 5, 1]))
    assert loss_of(embedding("cosent"), vectors, examples).item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss_of(embedding("cosent"), vectors, scored(2, 2, 2, 2, 2, 2)).item() == 0.0


def test_triplet_equals_a_loop_and_far_negatives_cost_nothing() -> None:
    vectors, examples = drawn(4, 3, 8), related(4, negatives=True)
    task = embedding("triplet", normalize=False)
    assert loss_of(task, vectors, examples).item() == pytest.approx(triplet_by_loops(vectors).item(), rel=1e-6)
    far = torch.zeros(4, 3, 8)
    far[:, 2] = 100.0
    assert loss_of(task, far, examples).item() == 0.0


def test_a_text_that_belongs_to_the_anchor_too_is_no_negative() -> None:
    vectors, task = drawn(4, 2, 8), embedding()
    twins = [Related("a0", "p0"), Related("a0", "p1"), Related("a2", "p2"), Related("p2", "a2")]
    numbers = task.targets(twins)
    assert numbers[0, 0] == numbers[1, 0]
    assert numbers[2].tolist() == numbers[3].tolist()[::-1]
    logits = [
        [20 * cosine(vectors[0, 0], vectors[each, 1]) for each in (0, 2, 3)],
        [20 * cosine(vectors[1, 0], vectors[each, 1]) for each in (1, 2, 3)],
        [20 * cosine(vectors[2, 0], vectors[each, 1]) for each in (2, 0, 1)],
        [20 * cosine(vectors[3, 0], vectors[each, 1]) for each in (3, 0, 1)],
    ]
    expected = torch.stack([torch.stack(each).logsumexp(0) - each[0] for each in logits]).mean()
    assert loss_of(task, vectors, twins).item() == pytest.approx(expected.item(), rel=1e-6)
    control = loss_of(task, vectors, related(4))
    assert control.item() > expected.item(), "the control: different texts are all negatives"


def test_a_pass_of_one_example_has_a_loss_with_a_graph() -> None:
    for objective, examples, texts in (
        ("multiple_negatives", related(1), 2),
        ("cosent", scored(3.0), 2),
        ("triplet", related(1, True), 3),
    ):
        vectors = drawn(1, texts, 8)
        loss = loss_of(embedding(objective), vectors, examples)
        assert math.isfinite(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None


# --- losses, by sentence-transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [(), (8, 5, 3)])
@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CoSENTLoss", "TripletLoss"])
def test_losses_and_gradients_equal_those_of_sentence_transformers(name: str, dimensions: tuple[int, ...]) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    from sentence_transformers import SentenceTransformer

    class Given(torch.nn.Module):
        """The only part of a model that gives its inputs: vectors."""

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": features["vectors"]}

        def get_embedding_dimension(self) -> int:
            return 8

    model = SentenceTransformer(modules=[Given()], device="cpu")
    vectors = drawn(7, 3 if name == "TripletLoss" else 2, 8)
    objective = {"CoSENTLoss": "cosent", "TripletLoss": "triplet"}.get(name, "multiple_negatives")
    values = [0.2, 4.0, 4.0, 1.0, 2.5, 0.2, 3.0]
    examples: list[Any] = scored(*values) if objective == "cosent" else related(7, objective == "triplet")
    other = getattr(losses, name)(model)
    if dimensions:
        other = losses.MatryoshkaLoss(model, other, list(dimensions))
    task = embedding(objective, dimensions=dimensions, normalize=bool(dimensions))
    columns = [{"vectors": vectors[:, number]} for number in range(vectors.shape[1])]
    expected = other(columns, torch.tensor(values, dtype=torch.float64))
    found = loss_of(task, vectors, examples)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (own,), (true,) = (torch.autograd.grad(each, vectors) for each in (found, expected))
    assert torch.allclose(own, true, atol=1e-5 * float(true.abs().max()))


# --- rows -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(first=TEXTS, second=TEXTS, max_tokens=st.integers(4, 24))
def test_each_text_of_an_example_is_encoded_and_cut_as_alone(first: str, second: str, max_tokens: int) -> None:
    task = embedding(max_tokens=max_tokens)
    alone = [task.encode_sources([text])[0] for text in (first, second)]
    (both,) = task.encode_sources([TextPair(first, second)])
    for text, one, own in zip((first, second), alone, texts_in((both.ids, both.read)), strict=True):
        assert own.tolist() == one.ids.tolist()
        assert own.tolist() == BERT(text, truncation=True, max_length=max_tokens)["input_ids"]
    assert both.cut == any(each.cut for each in alone)


def test_rows_come_out_of_the_cache_as_they_went_in_and_their_tokens_are_those_of_all_texts() -> None:
    rows = EncodedRows(embedding(), [Related("a fox", "a lazy dog", ("a bank",)), Related("great", "a film", ("b",))])
    first, again = rows.take([0, 1]), rows.take([0, 1])
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.source, other.source)
        assert len(texts_in((other.source, other.read))) == 3
        assert one.tokens == len(one.source)
    assert len(micro_batches(first, first[0].tokens)) == 2


def test_a_conversation_is_one_line() -> None:
    with pytest.raises(DataError, match="a conversation is asked of a task that generates, and this one is embedding"):
        embedding().encode_sources([Prompt.of("a")])


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_pairs_with_scores_are_judged_by_the_correlations_of_scipy() -> None:
    examples = scored(1, 3, 3, 0.5, 5, 1)
    vectors = drawn(6, 2, 8).detach()
    metrics, answers = embedding("cosent").judge(vectors.flatten(0, 1).float(), examples)
    similar = F.cosine_similarity(vectors[:, 0], vectors[:, 1]).tolist()
    assert [each["value"] for each in answers] == pytest.approx(similar, abs=1e-6)
    values = [each.value for each in examples]
    assert metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(similar, values).statistic)
    assert metrics["pearson"] == pytest.approx(scipy.stats.pearsonr(similar, values).statistic, abs=1e-6)
    assert metrics["main_score"] == metrics["spearman"]
    task = embedding("cosent")
    scores = task.scores([task.prediction_of(each) for each in answers], examples)
    assert sum(scores) / len(scores) == pytest.approx(metrics["spearman"]), "compare judges what evaluate reports"
    assert metrics["loss"] == pytest.approx(loss_of(task, vectors.float(), examples).item(), rel=1e-5)


def test_every_evaluation_divides_examples_into_the_same_batches() -> None:
    """The loss compares the examples of a batch, so other batches would give another loss."""
    base, task = tiny.base("bert"), embedding(max_tokens=16)
    adapters.attach(base.model, LoRA(r=2), generator=torch.Generator().manual_seed(0))
    examples = [Related(f"a fox {n}", f"a great film {n}") for n in range(TOGETHER + 40)]
    metrics, _ = evaluate(base.model, task, examples)
    losses, weights = example_losses(base.model, task, EncodedRows(task, examples))
    assert (len(losses), set(weights)) == (len(examples), {1})
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert len(set(losses)) == 2
    halves = [evaluate(base.model, task, examples[part])[0]["loss"] for part in (slice(0, 84), slice(84, None))]
    assert abs(metrics["loss"] - sum(halves) / 2) > 1e-2, "the control: other batches"


def test_anchors_are_judged_by_the_place_of_a_right_text_among_all() -> None:
    examples = [Related("a", "x"), Related("b", "y"), Related("c", "z"), Related("a", "w")]
    unit = lambda degrees: [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]
    anchors, texts = (0, 90, 200, 0), (10, 40, 60, 170)  # for b: y is at 50 degrees, z at 30; w is right for a
    vectors = torch.tensor([[unit(a), unit(t)] for a, t in zip(anchors, texts, strict=True)])
    metrics, answers = embedding().judge(vectors.flatten(0, 1), examples)
    assert [each["place"] for each in answers] == [1, 2, 2, 1]
    assert [each["nearest"] for each in answers] == ["x", "z", "w", "w"]
    assert metrics["accuracy_at_1"] == metrics["main_score"] == 0.5
    assert metrics["mrr_at_10"] == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    task = embedding()
    assert task.scores([task.prediction_of(each) for each in answers], examples) == [1.0, 0.0, 0.0, 1.0]


def test_triplets_are_judged_by_the_nearer_of_both_texts_and_by_dimensions() -> None:
    vectors = torch.tensor([[[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0]], [[0.0, 1, 1], [1, 0.1, 0.2], [0.5, 0.5, 0]]])
    examples = related(2, negatives=True)
    metrics, answers = embedding(dimensions=[3, 2]).judge(vectors.flatten(0, 1), examples)
    assert metrics["triplet_accuracy"] == metrics["main_score"] == metrics["main_score_3"] == 0.5
    assert metrics["main_score_2"] == 0.5
    assert [each["nearest"] for each in answers] == ["p0", "n1"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 5)), min_size=2, max_size=30))
def test_the_mean_of_the_scores_is_spearmans_correlation_also_with_ties(rows: list[tuple[float, int]]) -> None:
    task, examples = embedding("cosent"), scored(*(value for _, value in rows))
    scores = task.scores([f"{similar:.6g}" for similar, _ in rows], examples)
    similar, values = [float(f"{each:.6g}") for each, _ in rows], [value for _, value in rows]
    if len(set(similar)) > 1 and len(set(values)) > 1:
        expected = scipy.stats.spearmanr(similar, values).statistic
        assert sum(scores) / len(scores) == pytest.approx(expected, abs=1e-9)


# --- answers, settings, columns ---------------------------------------------------------------------------------------


def test_a_text_is_answered_by_its_vector_and_two_by_their_similarity() -> None:
    pooled = torch.tensor([[3.0, 4.0, 12.0], [1.0, 0.0, 0.0], [1.0, 1.0, 5.0]])
    task = embedding(dimensions=[2])
    one, two = task.answers(pooled, ["a", TextPair("b", "c")])
    assert one["embedding"] == pytest.approx([0.6, 0.8])
    assert two["value"] == pytest.approx(math.sqrt(0.5))
    plain = embedding(normalize=False)
    assert plain.answers(pooled[:1], ["a"])[0]["embedding"] == [3.0, 4.0, 12.0]
    assert TextEmbedding.line(two) == "0.707"
    assert TextEmbedding.line(one) == "2 numbers: 0.600 0.800 …"
    assert TextEmbedding.prediction_of(one) == "[0.6000000238418579, 0.800000011920929]"


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_vectors_that_are_all_equal_or_no_numbers_find_nothing(value: float) -> None:
    metrics, _ = embedding().judge(torch.full((6, 4), value), related(3, negatives=False))
    assert metrics["accuracy_at_1"] == 0
    assert metrics["mrr_at_10"] <= 1 / 3


def test_metrics_of_fewer_dimensions_are_those_of_an_embedding() -> None:
    values = {"main_score": 0.9, "spearman": 0.9, "pearson": 0.8, "loss": 5.1, "main_score_64": 0.85}
    assert main_metric(values) == "main_score"


def test_a_stored_task_is_the_same_again() -> None:
    task = embedding("triplet", dimensions=[16, 64], normalize=False, pooling="last", prefix_text="q: ", max_tokens=99)
    assert task.dimensions == (64, 16)
    assert task_from_spec(task.spec(), BERT).spec() == task.spec()


def table(tmp_path: Path, header: str, rows: int = 12) -> Any:
    names = header.split(",")
    path = tmp_path / "table.csv"
    cells = lambda row: ",".join(str(row % 5) if name in ("score", "label") else f"{name} {row}" for name in names)
    path.write_text("\n".join([header, *map(cells, range(rows))]) + "\n")
    return path


@pytest.mark.parametrize(
    ("header", "task", "kind", "loss"),
    [
        ("anchor,positive", {}, Related, "multiple_negatives"),
        ("query,positive", {}, Related, "multiple_negatives"),
        ("anchor,positive,negative", {}, Related, "multiple_negatives"),
        ("anchor,positive,negative", {"loss": "triplet"}, Related, "triplet"),
        ("question,answer", {"kind": "embedding"}, Related, "multiple_negatives"),
        ("sentence1,sentence2,score", {"kind": "embedding"}, Scored, "cosent"),
        ("text,text_pair,score", {"kind": "embedding"}, Scored, "cosent"),
    ],
)
def test_columns_say_the_loss(tmp_path: Path, header: str, task: Any, kind: type[Example], loss: str) -> None:
    dataset = load(table(tmp_path, header), task.get("kind"))
    assert dataset.kind == "embedding"
    assert all(isinstance(each, kind) for each in dataset.train)
    made = make_task(Task.model_validate(task), dataset, BERT, "encoder")
    assert isinstance(made, TextEmbedding)
    assert made.objective == loss
    assert made.embedding.pooling == "mean"
    assert make_task(Task.model_validate(task), dataset, BERT, "decoder").spec()["pooling"] == "last"


def test_texts_with_a_score_are_a_regression_unless_the_recipe_says_embedding(tmp_path: Path) -> None:
    assert load(table(tmp_path, "sentence1,sentence2,score")).kind == "regression"


def test_several_positives_are_an_example_each_in_training(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"query": "q{n}", "positive": ["a{n}", "b{n}"]}}\n' for n in range(10)))
    dataset = load(path, test=2)
    assert len(dataset.train) == 16
    assert {each.output for each in dataset.train} <= {f"{letter}{n}" for n in range(10) for letter in "ab"}
    assert all(len(each.references) == 2 for each in dataset.test)


@pytest.mark.parametrize(
    ("header", "task", "line"),
    [
        ("anchor,positive", {"loss": "triplet"}, "task.loss = 'triplet' needs texts that do not belong to the anchor"),
        ("anchor,positive", {"loss": "cosent"}, "task.loss = 'cosent' does not fit an anchor and a text that belongs"),
        ("anchor,positive", {"loss": "dpo"}, "task.loss = 'dpo' does not fit an anchor and a text that belongs to it"),
        ("text,text_pair,score", {"loss": "triplet"}, "task.loss = 'triplet' does not fit two texts and a score"),
    ],
)
def test_a_loss_that_does_not_fit_is_one_line(tmp_path: Path, header: str, task: Any, line: str) -> None:
    task = {"kind": "embedding", **task}
    dataset = load(table(tmp_path, header), task.get("kind"))
    with pytest.raises(DataError, match=line) as caught:
        make_task(Task.model_validate(task), dataset, BERT, "encoder")
    assert len(str(caught.value)) < 300


def test_a_base_with_two_stacks_and_a_preference_with_a_loss_of_embeddings_are_one_line(tmp_path: Path) -> None:
    dataset = load(table(tmp_path, "anchor,positive"))
    with pytest.raises(DataError, match="an embedding needs a base with one stack of layers"):
        make_task(Task(), dataset, BERT, "encoder-decoder")
    dataset = load(table(tmp_path, "prompt,chosen,rejected"))
    with pytest.raises(DataError, match=r"task\.loss = 'cosent' does not fit preferences"):
        make_task(Task(loss="cosent"), dataset, tokenizer("llama"), "decoder")
