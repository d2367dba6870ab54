"""What an adapter is before its first step: seeded anew, or the numbers of a stored version that it goes on from.

Knows adapters on a base. Refuses to know where a version is stored, and what comes after the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turret import adapters
from turret.adapters import Adapter
from turret.errors import AdapterError, TrainingError
from turret.tasks import stored_task
from turret.train.optim import AdamW


@dataclass(frozen=True)
class InitialAdapter:
    """The version that `train.init_from` names, in memory: the parent of what is trained."""

    version: str  # "sentiment@2"
    digest: str  # of its content, which the lineage names
    adapter: Adapter

    def require_fits(self, base: Any, task: Any) -> None:
        """The same base, and for a classifier the same labels; raises AdapterError or WrongBase."""
        adapters.require_base(self.adapter, base.fingerprint)
        said = self.adapter.task
        if said and stored_task(said).generates != task.generates:
            raise AdapterError(f"it is to {said.get('kind')}, and this is to {task.kind}: train from the base instead")
        if said and list(said.get("labels") or ()) != list(task.labels):
            few = [", ".join(map(str, labels[:8])) for labels in (said.get("labels") or (), task.labels)]
            raise AdapterError(f"its labels are {few[0]}, and these are {few[1]}: train from the base instead")


def attach(recipe: Any, base: Any, task: Any, start: InitialAdapter | None = None) -> None:
    """Put the recipe's new adapter on the base: seeded factors, a prefix from real words, the head trainable; or, with
    a start, that version's numbers in their place. Raises AdapterError for one that does not fit."""
    if start is None and recipe.train.init_from is not None:
        raise TrainingError(
            f"train.init_from names {recipe.train.init_from}, and nothing was read: train with Workspace.train, or "
            "give fit a start"
        )
    own = tuple(f"{name}." for name in base.family.head_modules)
    fresh = {name.rpartition(".")[0] for name in base.fresh if not name.startswith(own)}  # a pooler, say
    adapters.attach(
        base.model,
        recipe.method,
        init_ids=starting_words(recipe, base, task),
        generator=torch.Generator().manual_seed(recipe.seed),
        head=() if task.generates else tuple(sorted(fresh)),
    )
    if recipe.train.int8 and recipe.method.not_int8 is None:  # a comparison trains those methods beside others
        adapters.multiply_in_int8(base.model)
    if start is not None:
        try:
            start.require_fits(base, task)
            adapters.start_from(base.model, start.adapter, torch.Generator().manual_seed(recipe.seed))
        except AdapterError as error:
            adapters.detach(base.model)
            raise type(error)(f"training cannot start from {start.version}: {error}") from error


def optimiser_of(recipe: Any, base: Any) -> AdamW:
    """The optimiser of what is attached; the family's head moves at `train.head_lr_ratio` times the rate."""
    trained, train = adapters.trainable_parameters(base.model), recipe.train
    heads = tuple(f"{name}." for name in base.family.head_modules)
    ratios = {name: train.head_lr_ratio or 1.0 for name in trained if name.startswith(heads)}
    return AdamW(trained, weight_decay=train.weight_decay, ratios=ratios)


def starting_words(recipe: Any, base: Any, task: Any) -> Tensor | None:
    """Token ids of the text that the method starts from: its own, or an order for the task. None: it needs no text."""
    text = recipe.method.starting_text(task.instruction)
    if text is None:
        return None
    ids: Tensor = torch.tensor(base.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    return ids
