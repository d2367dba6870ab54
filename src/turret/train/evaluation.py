"""Evaluates an attached model by unpadded passes, for logits and losses. Texts come from `turret.train.asking`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from turret.adapters import attachment, on_slot, packed
from turret.data import Example, references_of
from turret.engine.training_turns import between_passes
from turret.errors import DataError
from turret.json_types import JsonObject
from turret.tasks import HeadTask, Task, has_head, writes
from turret.train.batches import EncodedRows, by_length
from turret.train.step import loss_of
from turret.transformer import Model

Ask = Callable[[Sequence[Tensor]], Sequence[JsonObject]]  # token ids (T,) of prompts -> `{"text", ...}` for each


def evaluate(
    model: Model,
    task: Task,
    examples: Sequence[Example] | EncodedRows,
    *,
    most_tokens: int = 4096,
    ask: Ask | None = None,
    slot: int | None = None,
    known: Tensor | None = None,
) -> tuple[JsonObject, list[JsonObject]]:
    """Score an attached model on some examples. Weights, random states and the model's mode do not change.

    Args:
        most_tokens: of one pass.
        ask: generates the texts of a task that generates, to score them too; None: only the mean loss per target
            token.
        slot: of the adapter that answers (0: the bare base); None: the active one.
        known: the logits (B, C) of the examples if `head_logits` has computed them.

    Returns:
        The metrics, and an answer per example; no answers if nothing was generated.
    """
    if not examples:
        raise DataError("nothing to evaluate on: the split is empty; name data.test or data.validation")
    items = examples if isinstance(examples, EncodedRows) else EncodedRows(task, examples)
    with evaluating(model, slot):
        if has_head(task):
            logits = known if known is not None else _class_logits(model, items, most_tokens)
            return task.metrics(logits, task.targets(items.examples)), task.answers(logits)
        loss = _target_loss(model, task, items, most_tokens)
    if ask is None or not writes(task):
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, []
    answers = list(ask([item.source for item in items.take(range(len(items)))]))
    references = [references_of(example) for example in items.examples]
    return task.metrics([answer["text"] for answer in answers], references, loss), answers


def head_logits(model: Model, task: HeadTask, examples: Sequence[Example], *, most_tokens: int = 4096) -> Tensor:
    """The outputs of the head for some examples, as an evaluation reads them: (B, C) float32 on the CPU."""
    with evaluating(model, None):
        return _class_logits(model, EncodedRows(task, examples), most_tokens)


def example_losses(
    model: Model, task: Task, items: EncodedRows, *, most_tokens: int = 4096, slot: int | None = None
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The loss of each example, summed over its target tokens, and the number of those tokens (1 for a class).

    Args:
        slot: of the adapter that answers (0: the bare base); None: the active one.
    """
    count = len(items)
    with evaluating(model, slot):
        if has_head(task):
            logits, wanted = _class_logits(model, items, most_tokens), task.targets(items.examples)
            each = [float(task.loss(logits[row : row + 1], wanted[row : row + 1])) for row in range(count)]
            return tuple(each), (1,) * count
        losses, weights = [0.0] * count, [0] * count
        for piece in by_length(items.lengths(), most_tokens):
            taken = items.take(piece)
            targets = [item.target for item in taken if item.target is not None]
            earlier = [item.earlier for item in taken]
            states = packed.target_states(model, [item.source for item in taken], targets, earlier=earlier)  # (N, D)
            rows = torch.split(states, [item.weight for item in taken])
            for place, row, item in zip(piece, rows, taken, strict=True):
                logits = packed.vocabulary_logits(model, row)  # of one text: those of all take much memory
                losses[place] = float(task.loss(logits, item.counted.to(row.device))) * item.weight
                weights[place] = item.weight
        return tuple(losses), tuple(weights)


@contextmanager
def evaluating(model: Model, slot: int | None) -> Iterator[None]:
    """Eval mode, no gradients, and all rows on one slot, for the length of the block."""
    training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: a later forward pass with gradients may use tensors that the model caches here
        with on_slot(model, attachment(model).context.active if slot is None else slot), torch.no_grad():
            yield
    finally:
        model.train(training)


def _class_logits(model: Model, items: EncodedRows, most_tokens: int) -> Tensor:
    """(B, C) float32 on the CPU, in the order of the items."""
    places: list[int] = []
    parts = []
    for piece in by_length(items.lengths(), most_tokens):
        parts.append(packed.classify_logits(model, [item.source for item in items.take(piece)]).float().cpu())
        places += piece
        between_passes()
    return torch.cat(parts)[torch.tensor(places).argsort()]


def _target_loss(model: Model, task: Task, items: EncodedRows, most_tokens: int) -> float:
    """Mean loss per target token over all items."""
    total, count = 0.0, 0
    for piece in by_length(items.lengths(), most_tokens):
        taken = items.take(piece)
        tokens = sum(item.weight for item in taken)
        total += float(loss_of(model, task, taken)) * tokens
        count += tokens
        between_passes()
    return total / count
