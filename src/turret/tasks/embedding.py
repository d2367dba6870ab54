"""Embeddings: each text becomes a vector, and vectors of texts that belong together are near each other.

Axes: B examples, K texts of each (anchor, positive, negative), N = B K texts, M candidates, D numbers of a vector.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from turret.data import Dataset, Example, Input, Related, Schema, Scored, TextPair
from turret.data.cells import RowReader
from turret.data.columns import PAIRED, TRIPLE, Roles
from turret.errors import DataError
from turret.tasks.classify import HeadAnswers, TextInputs, stored_settings
from turret.tasks.regression import SPEARMAN, VALUES
from turret.tasks.shapes import Answer, Metrics, TaskSpec
from turret.tasks.task import (
    Embedding,
    Encoded,
    Gives,
    Measure,
    Mistake,
    Prediction,
    RequestKind,
    TaskSettings,
    register,
    shared_losses,
)
from turret.tasks.text_pairs import pair_column_names
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import HeadKind, Pooling
    from turret.families.family import Kind as FamilyKind

Objective = Literal["multiple_negatives", "cosent", "triplet"]
HEADLESS = "FEATURE_EXTRACTION"  # PEFT's task_type of a base without a head
ANCHORS = ("anchor", "query", "question", "search", "sentence")  # column names
POSITIVES = ("positive", "positives")
NEGATIVES = ("negative", "negatives", "hard_negative")
PAIRS = (  # column names of two texts that belong together, if the recipe names the task
    *(("query", "answer"), ("question", "answer"), ("query", "passage"), ("query", "document"), ("title", "body")),
    *(("title", "abstract"), ("sentence1", "sentence2"), ("text1", "text2"), ("text", "text_pair")),
)
SCALE = 20.0  # of a cosine, before it is an exponent
MARGIN = 5.0  # by which a negative should be further away than the positive
RANKED = 1024  # anchors whose candidates are ranked together
MOST_RANKED = 10  # places that count for the mean reciprocal rank


@register
class TextEmbedding(HeadAnswers):
    """A vector for each text, pooled from the base's last hidden states. There is no head.

    Args:
        objective: what is minimised, see `loss`.
        pooling, normalize: of the vectors, see `Embedding`.
        dimensions: the first so many numbers of a vector are trained to be enough; the largest is the length of a
            vector. (): all numbers that the base gives.
    """

    kind: ClassVar[str] = "embedding"
    head: ClassVar[HeadKind] = "embed"
    request: ClassVar[RequestKind] = "embed"
    pipeline_tag: ClassVar[str] = "sentence-similarity"
    gives: ClassVar[Gives] = "vectors"
    peft_task: ClassVar[str | None] = HEADLESS
    metric: ClassVar[str] = "main_score"
    rank_metric: ClassVar[str | None] = "spearman"
    metric_label: ClassVar[str] = "main score"
    spans: ClassVar[Literal["row", "batch"]] = "batch"
    bare: ClassVar[bool] = True
    solved: ClassVar[bool] = False
    measures: ClassVar[Mapping[str, Measure]] = {
        "main_score": Measure("main score", "Spearman for texts with a score, else the share of right texts"),
        "spearman": SPEARMAN,
        "pearson": Measure("Pearson", "the correlation of cosines and scores; 1 is a straight line upwards"),
        "accuracy_at_1": Measure("accuracy at 1", "how often the nearest text belongs to the anchor", share=True),
        "mrr_at_10": Measure("MRR at 10", "1 / the place of the first text that belongs to the anchor, as a mean"),
        "triplet_accuracy": Measure(
            "triplet accuracy", "how often the positive is nearer than the negative", share=True
        ),
        "loss": Measure("loss", "what the training minimises, over 128 examples at a time"),
    }
    errors: ClassVar[str] = "the worst texts"
    settings: ClassVar[tuple[str, ...]] = ("task.loss", "task.pooling", "task.normalize", "task.dimensions")
    instruction: str = "Represent the following text."

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int = 256,
        *,
        objective: Objective,
        pooling: Pooling,
        normalize: bool = True,
        dimensions: Sequence[int] = (),
        prefix_text: str = "",
    ) -> None:
        self.objective: Objective = objective
        self.dimensions = tuple(sorted(set(dimensions), reverse=True))
        self.pooling: Pooling = pooling
        self.embedding: Embedding = Embedding(pooling, max(dimensions, default=None), normalize)
        self.inputs = TextInputs(self.kind, tokenizer, max_tokens, prefix_text, pairs=False)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        pairs: list[tuple[str, ...]] = [(anchor, positive) for anchor in ANCHORS for positive in POSITIVES]
        names: dict[Roles, list[tuple[str, ...]]] = {
            TRIPLE[:2]: pairs,
            TRIPLE: [(*pair, negative) for pair in pairs for negative in NEGATIVES],
            PAIRED[:2]: list(PAIRS),
            PAIRED: pair_column_names(VALUES),
        }
        return Schema(cls.kind, names, ("anchor", "query", "text", "sentence"), _example, show=2)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        if family_kind == "encoder-decoder":
            raise DataError("an embedding needs a base with one stack of layers: name an encoder or a decoder as base")
        columns = dataset.columns
        usual: Objective = "cosent" if "label" in columns else "multiple_negatives"
        given = settings.loss or usual
        if given == "dpo" or given == "orpo" or (columns and (given == "cosent") != (usual == "cosent")):
            needed = "two texts and a score" if usual == "cosent" else "an anchor and a text that belongs to it"
            raise DataError(f"task.loss = {given!r} does not fit {needed}: leave task.loss out, for {usual}")
        if given == "triplet" and columns and "negative" not in columns:
            raise DataError("task.loss = 'triplet' needs texts that do not belong to the anchor: name data.negative")
        return cls(
            tokenizer,
            settings.max_tokens,
            objective=given,
            pooling=settings.pooling or ("last" if family_kind == "decoder" else "mean"),
            normalize=settings.normalize is not False,
            dimensions=settings.dimensions or (),
            prefix_text=settings.prefix_text,
        )

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        pooled = {"mean": "states.mean(0)", "first": "states[0]", "last": "states[-1]"}[str(spec["pooling"])]
        dimensions = spec.get("dimensions")
        cut = f"[:{max(dimensions)}]" if dimensions else ""
        vector = f"{pooled}{cut}"
        vector = f"torch.nn.functional.normalize({vector}, dim=0)" if spec.get("normalize", True) else vector
        return f"print({vector}.tolist())"

    @classmethod
    def from_words(cls, spec: TaskSpec, texts: Sequence[str]) -> Sequence[Input]:
        return [TextPair(*texts)] if len(texts) == 2 else texts

    # --- texts to tokens ----------------------------------------------------------------------------------------------

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]:
        return self._rows([(each.text, each.text_pair) if isinstance(each, TextPair) else (each,) for each in inputs])

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        return [(row, None) for row in self._rows([_texts(example) for example in examples])]

    def _rows(self, examples: Sequence[Sequence[Input]]) -> list[Encoded]:
        """A row for each example: its texts one after another. `read`: the last token of each, if they are several."""
        import torch

        encoded = iter(self.inputs.encode([text for texts in examples for text in texts]))
        rows = []
        for texts in examples:
            own = [next(encoded) for _ in texts]
            ends = torch.tensor([len(each.ids) for each in own]).cumsum(0) - 1
            ids, cut = torch.cat([each.ids for each in own]), any(each.cut for each in own)
            rows.append(Encoded(ids, cut=cut, read=ends if len(own) > 1 else None))
        return rows

    # --- losses -------------------------------------------------------------------------------------------------------

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """The scores (B,) float32 of pairs; else the number of each text among those of these examples (B, K)."""
        import torch

        if self.objective == "cosent":
            return torch.tensor([_score_of(example) for example in examples], dtype=torch.float32)
        numbers = dict[Input, int]()
        rows = [[numbers.setdefault(text, len(numbers)) for text in _texts(example)] for example in examples]
        return torch.tensor(rows, dtype=torch.long).reshape(len(examples), -1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, or the sum of those of all `dimensions`: a scalar.

        Source of the sum: Kusupati et al. 2022, "Matryoshka Representation Learning".

        Args:
            logits: the pooled hidden states of all texts, those of an example one after another: (N, D).
            targets: as `targets` gives them for the examples.
        """
        function = {"multiple_negatives": multiple_negatives, "cosent": cosent, "triplet": triplet}[self.objective]
        pooled = logits.view(len(targets), -1, logits.shape[-1])  # (B, K, D)
        every = [replace(self.embedding, dimensions=each) for each in self.dimensions or (None,)]
        losses = [function(each.vectors(pooled), targets) for each in every]
        return sum(losses[1:], losses[0])

    # --- metrics and answers ------------------------------------------------------------------------------------------

    def judge(self, logits: Tensor, examples: Sequence[Example]) -> tuple[Metrics, list[Answer]]:
        """Metrics and answers. logits: the pooled hidden states of all texts (N, D)."""
        import torch

        texts = len(logits) // max(1, len(examples))
        outputs = logits.view(len(examples), texts, -1).double()  # (B, K, D)
        found = {d: self._judge_outputs(outputs, examples, d) for d in self.dimensions or (None,)}
        metrics, answers = next(iter(found.values()))
        if len(found) > 1:
            metrics |= {f"main_score_{d}": each["main_score"] for d, (each, _) in found.items()}
        if self._learns_from(examples):
            losses = shared_losses(self, torch.split(logits, texts), examples)
            metrics |= {"loss": math.fsum(losses) / max(1, len(losses))}
        return metrics, answers

    def _learns_from(self, examples: Sequence[Example]) -> bool:
        """Whether the loss can be computed for these examples."""
        if self.objective == "cosent":
            return all(isinstance(example, Scored) for example in examples)
        fewest = 3 if self.objective == "triplet" else 2
        return all(isinstance(example, Related) and len(_texts(example)) >= fewest for example in examples)

    def _judge_outputs(
        self, outputs: Tensor, examples: Sequence[Example], dimensions: int | None
    ) -> tuple[dict[str, float], list[Answer]]:
        import torch.nn.functional as F

        from turret.tasks import metrics

        unit = F.normalize(outputs[..., :dimensions], dim=-1)  # (B, K, d)
        exact = (unit[:, 0] * unit[:, 1]).sum(-1).tolist()
        # As `prediction_of` gives them: equal texts have equal ranks.
        similar = [float(f"{each:.6g}") for each in exact]
        if all(isinstance(example, Scored) for example in examples):
            true = [_score_of(example) for example in examples]
            spearman = metrics.pearson(metrics.ranks(similar), metrics.ranks(true))
            found = {"main_score": spearman, "spearman": spearman, "pearson": metrics.pearson(similar, true)}
            return found, [{"value": each} for each in similar]
        nearest, places = _rank_texts(unit, examples)
        first = sum(place == 1 for place in places) / max(1, len(places))
        mrr = math.fsum(1 / place for place in places if place <= MOST_RANKED) / max(1, len(places))
        found = {"main_score": first, "accuracy_at_1": first, "mrr_at_10": mrr}
        if unit.shape[1] > 2:
            against = (unit[:, :1] * unit[:, 2:]).sum(-1).amax(-1).tolist()
            right = [own > other for own, other in zip(similar, against, strict=True)]
            accuracy = sum(right) / max(1, len(right))
            found |= {"main_score": accuracy, "triplet_accuracy": accuracy}
            nearest = [str(_texts(each)[1 if hit else 2]) for each, hit in zip(examples, right, strict=True)]
        return found, [
            {"value": own, "nearest": text, "place": place}
            for own, text, place in zip(similar, nearest, places, strict=True)
        ]

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        """`{"embedding"}` for a text, `{"value"}`, the cosine, for two. logits: pooled hidden states (N, D) of all."""
        import torch.nn.functional as F

        vectors = self.embedding.vectors(logits)
        answers, start = list[Answer](), 0
        for each in inputs:
            if isinstance(each, TextPair):
                own = F.normalize(vectors[start : start + 2].double(), dim=-1)
                answers.append({"value": float((own[0] * own[1]).sum().clamp(-1, 1))})
                start += 2
            else:
                answers.append({"embedding": vectors[start].tolist()})
                start += 1
        return answers

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        if "embedding" in answer:
            return json.dumps(answer["embedding"])
        return str(answer.get("nearest") or f"{float(answer['value']):.6g}")

    def scores(self, given: Sequence[Prediction], examples: Sequence[Example]) -> list[float]:
        """1 for a right text. Of pairs with scores: 1 - (z - y)^2 / 2, whose mean is Spearman's correlation.

        z, y: the ranks of the similarities and of the scores, with mean 0 and variance 1.
        """
        if not all(isinstance(example, Scored) for example in examples):
            return [float(each in example.references) for each, example in zip(given, examples, strict=True)]
        z, y = (
            _standard(values)
            for values in ([float(str(each)) for each in given], [_score_of(example) for example in examples])
        )
        return [1 - (a - b) ** 2 / 2 for a, b in zip(z, y, strict=True)]

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        """The anchors whose nearest text is wrong, or the pairs whose places by cosine and by score differ most."""
        found = super().worst(examples, answers)
        if any("place" not in answer for answer in answers):
            return found
        placed = [replace(each, error=f"right at place {answers[each.row]['place']}") for each in found]
        return sorted(placed, key=lambda each: -int(answers[each.row]["place"]))

    def score(self, given: Prediction, example: Example) -> float:
        return self.scores([given], [example])[0]

    @classmethod
    def line(cls, answer: Answer) -> str:
        if "value" in answer:
            return f"{float(answer['value']):.3f}"
        vector = answer["embedding"]
        return f"{len(vector)} numbers: {' '.join(f'{float(each):.3f}' for each in vector[:4])} …"

    # --- stored with the adapter --------------------------------------------------------------------------------------

    def spec(self) -> TaskSpec:
        return super().spec() | {
            "loss": self.objective,
            "pooling": self.pooling,
            "normalize": self.embedding.normalize,
            "dimensions": list(self.dimensions) or None,
        }

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        settings = stored_settings(spec, "loss") | {"objective": spec["loss"], "dimensions": spec["dimensions"] or ()}
        return cls(tokenizer, **settings)


