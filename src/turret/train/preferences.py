"""Passes over two answers to each prompt: their log-probabilities with the adapter, and with the reference.

Axes: B examples, N tokens, R = 2 B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from turret.adapters import BARE, REFERENCE, attachment, detach, mount, on_slot, packed
from turret.bases import Base
from turret.errors import AdapterError
from turret.ops.core import copied
from turret.tasks import ComparingTask
from turret.train.batches import EncodedRow
from turret.transformer import Model


@dataclass(frozen=True)
class Compared:
    """What is known of two answers to each prompt: see `Preference.preference_loss`."""

    scores: Tensor  # (B, 2)
    reference: Tensor | None
    counts: Tensor
    loss: Tensor | None


def compare_answers(model: Model, task: ComparingTask, piece: Sequence[EncodedRow]) -> Compared:
    """Score both answers of some examples by the adapter, and by the reference if the objective has one."""
    orpo = task.objective == "orpo"
    scores, loss = _scored(model, piece, prompts=orpo)
    reference = None
    if not orpo:
        with on_slot(model, _slot_of_reference(model, task)), torch.no_grad():
            reference, _ = _scored(model, piece, prompts=False)
    counts = copied(torch.tensor([[len(_target(item)), len(_rival(item))] for item in piece]), scores.device)
    return Compared(scores, reference, counts, loss)


def preference_loss(model: Model, task: ComparingTask, piece: Sequence[EncodedRow]) -> Tensor:
    """The mean loss over some examples: a scalar with a graph."""
    found = compare_answers(model, task, piece)
    return task.preference_loss(found.scores, found.reference, found.counts, found.loss)


def mount_reference(base: Base, model: Model) -> None:
    """Put the base's reference into a slot of its own of an attached model. None: the bare base is the reference.

    Raises:
        AdapterError: it is of another base, or its method needs a model of its own.
    """
    if base.reference is None:
        return
    context = attachment(model).context
    active = context.active
    try:
        mount(model, base.reference.adapter, REFERENCE, fingerprint=base.fingerprint)
    except AdapterError as error:
        detach(model)
        raise type(error)(f"task.reference {base.reference.version}: {error}") from error
    context.active = active


def _slot_of_reference(model: Model, task: ComparingTask) -> int:
    if task.reference is None:
        return BARE
    if REFERENCE not in attachment(model).methods:
        raise AdapterError(f"the reference {task.reference} is not in memory: train or evaluate in its workspace")
    return REFERENCE


@contextmanager
def still(model: Model) -> Iterator[None]:
    """Eval mode, so without dropout, for the length of the block. Gradients may be computed."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _scored(model: Model, piece: Sequence[EncodedRow], *, prompts: bool) -> tuple[Tensor, Tensor | None]:
    """The log-probability of both answers (B, 2); with `prompts`, the mean of -log p over all chosen tokens too."""
    sources = [item.source for item in piece for _ in range(2)]
    targets = [target for item in piece for target in (_target(item), _rival(item))]
    earlier = [places for item in piece for places in (item.earlier if prompts else None, None)]
    states = packed.target_states(model, sources, targets, earlier=earlier)  # (N, D)
    wanted = [
        target if places is None else torch.cat([source[places], target])
        for source, target, places in zip(sources, targets, earlier, strict=True)
    ]
    every = _log_probabilities(model, states, copied(torch.cat(wanted), states.device))
    rows = torch.split(every, [len(each) for each in wanted])
    sums = torch.stack([row[-len(target) :].sum() for row, target in zip(rows, targets, strict=True)])
    return sums.view(-1, 2), -torch.cat(rows[::2]).mean() if prompts else None


def _log_probabilities(model: Model, states: Tensor, ids: Tensor) -> Tensor:
    """Of each token (N,), float32. The backward pass computes the logits of a large vocabulary again."""

    def part(states: Tensor, ids: Tensor) -> Tensor:
        logits = packed.vocabulary_logits(model, states).float()  # (n, V)
        return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    most = packed.targets_at_once(model)
    pieces = zip(torch.split(states, most), torch.split(ids, most), strict=True)
    found = [checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in pieces]
    return torch.cat(found)


def _target(item: EncodedRow) -> Tensor:
    assert item.target is not None
    return item.target


def _rival(item: EncodedRow) -> Tensor:
    assert item.rival is not None
    return item.rival
