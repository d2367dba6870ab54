"""An adapter that trains, one verb at a time. The verbs are those of Tinker's API.

A `LocalSlot` computes in the thread of its caller; the training loop, the search for a learning rate and the start of a
head are its clients. A `TrainingSlot` has the same verbs on the base of an engine, in whose thread they take turns with
answers. A recipe's training is `Workspace.train`, which also plans, proves and stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from turret import adapters
from turret.adapters import Adapter, StoredAdapter, drawing
from turret.adapters.tuners.tuner import tuner_of
from turret.bases import Base
from turret.bases.base import share_weights
from turret.data import Dataset, Example, Input
from turret.engine.core import Engine
from turret.engine.protocol import Loss, OptimStep
from turret.engine.request import Ask, Named, Ticket
from turret.engine.sampling_params import SamplingParams
from turret.engine.scheduler import between_passes
from turret.errors import LossNotFinite, TrainingError
from turret.json_types import Plain
from turret.manifest import Lineage
from turret.methods import Method, by_name
from turret.ops.core import use_device
from turret.ops.dropout import Draws
from turret.recipe import Recipe, Train
from turret.tasks import Task, task_of
from turret.tasks.shapes import Answer
from turret.train.adamw import AdamW
from turret.train.batches import EncodedRow, encode, micro_batches, pass_tokens
from turret.train.distributed import ALONE, Processes
from turret.train.evaluation import evaluation_mode
from turret.train.initialize import attach, extract_adapter, fresh_modules, optimiser_of, seeded_generators
from turret.train.losses import (
    SMALLEST,
    LossScale,
    backward,
    chosen_tokens,
    clip_and_step,
    eval_mode,
    loss_of,
    loss_over_the_batch,
    passes_of,
)
from turret.train.memory import explain_out_of_memory
from turret.train.training_plan import Prediction
from turret.transformer import Model

T = TypeVar("T")


@dataclass
class LocalSlot:
    """The adapter that is attached to a base, as it trains: its weights in float32, their gradients and moments.

    A loss is a mean over the rows, or over the tokens that it counts. In float16 the gradients that `forward_backward`
    adds are multiplied by the loss scale, which changes and is divided out in steps alone.

    Args:
        base: The adapter is attached to its model.
        task: Gives the loss.
        optimiser: Of the adapter's weights.
        seed: Of dropout.
        most_tokens: Of one pass.
        processes: Those that share each batch.
        predicted: The plan's memory prediction, for the error text when memory runs out.
    """

    base: Base
    task: Task
    optimiser: AdamW
    seed: int
    most_tokens: int
    processes: Processes = ALONE
    predicted: Prediction | None = None
    scale: LossScale | None = field(init=False)
    _added: int = field(default=0, init=False)  # examples whose gradients were added since the last step
    _loss: float = field(default=0.0, init=False)  # the sum of their batches' losses

    def __post_init__(self) -> None:
        self.scale = LossScale.of(self.base.dtype)

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, base: Base, task: Task, start: StoredAdapter | None = None, processes: Processes = ALONE
    ) -> LocalSlot:
        """Attach a recipe's new adapter to a base, with the recipe's optimiser. See `initialize.attach`."""
        with seeded_generators(recipe.seed, base.model.device):
            attach(recipe, base, task, start)
        try:
            optimiser = optimiser_of(recipe, base)
        except BaseException:
            adapters.detach(base.model)
            raise
        return cls(
            base,
            task,
            optimiser,
            recipe.seed,
            pass_tokens(recipe.train, base.model.config, base.pass_tokens),
            processes,
        )

    @property
    def model(self) -> Model:
        return self.base.model

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self.optimiser.steps

    # --- verbs --------------------------------------------------------------------------------------------------------

    def forward(self, rows: Sequence[EncodedRow]) -> float:
        """The task's loss over some rows, without gradients and dropout."""
        with evaluation_mode(self.model, None):
            return float(loss_of(self.model, self.task, rows))

    def forward_backward(self, rows: Sequence[EncodedRow], loss: Loss | None = None) -> float:
        """Add the gradients of a loss over some rows. Returns that loss. loss: None: the task's."""
        if not self._added:
            self.optimiser.zero_gradients()
            self._loss = 0.0
        first, self._added = self._added, self._added + len(rows)
        try:
            with self._explaining(rows):
                value = self._add_gradients(rows, loss, first)
                self._loss += value
                return value
        except BaseException:
            self._added = 0  # no step is taken with the gradients of half a batch
            raise

    def optim_step(self, step: OptimStep) -> float:
        """One step with the gradients that were added. Returns their norm before clipping.

        Raises:
            TrainingError: No gradients were added since the last step.
            LossNotFinite: The norm is NaN or infinite; the weights stay, the gradients are dropped. In float16 the
                loss scale is halved, so the same gradients may not overflow when they are added again.
        """
        if not self._added:
            raise TrainingError("no gradients were added since the last step: call forward_backward first")
        self._added = 0
        try:
            return self._update(step)
        except LossNotFinite:
            if self.scale is not None and math.isfinite(self._loss) and self.scale.value > SMALLEST:
                self.scale.lower()
            raise

    def train_step(self, rows: Sequence[EncodedRow], step: OptimStep, loss: Loss | None = None) -> tuple[float, float]:
        """Both verbs at once. In float16 gradients that overflow are computed again, with half the loss scale.

        Args:
            loss: None: the task's.

        Returns:
            The loss and the norm of the gradients before clipping, both before the update.

        Raises:
            LossNotFinite: One of them is NaN or infinite; the weights stay.
        """
        self._added = 0  # gradients that were added before are dropped
        with self._explaining(rows):
            while True:
                self.optimiser.zero_gradients()
                value = self._add_gradients(rows, loss)
                try:
                    return value, self._update(step, value)
                except LossNotFinite:
                    if self.scale is None or not math.isfinite(value) or not self.scale.lower():
                        raise

    def _update(self, step: OptimStep, loss: float = 0.0) -> float:
        """`clip_and_step` with the gradients as they are without a loss scale."""
        if self.scale is not None:
            self.optimiser.gradients.mul_(1.0 / self.scale.value)
        norm = clip_and_step(self.optimiser, step, loss)
        if self.scale is not None:
            self.scale.count_passed_step()
        return norm

    def save(self, lineage: Lineage | None = None) -> Adapter:
        """The adapter as it is now, ready for `bundles.save_bundle`."""
        return extract_adapter(self.model, self.base, self.task, lineage or {"steps": self.steps})

    def load(self, adapter: Adapter) -> None:
        """Continue from the tensors of a finished adapter. Raises AdapterError if they do not fit."""
        adapters.start_from(self.model, adapter, torch.Generator().manual_seed(0))
        self.restart(self.optimiser.weights.clone())

    def restart(self, weights: Tensor) -> None:
        """Begin again from a row (N,), as if no step had been taken."""
        self.optimiser.restart(weights)
        self.scale, self._added = LossScale.of(self.base.dtype), 0

    def drop(self) -> None:
        """Take the adapter off the base."""
        adapters.detach(self.model)
        self.model.eval()

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _add_gradients(self, rows: Sequence[EncodedRow], loss: Loss | None = None, first: int = 0) -> float:
        """Add the gradients of the mean loss over the whole batch, in all processes, and return that loss.

        The mean is over the batch's examples (classify) or the tokens that the loss counts (a text). So dividing the
        batch into micro-batches, or among processes, changes only the order of summation. The gradients of all
        processes are multiplied by the loss scale; the loss is not.

        Args:
            loss: None: the task's.
            first: Number of the batch's first example in its step.
        """
        model, task, draws = self.model, self.task, Draws(self.seed, self.steps + 1)
        use_device(model.device)
        batch = [replace(item, number=number) for number, item in enumerate(rows, first)]
        total = sum(item.weight for item in batch)
        losses = []

        def add(part: Tensor) -> None:
            backward(part if self.scale is None else part.float() * self.scale.value)
            losses.append(part.detach())

        pieces = micro_batches(self.processes.share(batch), self.most_tokens)
        if loss is None and task.spans == "batch":
            loss = Loss(task.kind, task.loss, "batch")
        if loss is not None and loss.spans == "batch":
            if self.processes.size > 1:
                raise TrainingError(
                    f"loss {loss.name} spans the batch: train in one process, not {self.processes.size}"
                )
            add(loss_over_the_batch(model, task, pieces, draws, loss))
        else:
            compares = batch[0].rival is not None
            chosen = chosen_tokens(batch) if compares else None
            with eval_mode(model) if compares else nullcontext():
                for piece in pieces:
                    with drawing(model, draws, [item.number for item in piece]):
                        add(loss_of(model, task, piece, loss, chosen) * (sum(item.weight for item in piece) / total))
                    between_passes()
        for _ in range(passes_of(model, batch, self.most_tokens, self.processes) - len(pieces)):
            with drawing(model, draws, [first]):
                backward(loss_of(model, task, batch[:1], loss) * 0.0)
        # a process has no share of a very small batch
        mean = torch.stack(losses).sum().float() if losses else self.optimiser.gradients.new_zeros(())
        self.processes.sum(self.optimiser.gradients, mean)  # the rest is the same in every process
        return float(mean)

    @contextmanager
    def _explaining(self, rows: Sequence[EncodedRow]) -> Iterator[None]:
        """Report lost processes, and memory that runs out in a step on these rows, in one line."""
        predicted = self.predicted
        with self.processes.noticing(), explain_out_of_memory(self.most_tokens, rows, self.steps + 1, predicted):
            yield


