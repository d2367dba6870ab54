"""What tasks that generate share: how their answers are generated, read, printed and scored.

Axes: N target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from turret.data import Example, Input, Prompt, TextPair
from turret.errors import DataError
from turret.tasks.shapes import Answer, Generation, Metrics, TaskSpec
from turret.tasks.task import Gives, Measure, Prediction, RequestKind, Task
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import HeadKind


class TextAnswers(Task, Protocol):
    """What is usual for a task whose answers are texts. end: the token that ends an answer."""

    request: ClassVar[RequestKind] = "generate"
    generates: ClassVar[bool] = True
    gives: ClassVar[Gives] = "texts"
    head: ClassVar[HeadKind] = "generate"
    pipeline_tag: ClassVar[str] = "text-generation"
    metric: ClassVar[str] = "rougeL"
    metric_label: ClassVar[str] = "ROUGE-L"
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
    sides: ClassVar[tuple[str, str]] = ("reference", "answered")
    bare: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = (
        *("task.max_target_tokens", "task.chat_template", "task.num_beams", "task.max_new_tokens"),
    )
    pairs: bool = False
    reads_like: None = None
    max_tokens: int
    num_beams: int
    tokenizer: Tokenizer
    end: int

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        return ""  # its card decodes tokens

    @classmethod
    def peft_type(cls, *, encoder_decoder: bool | None) -> str | None:
        if encoder_decoder is None:
            return None
        return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"

    @classmethod
    def certainty(cls, answer: Answer) -> tuple[float, float]:
        raise DataError("a text has no probability, so no answer is surer than another")

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        return str(answer["text"])

    @classmethod
    def score(cls, given: Prediction, example: Example) -> float:
        """ROUGE-L of the nearest reference, as a fraction."""
        from turret.tasks.metrics import rouge_l

        return max(rouge_l(str(given), each) for each in example.references)

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


def conversations(inputs: Sequence[Input], kind: str) -> list[Prompt]:
    """Texts as conversations of one user turn, and conversations as they are. Raises DataError for two texts."""
    if any(isinstance(each, TextPair) for each in inputs):
        raise DataError(f"two texts were given, and this one is {kind}: give one text")
    return [Prompt.of(each) if isinstance(each, str) else each for each in inputs if not isinstance(each, TextPair)]
