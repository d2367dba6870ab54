"""The losses of micro-batches, without padding, and their scale. `LocalSlot.train_step` takes the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turret.adapters import BARE, REFERENCE, attachment, detach, drawing, mixed_precision, mount, on_slot, packed
from turret.bases import Base
from turret.bases.sharded import parts_of
from turret.engine.protocol import Loss, OptimStep
from turret.engine.scheduler import between_passes
from turret.errors import AdapterError, LossNotFinite
from turret.families.family import project
from turret.ops.core import to_device
from turret.ops.dropout import Draws
from turret.ops.lora import is_plain_linear
from turret.tasks import ComparingTask, Task, is_comparing
from turret.tasks.text_answers import TextAnswers
from turret.train.adamw import AdamW
from turret.train.batches import EncodedRow, micro_batches
from turret.train.distributed import Processes
from turret.transformer import Model

# --- loss scale -------------------------------------------------------------------------------------------------------
# Scales the loss of a training in float16, where small gradients would become zero.
#
# The gradients are divided by the same number before they are used. If one overflows, the step is computed again with
# half the scale, so no batch is lost. After 2,000 steps in a row without an overflow the scale doubles.
#
# Source: Micikevicius et al. 2018, "Mixed Precision Training"; the numbers are those of `torch.amp.GradScaler`, which
# leaves out the step that overflows.


FIRST = 65536.0
GROWTH, BACKOFF = 2.0, 0.5
PATIENCE = 2000  # steps without an overflow after which the scale grows
SMALLEST = 1.0  # below it the loss itself is at fault


@dataclass
class LossScale:
    """The scale now, and the steps since it last changed."""

    value: float = FIRST
    good: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale | None:
        """A new scale if the base computes in float16; other precisions have the range of float32 and need none."""
        return cls() if dtype == torch.float16 else None

    def lower(self) -> bool:
        """After an overflow. Returns whether the step is worth computing again."""
        self.value, self.good = self.value * BACKOFF, 0
        return self.value >= SMALLEST

    def count_passed_step(self) -> None:
        """After a step without an overflow."""
        self.good += 1
        if self.good == PATIENCE:
            self.value, self.good = self.value * GROWTH, 0


# --- loss -------------------------------------------------------------------------------------------------------------


FUSED = hasattr(torch.nn.functional, "linear_cross_entropy")  # since torch 2.13


def clip_and_step(optimiser: AdamW, how: OptimStep, loss: float = 0.0) -> float:
    """One update. Returns the norm of the gradients before clipping.

    Raises:
        LossNotFinite: the loss or the norm is NaN or infinite; the weights stay.
    """
    norm = optimiser.clip_gradients(how.clip)
    for name, value in (("loss", loss), ("norm of the gradients", norm)):
        if not math.isfinite(value):
            raise LossNotFinite(f"the {name} became {value}")
    optimiser.step(how)
    return norm


def loss_over_the_batch(
    model: Model, task: Task, pieces: Sequence[Sequence[EncodedRow]], draws: Draws, loss: Loss
) -> Tensor:
    """A loss that compares the rows of all pieces. Each piece is computed again for its gradients, and saves nothing.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
    """

    def outputs(*piece: EncodedRow) -> Tensor:
        between_passes()
        with drawing(model, draws, [item.number for item in piece]):
            return _outputs(model, task, piece)

    batch = [item for piece in pieces for item in piece]
    found = [checkpoint(outputs, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    whole = torch.cat(found)
    heads = batch[0].target is None
    targets = _wanted_outputs(task, batch) if heads else torch.tensor([item.weight for item in batch])
    return loss.function(whole, to_device(targets, whole.device))


def _outputs(model: Model, task: Task, piece: Sequence[EncodedRow]) -> Tensor:
    """The logits (B, C) of a task with a head, else the log-probability of each target (B,)."""
    with mixed_precision(model):
        if piece[0].target is None:  # a head answers
            return packed.head_logits(model, [(item.source, item.read) for item in piece], pooling=task.pooling)
        states = target_states(model, piece)
        logits = _vocabulary_logits(model, states, _token_numbers(piece))  # (N, V)
        ids = to_device(torch.cat([item.counted for item in piece]), logits.device)
        tokens = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        return torch.stack([each.sum() for each in torch.split(tokens, [item.weight for item in piece])])


def target_states(model: Model, piece: Sequence[EncodedRow]) -> Tensor:
    """The states (N, D) that predict the tokens that the loss of these rows counts."""
    targets = [item.target for item in piece if item.target is not None]
    return packed.target_states(
        model, [item.source for item in piece], targets, earlier=[item.earlier for item in piece]
    )


def passes_of(model: Model, batch: Sequence[EncodedRow], most_tokens: int, processes: Processes) -> int:
    """The passes that every process makes for a batch: layers in parts need all processes in every pass."""
    if parts_of(model) == 1:
        return 0
    return max(len(micro_batches(share, most_tokens)) for share in processes.shares(batch))


def backward(loss: Tensor) -> None:
    """Add the gradients of a loss to the parameters' gradients."""
    torch.autograd.backward(loss)


