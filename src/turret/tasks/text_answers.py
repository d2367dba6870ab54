"""What tasks that generate share: how their answers are generated, read, printed and scored.

Axes: N target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

from turret.data import Example, Input, Prompt, TextPair
from turret.errors import DataError
from turret.tasks.calibration import Calibration, Confidences
from turret.tasks.shapes import Answer, Generation, HeadConfig, Metrics, TaskSpec
from turret.tasks.task import Decision, Encoded, Measure, Mistake, Prediction, RequestKind, Task, by_score
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import HeadKind


class TextAnswers(Protocol):
    """The part of `Task` that every task has whose answers are texts. end: the token that ends an answer."""

    request: ClassVar[RequestKind] = "generate"
    generates: ClassVar[bool] = True
    solved: ClassVar[bool] = False
    head: ClassVar[HeadKind] = "generate"
    pipeline_tag: ClassVar[str] = "text-generation"
    metric: ClassVar[str] = "rougeL"
    metric_label: ClassVar[str] = "ROUGE-L"
    right_or_wrong: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False
    ranks_labels: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    spans: ClassVar[Literal["row", "batch"]] = "row"
    two_answers: ClassVar[bool] = False
    rate_ratio: ClassVar[float] = 1.0
    baselines: ClassVar[tuple[str, ...]] = ("nearest",)
    measures: ClassVar[Mapping[str, Measure]] = {
        "rouge1": Measure("ROUGE-1", "the share of words in common with the reference, as F1", share=True),
        "rouge2": Measure("ROUGE-2", "the share of pairs of words in common with the reference, as F1", share=True),
        "rougeL": Measure("ROUGE-L", "the longest common sequence of words with the reference, as F1", share=True),
        "bleu": Measure("BLEU", "the precision of runs of one to four words against the reference", "of 100"),
        "loss": Measure("loss", "the mean of minus the logarithm of a reference's token; 0 is perfect", "nats"),
        "perplexity": Measure("perplexity", "exp of the loss; 1 is perfect"),
    }
    errors: ClassVar[str] = "the worst outputs"
    texts: ClassVar[tuple[str, str]] = ("first text", "second text")
    sides: ClassVar[tuple[str, str]] = ("reference", "answered")
    bare: ClassVar[bool] = True
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    embedding: None = None
    pooling: None = None
    calibration: Calibration | None = None
    pairs: bool = False
    reads_like: None = None
    tokenizer: Tokenizer
    num_beams: int
    max_new_tokens: int
    end: int

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        return ""  # its card decodes tokens

    @classmethod
    def questions(cls, labels: Sequence[str]) -> tuple[str, ...]:
        return ()

    @classmethod
    def decisions(cls, spec: TaskSpec) -> Mapping[str, Decision]:
        return {}

    @classmethod
    def peft_type(cls, *, encoder_decoder: bool | None) -> str | None:
        if encoder_decoder is None:
            return None
        return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        return None

    @classmethod
    def labels_of_outputs(cls, names: Sequence[str]) -> tuple[str, ...]:
        return ()

    def pieces(self, examples: Sequence[Example]) -> Sequence[Example]:
        return examples

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]: ...

    def windows(self, inputs: Sequence[Input]) -> list[list[Encoded]]:
        return [[each] for each in self.encode_sources(inputs)]

    def calibrated(self, logits: Tensor, examples: Sequence[Example], *, chose_weights: bool) -> Self:
        return self

    def confidences(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, Confidences]:
        return {}

    def classifier_of(self, decision: str, logits: Tensor) -> tuple[Task, Tensor]:
        raise _no_head(self)

    def class_scores(self, logits: Tensor) -> Tensor:
        raise _no_head(self)

    @classmethod
    def certainty(cls, answer: Answer) -> tuple[float, float]:
        raise DataError("a text has no probability, so no answer is surer than another")

    @classmethod
    def decision(cls, answer: Answer) -> tuple[str, float] | None:
        return None

    def label_sets(self, logits: Tensor, coverage: float) -> list[list[str]]:
        raise _no_head(self)

    def targets(self, examples: Sequence[Example]) -> Tensor:
        raise _no_head(self)

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        raise _no_head(self)

    def judge(self, logits: Tensor, examples: Sequence[Example]) -> tuple[Metrics, list[Answer]]:
        raise _no_head(self)

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        return {}

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        return str(answer["text"])

    @classmethod
    def score(cls, given: Prediction, example: Example) -> float:
        """ROUGE-L of the nearest reference, as a fraction."""
        from turret.tasks.metrics import rouge_l

        return max(rouge_l(str(given), each) for each in example.references)

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        return by_score(self, examples, answers)

    def numbers(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[tuple[float, float]]:
        return []

    def scores(self, given: Sequence[Prediction], examples: Sequence[Example]) -> list[float]:
        return [self.score(each, example) for each, example in zip(given, examples, strict=True)]

    @classmethod
    def from_words(cls, spec: TaskSpec, texts: Sequence[str]) -> Sequence[Input]:
        return texts

    @classmethod
    def line(cls, answer: Answer) -> str:
        """The text, with a note if it ends at the length limit."""
        return str(answer["text"]) + ("" if answer["finish_reason"] == "stop" else "  (cut at the length limit)")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens and surrounding white space."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy over target tokens: a scalar. logits: (N, V), targets: (N,) int64."""
        import torch.nn.functional as F

        return F.cross_entropy(logits.float(), targets)

    def guessing_loss(self, examples: Sequence[Example]) -> float | None:
        """None: the loss of a pretrained base starts far below that of any constant answer."""
        return None

    def judge_texts(
        self, texts: Sequence[str], references: Sequence[tuple[str, ...]], mean_loss: float | None
    ) -> Metrics:
        """rouge1, rouge2, rougeL and bleu; loss and perplexity if a mean loss is given."""
        from turret.tasks import metrics

        return metrics.texts(texts, references, mean_loss)

    @property
    def generation(self) -> Generation:
        """The arguments of transformers' `generate()`, whose own default is twenty tokens."""
        pad: int | None = self.tokenizer.pad_token_id
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": False,
            "eos_token_id": self.end,
            "pad_token_id": self.end if pad is None else int(pad),
        }


def _no_head(task: TextAnswers) -> TypeError:
    return TypeError(f"{type(task).__name__} is answered by a text, not by a head")


def conversations(inputs: Sequence[Input], kind: str) -> list[Prompt]:
    """Texts as conversations of one user turn, and conversations as they are. Raises DataError for two texts."""
    if any(isinstance(each, TextPair) for each in inputs):
        raise DataError(f"two texts were given, and this one is {kind}: give one text")
    return [Prompt.of(each) if isinstance(each, str) else each for each in inputs if not isinstance(each, TextPair)]
