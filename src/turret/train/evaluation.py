"""How good an attached model is on some examples: unpadded passes for logits and losses, cached generation for texts.

Knows models, tasks and lengths. Draws no random number, moves no weight, and leaves training mode as it found it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from turret.adapters import attachment, on_slot, packed
from turret.errors import DataError
from turret.train.batches import Items, by_length
from turret.train.step import loss_of

GENERATED_ROWS = 32  # most prompts decoded at once


def evaluate(
    model: Any,
    task: Any,
    examples: Sequence[Any] | Items,
    *,
    most_tokens: int = 4096,
    texts: bool = True,
    slot: int | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, an answer per example in their order).

    Pairs of texts are scored by the mean loss per target token and, with `texts`, by what the model generates; without,
    the answers are empty. slot: which adapter of the model answers (0: the bare base); the active one where left out.
    """
    if not examples:
        raise DataError("nothing to evaluate on: the split is empty; name data.test or data.validation")
    items = examples if isinstance(examples, Items) else Items(task, examples)
    with _evaluating(model, slot):
        if not task.generates:
            logits = _class_logits(model, items, most_tokens)
            return task.metrics(logits, task.targets(list(items.examples))), task.answers(logits)
        loss = _target_loss(model, task, items, most_tokens)
        if not texts:
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, []
        answers = generate(
            model, task, [item.source for item in items.take(range(len(items)))], most_tokens=most_tokens
        )
        metrics = task.metrics(
            [answer["text"] for answer in answers], [example.target for example in items.examples], loss
        )
        return metrics, answers


def example_losses(
    model: Any, task: Any, items: Items, *, most_tokens: int = 4096
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The loss of every example, summed over its target tokens, and how many those are (one for a class)."""
    count = len(items)
    with _evaluating(model, None):
        if not task.generates:
            logits, wanted = _class_logits(model, items, most_tokens), task.targets(list(items.examples))
            each = [float(task.loss(logits[row : row + 1], wanted[row : row + 1])) for row in range(count)]
            return tuple(each), (1,) * count
        losses, weights = [0.0] * count, [0] * count
        for piece in by_length(items.lengths(), most_tokens):
            taken = items.take(piece)
            targets = [item.target for item in taken if item.target is not None]
            logits = packed.target_logits(model, [item.source for item in taken], targets)  # (N, V)
            rows = torch.split(logits, [len(target) for target in targets])
            for place, row, target in zip(piece, rows, targets, strict=True):
                losses[place] = float(task.loss(row, target.to(row.device))) * len(target)
                weights[place] = len(target)
        return tuple(losses), tuple(weights)


@contextmanager
def _evaluating(model: Any, slot: int | None) -> Iterator[None]:
    """Eval mode, no gradients, and all rows on one slot, for the length of the block."""
    training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: what a model caches here must not enter a later graph
        with on_slot(model, attachment(model).context.active if slot is None else slot), torch.no_grad():
            yield
    finally:
        model.train(training)


def _class_logits(model: Any, items: Items, most_tokens: int) -> Tensor:
    """(B, C) float32 on the CPU, in the order of the items."""
    places: list[int] = []
    parts = []
    for piece in by_length(items.lengths(), most_tokens):
        parts.append(packed.classify_logits(model, [item.source for item in items.take(piece)]).float().cpu())
        places += piece
    return torch.cat(parts)[torch.tensor(places).argsort()]


def _target_loss(model: Any, task: Any, items: Items, most_tokens: int) -> float:
    """Mean loss per target token over all items."""
    total, count = 0.0, 0
    for piece in by_length(items.lengths(), most_tokens):
        taken = items.take(piece)
        tokens = sum(item.weight for item in taken)
        total += float(loss_of(model, task, taken)) * tokens
        count += tokens
    return total / count


def generate(
    model: Any, task: Any, sources: Sequence[Tensor], *, most_tokens: int = 4096, new_tokens: int | None = None
) -> list[dict[str, Any]]:
    """A text per source, decoded with the cache by the task's own settings: {"text", "finish_reason", "tokens"}.

    new_tokens: exactly so many for every text, instead of the task's own limits.
    """
    settings = task.generation
    if new_tokens is not None:
        settings = {**settings, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    answers: list[dict[str, Any]] = [{} for _ in sources]
    lengths = [len(source) + int(settings["max_new_tokens"]) for source in sources]
    for piece in by_length(lengths, max(1, most_tokens // int(settings["num_beams"]))):
        for start in range(0, len(piece), GENERATED_ROWS):
            places = piece[start : start + GENERATED_ROWS]
            rows = [sources[i] for i in places]
            for place, answer in zip(places, _generate_rows(model, task, rows, settings), strict=True):
                answers[place] = answer
    return answers


def _generate_rows(model: Any, task: Any, rows: Sequence[Tensor], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    encoder_decoder = bool(model.config.is_encoder_decoder)
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), int(settings["pad_token_id"]), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):  # a decoder goes on at the right end, so its padding is on the left
        span = slice(0, len(row)) if encoder_decoder else slice(width - len(row), width)
        ids[place, span], mask[place, span] = row, 1
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True, **settings
    )
    eos = settings["eos_token_id"]
    answers = []
    for row in output[:, 1 if encoder_decoder else width :].tolist():
        ended = eos in row
        kept = row[: row.index(eos)] if ended else row
        answers.append({"text": task.decode(kept), "finish_reason": "stop" if ended else "length", "tokens": len(kept)})
    return answers