# --- losses -----------------------------------------------------------------------------------------------------------


def multiple_negatives(vectors: Tensor, numbers: Tensor) -> Tensor:
    """The mean over examples of -log softmax_c(SCALE cos(anchor, c)) at the anchor's positive: a scalar.

    The candidates c are the positives and negatives of the whole batch. A candidate that equals the anchor, or another
    positive of an equal anchor, is no negative and is left out.

    Source: Henderson et al. 2017, "Efficient Natural Language Response Suggestion for Smart Reply".

    Args:
        vectors: (B, K, d).
        numbers: of the texts, equal for equal texts: (B, K).
    """
    import torch
    import torch.nn.functional as F

    anchors, candidates = vectors[:, 0], vectors[:, 1:].transpose(0, 1).flatten(0, 1)  # (B, d), (M, d)
    cosines = F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T  # (B, M)
    own, texts = numbers[:, 0], numbers[:, 1:].T.flatten()
    same = (own[:, None] == own).float()  # (B, B)
    right = same @ (numbers[:, 1, None] == texts).float() > 0  # (B, M)
    left_out = right | (own[:, None] == texts)
    rows = torch.arange(len(own), device=vectors.device)
    left_out[rows, rows] = False
    return F.cross_entropy((SCALE * cosines).masked_fill(left_out, -math.inf), rows)


