"""Begins a training: settings with defaults, a seed, and an adapter, new or with the tensors of a stored version."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from turret import adapters, quantized
from turret.adapters import Adapter, StoredAdapter
from turret.adapters.tuners.tuner import tuner_of
from turret.bases import Base
from turret.engine.protocol import OptimStep
from turret.errors import AdapterError, TrainingError
from turret.manifest import Lineage
from turret.methods.method import Defaults, Method, usual_epochs
from turret.recipe import Recipe, Train
from turret.tasks import Task, stored_task, task_of
from turret.train.adamw import AdamW, require_eight_bits
from turret.train.losses import mount_reference
from turret.transformer import Model


def require_fits(adapter: Adapter, base: Base, task: Task) -> None:
    """Require the same base and, of a classifier, the same labels. Raises AdapterError or WrongBase."""
    adapters.require_base(adapter, base.fingerprint)
    stored = adapter.task
    if not stored:
        return
    if stored_task(stored).head != task.head:
        raise AdapterError(f"its task is {stored.get('kind')}, this one's {task.kind}: train from the base instead")
    labels = list(stored.get("labels") or ())
    if labels != list(task.labels):
        own, wanted = (", ".join(map(str, names[:8])) for names in (labels, task.labels))
        raise AdapterError(f"its labels are {own}, this task's {wanted}: train from the base instead")


def attach(recipe: Recipe, base: Base, task: Task, start: StoredAdapter | None = None) -> None:
    """Put the recipe's new adapter and the trainable head on the base, and the base's reference beside it.

    LoRA factors are drawn from the recipe's seed and a prefix starts from real words, unless `start` gives the tensors.

    Args:
        start: the version that `train.init_from` names: the parent of the trained adapter.

    Raises:
        AdapterError: the start or the reference does not fit the method, the base or the task.
    """
    if start is None and recipe.train.init_from is not None:
        raise TrainingError(
            f"train.init_from names {recipe.train.init_from}, and no adapter was given: use Workspace.train, or give "
            "fit the adapter as start"
        )
    adapters.attach(
        base.model,
        recipe.method,
        init_ids=starting_words(recipe, base, task),
        generator=torch.Generator().manual_seed(recipe.seed),
        head=fresh_modules(base),
    )
    if recipe.train.checkpoint_layers or base.checkpoints is not None:
        adapters.checkpoint_layers(base.model)
    if start is not None:
        try:
            require_fits(start.adapter, base, task)
            adapters.start_from(base.model, start.adapter, torch.Generator().manual_seed(recipe.seed))
        except AdapterError as error:
            adapters.detach(base.model)
            raise type(error)(f"training cannot start from {start.version}: {error}") from error
    mount_reference(base, base.model)


def fresh_modules(base: Base) -> tuple[str, ...]:
    """What a classifier trains besides the family's head: modules that the checkpoint lacks, such as a pooler."""
    heads = tuple(f"{name}." for name in base.family.head_modules)
    return tuple(sorted({name.rpartition(".")[0] for name in base.fresh if not name.startswith(heads)}))


def extract_adapter(model: Model, base: Base, task: Task, lineage: Lineage | None = None) -> Adapter:
    """The adapter that is attached to a model, as it is now, as one that is stored or asked."""
    tensors, head, method = adapters.extract(model)
    spec = task.spec()
    return Adapter(method, tensors, head, base.info, spec, spec.get("generation", {}), lineage or {})


def optimiser_of(recipe: Recipe, base: Base) -> AdamW:
    """The optimiser of the attached adapter.

    The head's learning rate is `train.head_lr_ratio` times the rate; a method may have ratios of its own.
    """
    trained, train = adapters.trainable_parameters(base.model), recipe.train
    heads = tuple(f"{name}." for name in base.family.head_modules)
    ratios = {name: train.head_lr_ratio or 1.0 for name in trained if name.startswith(heads)}
    ratios |= tuner_of(recipe.method).rate_ratios(trained)
    return AdamW(trained, ratios=ratios, kind=train.optimizer or "adamw")


def recipe_step(train: Train, lr: float) -> OptimStep:
    """A step as a recipe takes it, at a learning rate."""
    return OptimStep(lr, train.weight_decay, clip=train.gradient_clip)


def require_optimizer(recipe: Recipe) -> None:
    """Raise TrainingError if a library that `train.optimizer` needs is missing."""
    if recipe.train.optimizer == "adamw8bit":
        require_eight_bits()


def starting_words(recipe: Recipe, base: Base, task: Task) -> Tensor | None:
    """Token ids (T,) of the text that the method starts from; None if it needs no text."""
    text = recipe.method.starting_text(task.instruction)
    if text is None:
        return None
    return torch.tensor(base.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


# --- defaults ---------------------------------------------------------------------------------------------------------
# Fills in the training settings that a recipe leaves out with the method's defaults.


def defaults_of(method: Method, base: Base, task_kind: str, *, parameters: int | None = None) -> Defaults:
    """The method's defaults for a task.

    Args:
        parameters: of the base without adapters; None: of a base that nothing is attached to, counted here.
    """
    task = task_of(task_kind)
    count = quantized.count_weights(base.model) if parameters is None else parameters
    own = method.defaults(base.family.kind, task.request, parameters=count, outputs=base.model.config.num_labels)
    return replace(own, lr=own.lr * task.rate_ratio)


def fill_recipe(recipe: Recipe, base: Base, task_kind: str, examples: int) -> Recipe:
    """The recipe with its missing settings filled in, so that later defaults change nothing in this run.

    `lr = "auto"` stays until trials have found the rate.

    Args:
        base: a base that nothing is attached to.
        examples: number of training examples.
    """
    method, train = recipe.method.on(base.family.kind), recipe.train
    own = defaults_of(method, base, task_kind)
    usual = usual_epochs(own.steps, examples, train.batch_size)
    ratio = None if isinstance(train.lr, float) else own.head_lr_ratio  # a rate in the recipe is also the head's
    update = {"lr": train.lr or own.lr, "epochs": train.epochs or usual, "head_lr_ratio": train.head_lr_ratio or ratio}
    return recipe.model_copy(update={"method": method, "train": train.model_copy(update=update)})


# --- seed -------------------------------------------------------------------------------------------------------------


@contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the generators of Python, torch and the device begin at a seed; afterwards they are as before."""
    python, module = random.getstate(), getattr(torch, device.type)
    with torch.random.fork_rng(devices=[]):
        own = None if device.type == "cpu" else module.get_rng_state()
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            if own is not None:
                module.set_rng_state(own)
