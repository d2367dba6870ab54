"""A training step draws from no generator, and an example's dropout does not depend on its neighbours."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_training as tiny
import torch
from marks import pairs, slow
from small_models import FAMILIES, GENERATORS, RELATIVES, config
from torch import Tensor

from turret.adapters import attach, attachment, checkpoint_layers, drawing, trainable_parameters
from turret.engine.protocol import OptimStep
from turret.errors import AdapterError, RecipeError
from turret.methods import Full, Head, LoRA, Method, Peft, Prefix
from turret.ops.dropout import Draws
from turret.ops.table import without
from turret.train.adamw import AdamW
from turret.train.batches import EncodedRow, EncodedRows
from turret.train.losses import loss_of
from turret.train.slot import LocalSlot

METHODS: dict[str, Method] = {
    "lora": LoRA(r=2, lora_dropout=0.3, init_lora_weights=False),
    "prefix": Prefix(num_virtual_tokens=3),
    "head": Head(),
    "full": Full(),
}
GUESTS: dict[str, Method] = {
    "LoHa": Peft(peft_type="LOHA", r=2, rank_dropout=0.3, module_dropout=0.2),
    "VeRA": Peft(peft_type="VERA", r=4, vera_dropout=0.3),
    "LoRA of PEFT": Peft(peft_type="DORA", r=4, lora_dropout=0.3),
}
RATES = (  # of dropout, by the names that architectures give them
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "activation_dropout"),
    *("dropout_rate", "embedding_dropout", "mlp_dropout", "classifier_dropout", "seq_classif_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "encoder_layerdrop", "decoder_layerdrop"),
)
EVERY = [*FAMILIES, *slow(each for each in RELATIVES if each != "pegasus")]  # it has no classifier


def begun(family: str, method: Method, kind: Any = "classify") -> tuple[Any, Any, list[EncodedRow]]:
    """A base with every dropout of its family and the adapter, in training mode; a task, and six examples."""
    rates = {name: 0.2 for name in RATES if hasattr(config(family), name)}
    on = tiny.base(family, "classify" if kind == "classify" else "generate", **rates)
    if on.tokenizer.pad_token_id is None:
        on.tokenizer.pad_token = on.tokenizer.eos_token
    made, data = tiny.recipe(), tiny.dataset(kind)
    task = tiny.task_of(made, data, on)
    try:
        attach(on.model, method, generator=torch.Generator().manual_seed(1))
    except (AdapterError, RecipeError) as error:
        pytest.skip(str(error))  # no such method on this family
    on.model.train()
    return on, task, EncodedRows(task, data.train).take(range(6))


# --- no generator -----------------------------------------------------------------------------------------------------


def states() -> list[Any]:
    return [random.getstate(), torch.get_rng_state().tolist()]


@contextmanager
def tripwire() -> Iterator[None]:
    """Fails if a generator of the program moves in the block."""
    before = states()
    yield
    assert states() == before, "a generator moved"


def gradients(on: Any, task: Any, items: Sequence[EncodedRow], program: int, step: int = 3) -> Tensor:
    """Of one step in two passes, with a tripwire. program: the seed of the program's generators."""
    optimiser = AdamW(trainable_parameters(on.model))
    optimiser.steps = step - 1
    torch.manual_seed(program)
    random.seed(program)
    with tripwire():
        LocalSlot(on, task, optimiser, 42, 60).forward_backward(items)
        made = optimiser.gradients.clone()
        optimiser.step(OptimStep(0.0))
    optimiser.end()
    return made


def require_no_generator(family: str, method: Method, kind: Any = "classify") -> None:
    on, task, items = begun(family, method, kind)
    first = gradients(on, task, items, 1)
    assert torch.equal(first, gradients(on, task, items, 2)), "it depends on a generator of the program"
    assert not torch.equal(first, gradients(on, task, items, 1, step=4)), "control: another step"
    checkpoint_layers(on.model)
    assert torch.equal(first, gradients(on, task, items, 3)), "layers that are computed again draw the same"


@pytest.mark.parametrize(("family", "method"), pairs(list(EVERY), list(METHODS)))
def test_a_step_draws_from_no_generator(family: str, method: str) -> None:
    require_no_generator(family, METHODS[method])


@pytest.mark.parametrize(("family", "method"), pairs(["bert", "t5", "bart", "llama", *EVERY[9:]], list(GUESTS)))
def test_a_step_of_a_method_of_peft_draws_from_no_generator(family: str, method: str) -> None:
    require_no_generator(family, GUESTS[method])


@pytest.mark.parametrize("family", [*GENERATORS, pytest.param("pegasus", marks=pytest.mark.slow)])
def test_a_step_on_texts_draws_from_no_generator(family: str) -> None:
    require_no_generator(family, METHODS["lora"], "summarize")


def test_control_modules_that_draw_by_themselves_are_noticed() -> None:
    on, task, items = begun("bart", METHODS["lora"])
    attachment(on.model).context.draws_alone = False
    with pytest.raises(AssertionError, match="a generator moved"):
        gradients(on, task, items, 1)


# --- neighbours -------------------------------------------------------------------------------------------------------


def summed(
    model: Any, task: Any, passes: Sequence[Sequence[int]], items: Sequence[EncodedRow], step: int = 3
) -> Tensor:
    """The gradient of the sum of the examples' losses, computed in these passes of their numbers."""
    trained = list(trainable_parameters(model).values())
    total = torch.zeros(sum(each.numel() for each in trained))
    for numbers in passes:
        with drawing(model, Draws(42, step), numbers):
            loss = loss_of(model, task, [items[number] for number in numbers])
            given = torch.autograd.grad(loss * len(numbers), trained, allow_unused=True, materialize_grads=True)
        total += torch.cat([each.flatten() for each in given])
    return total


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def require_no_neighbours(family: str, method: Method) -> None:
    """The gradient of a batch's sum is that of the examples alone, in any order: so their masks are the same."""
    on, task, items = begun(family, method)
    model, items = on.model, items[:3]
    alone = summed(model, task, [[0], [1], [2]], items)
    for passes in ([[0, 1, 2]], [[2, 0, 1]], [[1], [2, 0]]):
        assert far(summed(model, task, passes, items), alone) < 1e-4, passes
    other = summed(model, task, [[0], [1], [2]], items, step=4)
    assert far(other, alone) > 1e-2, "control: masks of another step"
    exchanged = [items[1], items[0], items[2]]
    assert far(summed(model, task, [[0, 1, 2]], exchanged), alone) > 1e-2, "control: other numbers"


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("family", "method"), pairs(list(EVERY), ["lora", "prefix"]))
def test_an_examples_masks_do_not_depend_on_its_neighbours(family: str, method: str, kernels: bool) -> None:
    with without(*(() if kernels else ("kernels",))):
        require_no_neighbours(family, METHODS[method])


@pytest.mark.parametrize("method", ["VeRA", "LoRA of PEFT"])
@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_nor_do_those_of_a_method_of_peft(family: str, method: str) -> None:
    require_no_neighbours(family, GUESTS[method])


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_with_and_without_kernels_the_masks_are_the_same(family: str) -> None:
    on, task, items = begun(family, METHODS["lora"])
    model = on.model
    fast = summed(model, task, [[0, 1, 2]], items)
    with without("kernels"):
        plain = summed(model, task, [[0, 1, 2]], items)
        other = summed(model, task, [[0, 1, 2]], items, step=4)
    assert far(fast, plain) < 1e-4
    assert far(other, plain) > 1e-2, "control: other masks"