def cosent(vectors: Tensor, scores: Tensor) -> Tensor:
    """log(1 + sum over pairs of examples with y_i < y_j of exp(SCALE (cos_i - cos_j))): a scalar.

    Source: Huang et al. 2024, "CoSENT: Consistent Sentence Embedding via Similarity Ranking".

    Args:
        vectors: (B, 2, d).
        scores: y (B,).
    """
    import torch
    import torch.nn.functional as F

    cosines = SCALE * F.cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)  # (B,)
    wrong = (cosines[:, None] - cosines)[scores[:, None] < scores]  # (pairs,)
    return torch.cat([cosines.new_zeros(1) + 0.0 * cosines.sum(), wrong]).logsumexp(0)


def triplet(vectors: Tensor, numbers: Tensor) -> Tensor:
    """The mean over examples of max(0, |anchor - positive| - |anchor - negative| + MARGIN): a scalar.

    Source: Schroff et al. 2015, "FaceNet".

    Args:
        vectors: (B, K, d).
    """
    import torch.nn.functional as F

    near = F.pairwise_distance(vectors[:, :1], vectors[:, 1:2])  # (B, 1)
    far = F.pairwise_distance(vectors[:, :1], vectors[:, 2:])  # (B, K - 2)
    return F.relu(near - far + MARGIN).mean()