def loss_of(
    model: Model, task: Task, piece: Sequence[EncodedRow], loss: Loss | None = None, chosen: float | None = None
) -> Tensor:
    """The mean loss over some examples: a scalar with a graph.

    Args:
        loss: Instead of the task's.
        chosen: `chosen_tokens` of the batch that the examples are a piece of; None: they are all of it.
    """
    if is_comparing(task):
        return preference_loss(model, task, piece, chosen)
    function = task.loss if loss is None else loss.function
    with mixed_precision(model):
        if piece[0].target is None:  # a head answers
            rows = [(item.source, item.read) for item in piece]
            logits = packed.head_logits(model, rows, pooling=task.pooling)  # (B, C), or of each text (N, D)
            return function(logits, to_device(_wanted_outputs(task, piece), logits.device))
        states = target_states(model, piece)
        return _loss_of_targets(model, function, states, piece)


def _token_numbers(piece: Sequence[EncodedRow]) -> list[int]:
    """A number in the step for each target token of the pass, as each example has one."""
    return [item.number << 32 | place for item in piece for place in range(item.weight)]


def _vocabulary_logits(model: Model, states: Tensor, numbers: Sequence[int]) -> Tensor:
    """(N, D) -> (N, V). numbers: of the tokens."""
    draws = attachment(model).context.draws
    with nullcontext() if draws is None else drawing(model, draws[0], numbers):
        return packed.vocabulary_logits(model, states)


def _wanted_outputs(task: Task, piece: Sequence[EncodedRow]) -> Tensor:
    """What a loss compares the head's outputs with: (B, ...)."""
    own = [item.wanted for item in piece if item.wanted is not None]
    return torch.stack(own) if own else task.targets([item.example for item in piece])


def _loss_of_targets(
    model: Model, loss: Callable[[Tensor, Tensor], Tensor], states: Tensor, piece: Sequence[EncodedRow]
) -> Tensor:
    """The mean loss over N target tokens, some at a time.

    The backward pass recomputes the logits (N, V), because a large vocabulary's do not fit in memory at once.

    Args:
        states: (N, D), each before its target token.
        piece: the examples.
    """
    targets = to_device(torch.cat([item.counted for item in piece]), states.device)
    most = packed.targets_at_once(model)
    if getattr(loss, "__func__", None) is TextAnswers.loss and (layer := _output_of_torch(model, states)) is not None:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=most, acc_policy="compact")
        options = replace(options, acc_dtype=torch.float32)
        return (
            torch.nn.functional.linear_cross_entropy(  # of each token: the mean would be rounded to states' dtype
                states, layer.weight, targets, linear_bias=layer.bias, reduction="none", options=options
            )
            .float()
            .mean()
        )
    numbers, places = _token_numbers(piece), range(0, len(targets), most)

    def part(states: Tensor, ids: Tensor, place: int) -> Tensor:
        logits = _vocabulary_logits(model, states, numbers[place : place + most])
        return loss(logits, ids) * (len(ids) / len(targets))

    parts = list(zip(torch.split(states, most), torch.split(targets, most), places, strict=True))
    if len(parts) == 1:
        return part(*parts[0])
    losses: list[Tensor] = [checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]
    return torch.stack(losses).sum()


