"""An adapter that trains on the base of an engine that answers, one verb at a time.

The verbs are those of Tinker's API: `forward_backward`, `optim_step`, `ask` (there: sample), `save`, `load`. `fit` is a
loop over the first two. A recipe's training is `Workspace.train`, which also plans, proves and stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from turret import adapters
from turret.adapters import Adapter
from turret.adapters.tuners import tuner_of
from turret.bases.shared import share
from turret.data import Dataset, Example, Input
from turret.engine.core import Engine
from turret.engine.request import Answer, Named, Ticket
from turret.engine.sampling_params import SamplingParams
from turret.errors import TrainingError
from turret.methods import Method, by_name
from turret.recipe import Task as TaskSettings
from turret.recipe import Train
from turret.tasks import make_task, task_of
from turret.train.adamw import AdamW
from turret.train.batches import encode, pass_tokens
from turret.train.evaluation import evaluating
from turret.train.initialize import extracted, fresh_modules
from turret.train.seeds import Randomness
from turret.train.step import LossScale, forward_backward, loss_of, require_finite

T = TypeVar("T")


class TrainingSlot:
    """A new adapter on an engine's base. A context manager.

    It trains a float32 row of its own. `ask` answers with a copy in the base's precision, which the engine serves: a
    step makes the copy stale, the next `ask` makes a new one, and a request keeps the copy that it began with.

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
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        method: Method | str,
        *,
        kind: str,
        labels: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
        seed: int = 42,
        most_tokens: int | None = None,
        tenant: str = "",
    ) -> None:
        self.name, self.tenant, self.steps = name, tenant, 0
        chosen = by_name(method) if isinstance(method, str) else method
        if chosen.every_weight:
            raise TrainingError(f"method {chosen.kind} trains every weight and shares no base: use turret train")
        base, task = engine.base, task_of(kind)
        if task.request != base.request or task.generates == bool(labels):
            given = f"{len(labels)} labels" if labels else "no labels"
            raise TrainingError(
                f"{base.id} is loaded to {base.request}: a slot for {kind} with {given} does not fit it"
            )
        data = Dataset((), (), (), kind, tuple(labels), {}, (), 0, "")
        chosen_settings = TaskSettings.model_validate({"kind": kind, **(settings or {})})
        self.task = make_task(chosen_settings, data, base.tokenizer, base.family.kind)
        self._engine = engine
        self._most_tokens = most_tokens or pass_tokens(Train(), base.model.config)
        self._copies: list[Named] = []  # the one that answers, unless it is stale
        self._gradients = 0  # batches whose gradients were added since the last step
        self._run(lambda: self._begin(chosen, len(labels) or None, seed))

    def _begin(self, method: Method, num_labels: int | None, seed: int) -> None:
        self._base = share(self._engine.base, num_labels=num_labels, seed=seed)
        model = self._base.model
        self._randomness = Randomness(seed, model.device)
        head = fresh_modules(self._base) if num_labels else ()
        adapters.attach(model, method, generator=torch.Generator().manual_seed(seed), head=head)
        trained = adapters.trainable_parameters(model)
        self._optimiser = AdamW(trained, ratios=tuner_of(method).rate_ratios(trained))
        self._scale = LossScale.of(self._base.dtype)
        model.train()

    # --- verbs --------------------------------------------------------------------------------------------------------

    def forward(self, examples: Sequence[Example]) -> float:
        """The task's mean loss over some examples, without gradients and dropout."""
        return self._run(lambda: self._loss(examples))

    def forward_backward(self, examples: Sequence[Example]) -> float:
        """Add the gradients of the task's mean loss over some examples. Returns that loss."""
        return self._run(lambda: self._add(examples))

    def optim_step(
        self,
        lr: float,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = 1.0,
    ) -> float:
        """One step of AdamW with the gradients that were added. Returns their norm before clipping.

        Raises:
            TrainingError: No gradients were added since the last step.
            LossNotFinite: The norm is NaN or infinite; the weights stay, the gradients are dropped.
        """
        if not self._gradients:
            raise TrainingError("no gradients were added since the last step: call forward_backward first")
        return self._run(lambda: self._step(lr, weight_decay, betas, eps, clip))

    def ask(self, inputs: Sequence[Input], options: SamplingParams | None = None) -> list[Answer]:
        """An answer for each input by the adapter as it is now, from the engine that serves."""
        return [ticket.result() for ticket in self.submit(inputs, options)]

    def submit(self, inputs: Sequence[Input], options: SamplingParams | None = None) -> list[Ticket]:
        """The tickets of these answers."""
        named, kind = self._current(), self.task.request
        return [self._engine.submit(kind, each, named, options, tenant=self.tenant) for each in inputs]

    def save(self) -> Adapter:
        """The adapter as it is now, ready for `bundles.save_bundle`."""
        return self._run(self._extracted)

    def load(self, adapter: Adapter) -> None:
        """Go on from the tensors of a finished adapter. Raises AdapterError if they do not fit."""
        generator = torch.Generator().manual_seed(0)
        self._run(lambda: self._optimiser.restart(self._filled(adapter, generator)))
        self.steps, self._gradients = 0, 0
        self._stale()

    def drop(self) -> None:
        """Free the slot, once its answers have ended."""
        self._stale()
        self._run(lambda: adapters.detach(self._base.model))

    def __enter__(self) -> TrainingSlot:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    # --- in the engine's thread ---------------------------------------------------------------------------------------

    def _run(self, work: Callable[[], T]) -> T:
        return self._engine.run(work, self.tenant)

    def _loss(self, examples: Sequence[Example]) -> float:
        with evaluating(self._base.model, None):
            return float(loss_of(self._base.model, self.task, encode(self.task, examples)))

    def _add(self, examples: Sequence[Example]) -> float:
        if not self._gradients:
            self._optimiser.zero_gradients()
        self._gradients += 1
        items = encode(self.task, examples)
        with self._randomness:
            return forward_backward(
                self._base.model, self.task, self._optimiser, items, self._most_tokens, scale=self._scale
            )

    def _step(
        self, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, clip: float | None
    ) -> float:
        optimiser, self._gradients = self._optimiser, 0
        optimiser.weight_decay, optimiser.betas, optimiser.eps = weight_decay, betas, eps
        norm = optimiser.clip_gradients(clip)
        require_finite(0.0, norm)
        optimiser.step(lr)
        self.steps += 1
        self._stale()
        return norm

    def _filled(self, adapter: Adapter, generator: torch.Generator) -> torch.Tensor:
        adapters.start_from(self._base.model, adapter, generator)
        return self._optimiser.weights.clone()

    def _extracted(self) -> Adapter:
        return extracted(self._base.model, self._base, self.task, {"steps": self.steps})

    # --- the copy that answers ----------------------------------------------------------------------------------------

    def _current(self) -> Named:
        """The copy of the adapter as it is now."""
        if not self._copies:
            self._copies.append(self._engine.hold(self.name, self.steps, self.save()))
        return self._copies[0]

    def _stale(self) -> None:
        while self._copies:
            self._engine.let_go(self._copies.pop())