# --- examples ---------------------------------------------------------------------------------------------------------


def _example(row: RowReader) -> Example:
    if row.has("label"):
        text = row.asked_text()
        assert isinstance(text, TextPair)
        return Scored(text, row.number("label"))
    if row.has("text"):
        return Related(row.text("text"), row.text("text_pair"))
    positive = row.texts("positive")
    first, *others = [positive] if isinstance(positive, str) else positive
    negatives = (row.text("negative"),) if row.has("negative") else ()
    return Related(row.text("anchor"), first, negatives, tuple(others))


def _texts(example: Example) -> Sequence[Input]:
    """The texts of an example that become vectors: two, or an anchor, a positive and a negative."""
    if isinstance(example, Related):
        return (example.anchor, example.positive, *example.negatives)
    asked = example.asked
    return (asked.text, asked.text_pair) if isinstance(asked, TextPair) else (asked,)


def _score_of(example: Example) -> float:
    if not isinstance(example, Scored):
        raise DataError("this version learnt from two texts and their score: give a table with such columns")
    return example.value


def _rank_texts(unit: Tensor, examples: Sequence[Example]) -> tuple[list[str], list[int]]:
    """For each anchor the nearest text, and the place of the nearest right one, among all texts of the examples.

    The anchor's own text is no candidate. unit: vectors of length 1, (B, K, d).
    """
    import torch

    numbers, places = dict[Input, int](), list[int]()
    for row, example in enumerate(examples):
        for number, text in enumerate(_texts(example)[1:], 1):
            if text not in numbers:
                numbers[text] = len(numbers)
                places.append(row * unit.shape[1] + number)
    candidates, anchors = unit.flatten(0, 1)[places], unit[:, 0]  # (M, d), (B, d)
    right: dict[str, set[int]] = {example.input: set() for example in examples}
    for example in examples:
        right[example.input].update(numbers[text] for text in example.references if text in numbers)
    known, nearest, ranks = list(numbers), list[str](), list[int]()
    for start in range(0, len(examples), RANKED):
        scores = anchors[start : start + RANKED] @ candidates.T  # (R, M)
        for row, example in zip(scores, examples[start : start + RANKED], strict=True):
            own = sorted(right[example.input])
            if (itself := numbers.get(example.input)) is not None and itself not in own:
                row[itself] = -math.inf
            others = torch.ones_like(row, dtype=torch.bool).index_fill_(0, torch.tensor(own), False)
            ranks.append(1 + int((others & ~(row < row[~others].max())).sum()))  # an equal one, or a NaN, is before it
            nearest.append(str(example.output if ranks[-1] == 1 else known[int(row.argmax())]))
    return nearest, ranks


def _standard(values: Sequence[float]) -> list[float]:
    """The ranks of some values, with mean 0 and variance 1; 0 if all are equal."""
    from turret.tasks import metrics

    ranks = metrics.ranks(values)
    mean = math.fsum(ranks) / max(1, len(ranks))
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in ranks) / max(1, len(ranks)))
    return [(each - mean) / deviation if deviation else 0.0 for each in ranks]