def _output_of_torch(model: Model, states: Tensor) -> nn.Linear | None:
    """The output layer, if torch computes it and the cross-entropy as one: on a GPU, and nothing else is in between.

    In float16 torch would keep the logits in float16; on AMD's GPUs it has no product of 16 bits into float32.
    """
    layer = model.get_output_embeddings()
    fits = (
        FUSED
        and states.device.type == "cuda"
        and torch.version.hip is None
        and states.dtype in (torch.bfloat16, torch.float32)
    )
    if not fits or attachment(model).family.vocabulary is not project or torch.is_autocast_enabled(states.device.type):
        return None
    return (
        layer
        if isinstance(layer, nn.Linear) and is_plain_linear(layer) and layer.weight.dtype == states.dtype
        else None
    )


# --- two answers to each prompt ---------------------------------------------------------------------------------------
# Their log-probabilities with the adapter, and with the reference. Axes: B examples, N tokens, R = 2 B rows.


@dataclass(frozen=True)
class Compared:
    """What is known of two answers to each prompt: see `Preference.preference_loss`."""

    scores: Tensor  # (B, 2)
    reference: Tensor | None
    counts: Tensor
    loss: Tensor | None


def chosen_tokens(rows: Sequence[EncodedRow]) -> float:
    """The tokens of a chosen answer that a loss counts, with those of its prompt: the mean over some examples."""
    return sum(len(_target(item)) + (0 if item.earlier is None else len(item.earlier)) for item in rows) / len(rows)


def compare_answers(
    model: Model, task: ComparingTask, piece: Sequence[EncodedRow], chosen: float | None = None
) -> Compared:
    """Score both answers of some examples by the adapter, and by the reference if the objective has one.

    Pieces of a batch are weighted by their examples, but the loss of ORPO is a mean over tokens. With the `chosen` of
    the batch it is larger in a piece of longer answers, so that the weighted mean is that over the batch's tokens.

    Args:
        chosen: `chosen_tokens` of the batch that the examples are a piece of; None: they are all of it.
    """
    orpo = task.objective == "orpo"
    scores, loss = _score_answers(model, piece, prompts=orpo)
    if loss is not None and chosen is not None:
        loss = loss * (chosen_tokens(piece) / chosen)  # exactly 1 if the batch is not divided
    reference = None
    if not orpo:
        with on_slot(model, _slot_of_reference(model, task)), torch.no_grad():
            reference, _ = _score_answers(model, piece, prompts=False)
    counts = to_device(torch.tensor([[len(_target(item)), len(_rival(item))] for item in piece]), scores.device)
    return Compared(scores, reference, counts, loss)


def preference_loss(
    model: Model, task: ComparingTask, piece: Sequence[EncodedRow], chosen: float | None = None
) -> Tensor:
    """The mean loss over some examples: a scalar with a graph. chosen: as in `compare_answers`."""
    found = compare_answers(model, task, piece, chosen)
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
def eval_mode(model: Model) -> Iterator[None]:
    """Eval mode, so without dropout, for the length of the block. Gradients may be computed."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _score_answers(model: Model, piece: Sequence[EncodedRow], *, prompts: bool) -> tuple[Tensor, Tensor | None]:
    """The log-probability of both answers (B, 2); with `prompts`, the mean of -log p over all chosen tokens too."""
    sources = [item.source for item in piece for _ in range(2)]
    targets = [target for item in piece for target in (_target(item), _rival(item))]
    earlier = [places for item in piece for places in (item.earlier if prompts else None, None)]
    states = packed.target_states(model, sources, targets, earlier=earlier)  # (N, D)
    wanted = [
        target if places is None else torch.cat([source[places], target])
        for source, target, places in zip(sources, targets, earlier, strict=True)
    ]
    every = _log_probabilities(model, states, to_device(torch.cat(wanted), states.device))
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
