"""The answers of tasks that generate: how they are generated, read, printed and scored.

Axes: N target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from turret.data import Example, references_of
from turret.json_types import JsonMapping, JsonObject
from turret.tasks.task import Prediction
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over target tokens: a scalar. logits: (N, V), targets: (N,) int64."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), targets)


def arguments(tokenizer: Tokenizer, *, max_new_tokens: int, num_beams: int, end: int) -> JsonObject:
    """The arguments of transformers' `generate()`, whose own default is twenty tokens.

    Args:
        end: the token that ends an answer.
    """
    pad: int | None = tokenizer.pad_token_id
    return {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": False,
        "eos_token_id": end,
        "pad_token_id": end if pad is None else int(pad),
    }


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens and surrounding white space."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def line(answer: JsonMapping) -> str:
    """The text, with a note if it ends at the length limit."""
    return str(answer["text"]) + ("" if answer["finish_reason"] == "stop" else "  (cut at the length limit)")


def score(given: Prediction, example: Example) -> float:
    """ROUGE-L of the nearest reference, as a fraction."""
    from turret.tasks.metrics import rouge_l

    return max(rouge_l(str(given), each) for each in references_of(example))
