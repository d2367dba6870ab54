"""Evaluates an attached model by unpadded passes, as a training does. `turret.train.asking` asks what will serve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from turret.adapters import BARE, attachment, on_slot, packed
from turret.adapters.packed import HeadRow, read_in
from turret.data import Example
from turret.engine.scheduler import between_passes
from turret.errors import DataError
from turret.families.family import Pooling
from turret.tasks import ComparingTask, Task, is_comparing
from turret.tasks.shapes import Answer, Metrics
from turret.tasks.task import shared_losses
from turret.train.batches import EncodedRows, by_length
from turret.train.losses import chosen_tokens, compare_answers, eval_mode, loss_of, target_states
from turret.transformer import Model


def evaluate(
    model: Model,
    task: Task,
    examples: Sequence[Example] | EncodedRows,
    *,
    most_tokens: int = 4096,
    slot: int | None = None,
) -> tuple[Metrics, list[Answer]]:
    """Score an attached model on some examples. Weights, random states and the model's mode do not change.

    Args:
        most_tokens: of one pass.
        slot: of the adapter that answers (0: the bare base); None: the active one.

    Returns:
        The metrics, and an answer per example. Of a task that generates, the loss per target token and no answers.
    """
    if not examples:
        raise DataError("nothing to evaluate on: the split is empty; name data.test or data.validation")
    items = examples if isinstance(examples, EncodedRows) else EncodedRows(task, examples)
    with evaluation_mode(model, slot):
        if items.take([0])[0].target is None:  # a head answers
            outputs = class_logits(model, items.windows(), most_tokens, task.pooling)
            return task.judge(torch.cat(outputs), items.examples)
        if is_comparing(task):
            return _preferences(model, task, items, most_tokens, bare=slot == BARE)
        loss = _target_loss(model, task, items, most_tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, []


def example_losses(
    model: Model, task: Task, items: EncodedRows, *, most_tokens: int = 4096, slot: int | None = None
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The loss of each example, summed over its target tokens, and the number of those tokens (1 for a class).

    Args:
        slot: of the adapter that answers (0: the bare base); None: the active one.
    """
    count = len(items)
    with evaluation_mode(model, slot):
        taken = items.take(range(count))
        if taken[0].target is None:  # a head answers
            outputs = class_logits(model, [(item.source, item.read) for item in taken], most_tokens, task.pooling)
            if task.spans == "batch":
                return tuple(shared_losses(task, outputs, items.examples)), (1,) * count
            counts = [item.weight for item in taken]
            wanted = torch.split(task.targets(items.examples), counts)
            each = [float(task.loss(*both)) * both[0].shape[0] for both in zip(outputs, wanted, strict=True)]
            return tuple(each), tuple(counts)
        losses, weights = [0.0] * count, [0] * count
        for piece in by_length(items.lengths(), most_tokens):
            taken = items.take(piece)
            rows = torch.split(target_states(model, taken), [item.weight for item in taken])
            for place, row, item in zip(piece, rows, taken, strict=True):
                logits = packed.vocabulary_logits(model, row)  # of one text: those of all take much memory
                losses[place] = float(task.loss(logits, item.counted.to(row.device))) * item.weight
                weights[place] = item.weight
        return tuple(losses), tuple(weights)


@contextmanager
def evaluation_mode(model: Model, slot: int | None) -> Iterator[None]:
    """Eval mode, no gradients, and all rows on one slot, for the length of the block."""
    slot = attachment(model).context.active if slot is None else slot
    # no_grad, not inference_mode: a later forward pass with gradients may use tensors that the model caches here
    with eval_mode(model), on_slot(model, slot), torch.no_grad():
        yield


def class_logits(
    model: Model, rows: Sequence[HeadRow], most_tokens: int, pooling: Pooling | None = None
) -> list[Tensor]:
    """The outputs for each row, in `evaluation_mode`: of a head (1, C), or (K, C) of the tokens read; or vectors.

    Each is float32 on the CPU.
    """
    found: dict[int, Tensor] = {}
    for piece in by_length([len(source) for source, _ in rows], most_tokens):
        logits = packed.head_logits(model, [rows[place] for place in piece], pooling=pooling).float().cpu()
        counts = [read_in(rows[place]) for place in piece]
        found |= dict(zip(piece, torch.split(logits, counts), strict=True))
        between_passes()
    return [found[place] for place in range(len(rows))]


def _preferences(
    model: Model, task: ComparingTask, items: EncodedRows, most_tokens: int, *, bare: bool
) -> tuple[Metrics, list[Answer]]:
    """The metrics of a task that compares two answers, and which of them is more likely in each example.

    The bare base is its own reference, so its answers are compared by themselves.
    """
    margins, total = [0.0] * len(items), 0.0
    pieces = by_length(items.lengths(), most_tokens)
    chosen = None
    if task.objective == "orpo" and len(pieces) > 1:
        chosen = math.fsum(chosen_tokens(items.take(piece)) * len(piece) for piece in pieces) / len(items)
    for piece in pieces:
        found = compare_answers(model, task, items.take(piece), chosen)
        total += float(task.preference_loss(found.scores, found.reference, found.counts, found.loss)) * len(piece)
        each = task.margins(found.scores, None if bare else found.reference, found.counts).tolist()
        for place, margin in zip(piece, each, strict=True):
            margins[place] = margin
        between_passes()
    return task.compare_margins(margins, total / len(items))


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