class TrainingSlot:
    """A new adapter on an engine's base. A context manager with the verbs of `LocalSlot`.

    It trains a float32 row of its own. `sample` answers with a copy in the base's precision, which the engine serves: a
    step makes the copy stale, the next `sample` makes a new one, and a request keeps the copy that it began with.

    Args:
        engine: Answers with stored adapters meanwhile. Passes of trainings and of answers take turns in its thread.
        name: In the ids of answers.
        method: What is trained, or the name of a method with its defaults, such as "lora". Not "full".
        kind: Of the task: "classify", "summarize" and so on, as a recipe's `task.kind`.
        labels: The classes of a classifier.
        settings: Further keys of a recipe's `[task]`, such as `{"max_tokens": 64}`.
        seed: Draws the adapter, its head and dropout.
        most_tokens: Of one pass of a training; None: a number that suits the base.
        tenant: Whose it is. Tenants take turns by seconds.

    Raises:
        TrainingError: The method trains every weight, or the engine's base is for another kind of task.
        AdapterError: The method does not fit the base.
        RecipeError: A setting is unknown, has a wrong value, or is one that this kind of task does not read.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        method: Method | str,
        *,
        kind: str,
        labels: Sequence[str] = (),
        settings: Mapping[str, Plain] | None = None,
        seed: int = 42,
        most_tokens: int | None = None,
        tenant: str = "",
    ) -> None:
        self.name, self.tenant = name, tenant
        chosen = by_name(method) if isinstance(method, str) else method
        if chosen.every_weight:
            raise TrainingError(f"method {chosen.kind} trains every weight and shares no base: use turret train")
        base, task = engine.base, task_of(kind)
        head = base.family.head_for(task.head)
        self._headless = head == "embed"
        outputs = task.num_labels(labels)
        if not (head == base.head or self._headless) or (outputs is None and not task.bare) or (task.bare and labels):
            given = f"{len(labels)} labels" if labels else "no labels"
            raise TrainingError(f"{base.id} is loaded to {base.head}: a slot for {kind} with {given} does not fit it")
        data = Dataset((), (), (), kind, tuple(labels), {}, (), 0, "")
        recipe = Recipe(name="slot", data="slot", task={"kind": kind, **(settings or {})})
        recipe.require_read(kind)
        self.task = task.make(recipe.task, data, base.tokenizer, base.family.kind)
        self._engine = engine
        self._copies: list[Named] = []  # the one that answers, unless it is stale
        most = most_tokens or pass_tokens(Train(), base.model.config)
        self._local = self._run(lambda: self._begin_slot(chosen, outputs, seed, most))

    def _begin_slot(self, method: Method, num_labels: int | None, seed: int, most_tokens: int) -> LocalSlot:
        base = share_weights(self._engine.base, num_labels=num_labels, seed=seed, headless=self._headless)
        head = fresh_modules(base) if num_labels else ()
        adapters.attach(base.model, method, generator=torch.Generator().manual_seed(seed), head=head)
        trained = adapters.trainable_parameters(base.model)
        optimiser = AdamW(trained, ratios=tuner_of(method).rate_ratios(trained))
        base.model.train()
        return LocalSlot(base, self.task, optimiser, seed, most_tokens)

    # --- verbs --------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._local.steps

    def forward(self, rows: Sequence[Example]) -> float:
        return self._run(lambda: self._local.forward(encode(self.task, rows)))

    def forward_backward(self, rows: Sequence[Example], loss: Loss | None = None) -> float:
        return self._run(lambda: self._local.forward_backward(encode(self.task, rows), loss))

    def optim_step(self, step: OptimStep) -> float:
        norm = self._run(lambda: self._local.optim_step(step))
        self._stale()
        return norm

    def sample(self, inputs: Sequence[Input], options: SamplingParams | None = None) -> list[Answer]:
        """An answer for each input by the adapter as it is now, from the engine that serves."""
        return self._engine.answers(self._asks(inputs, options), tenant=self.tenant)

    def submit(self, inputs: Sequence[Input], options: SamplingParams | None = None) -> list[Ticket]:
        """The tickets of these answers. One pass takes as many of the inputs as fit, whatever else the engine does."""
        return self._engine.submit_all(self._asks(inputs, options), tenant=self.tenant)

    def _asks(self, inputs: Sequence[Input], options: SamplingParams | None) -> list[Ask]:
        named = self._current()
        return [Ask(self.task.request, each, named, options or SamplingParams()) for each in inputs]

    def save(self) -> Adapter:
        return self._run(self._local.save)

    def load(self, adapter: Adapter) -> None:
        self._run(lambda: self._local.load(adapter))
        self._stale()

    def drop(self) -> None:
        self._stale()
        self._run(self._local.drop)

    def __enter__(self) -> TrainingSlot:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def _run(self, work: Callable[[], T]) -> T:
        return self._engine.run(work, self.tenant)

    # --- the copy that answers ----------------------------------------------------------------------------------------

    def _current(self) -> Named:
        """The copy of the adapter as it is now."""
        if not self._copies:
            self._copies.append(self._engine.hold(self.name, self.steps, self.save()))
        return self._copies[0]

    def _stale(self) -> None:
        while self._copies:
            self._engine.let_go(self._copies.pop())
