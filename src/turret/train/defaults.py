"""The numbers a training takes where its recipe names none. They stand here only.

`benchmarks/defaults.py` chose them on validation splits; `docs/measured.md` has what they give. Knows no model and no
torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from turret.methods import Full, Head, LoRA, Method, Peft, Prefix

LARGE_BASE = 1_000_000_000  # parameters; from here on the published LoRA rates hold, below it the measured ones
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20

# IA3 (Liu et al. 2022) and VeRA (Kopiczko et al. 2024) train few numbers that multiply, at several times LoRA's rate;
# the embeddings of a prompt are trained as the keys and values of a prefix without its MLP. All else as LoRA.
PEFT_RATES = {"IA3": 3e-3, "VERA": 4e-3, "PROMPT_TUNING": 1e-2, "P_TUNING": 1e-3}


@dataclass(frozen=True)
class Defaults:
    """What a method trains with on a base."""

    lr: float
    steps: int  # with fewer it is not trained out
    head_lr_ratio: float | None = None  # how many times the rate a classifier's head moves at; None: once


def defaults_of(method: Method, family_kind: str, *, classify: bool, parameters: int = 0) -> Defaults:
    """The method's own numbers for a task on an encoder, a decoder or an encoder-decoder of so many parameters.

    LoRA: 1e-3 measured best below a billion weights, where Hu et al. (2021) take 2e-4 to 5e-4; from there on 2e-4, as
    QLoRA (Dettmers et al. 2023) for 7B and 13B.
    Prefix: 1e-3 through the reparametrising MLP. Where the keys and values themselves are trained, 3e-2 on an encoder
    and 1e-2 on others. One step of Adam moves a weight by about the rate. A key or value behind the MLP is a sum over
    its hidden units, so it moves by up to `encoder_hidden_size` times as much, and all virtual tokens move together.
    Full: 1e-4, and 2e-5 from a billion weights on (Devlin et al. 2019 take 2e-5 to 5e-5 for BERT, and far more steps).
    Head: a logistic regression on frozen features, 1e-3.
    A new head beside LoRA moves ten times as fast: at LoRA's rate its weights take hundreds of steps to become as large
    as twelve classes need, and until then little reaches LoRA.
    """
    large = parameters >= LARGE_BASE
    steps = CLASSIFY_STEPS.get(method.kind, FEWEST_STEPS) if classify else FEWEST_STEPS
    if isinstance(method, Peft) and method.peft_type in PEFT_RATES:
        return Defaults(PEFT_RATES[method.peft_type], steps)
    if isinstance(method, (LoRA, Peft)):
        return Defaults(2e-4 if large else 1e-3, steps, HEAD_LR_RATIO if classify else None)
    if isinstance(method, Prefix):
        flat = 3e-2 if family_kind == "encoder" else 1e-2
        return Defaults(1e-3 if method.on(family_kind).reparametrize else flat, steps)
    if isinstance(method, Full):
        return Defaults(2e-5 if large else 1e-4, steps)
    assert isinstance(method, Head)
    return Defaults(1e-3, steps)


FEWEST_STEPS = 20  # with fewer little can be learnt, whatever the method
HEAD_LR_RATIO = 10.0
CLASSIFY_STEPS = {"lora": 250, "prefix": 1200, "full": 100, "head": 100, "peft": 250}


def epochs_for(steps: int, examples: int, batch_size: int) -> int:
    """The fewest epochs of so many examples that make so many steps."""
    return math.ceil(steps / math.ceil(examples / batch_size))


def filled(recipe: Any, base: Any, task_kind: str, examples: int) -> Any:
    """The recipe with the numbers it left out: what is trained from here on depends on no default.

    `lr = "auto"` stays until trials have found it.

    Args:
        base: the loaded base.
        examples: how many are trained on.
    """
    method, train = recipe.method, recipe.train
    if isinstance(method, Prefix):
        method = method.on(base.family.kind)
    parameters = sum(each.numel() for each in base.model.parameters())
    own = defaults_of(method, base.family.kind, classify=task_kind == "classify", parameters=parameters)
    wanted = epochs_for(own.steps, max(1, examples), train.batch_size)
    epochs = train.epochs or min(MOST_EPOCHS, max(FEWEST_EPOCHS, wanted))
    ratio = None if isinstance(train.lr, float) else own.head_lr_ratio  # a rate that is stated is that of all
    update = {"lr": train.lr or own.lr, "epochs": epochs, "head_lr_ratio": train.head_lr_ratio or ratio}
    return recipe.model_copy(update={"method": method, "train": train.model_copy(update=update)})
