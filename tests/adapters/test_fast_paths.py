"""Every fast path can be turned off by name, and gives the numbers of its reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build
from torch import Tensor

import turret
from turret.adapters import attach, classify_logits, trainable_parameters
from turret.adapters.packed import target_states
from turret.methods import LoRA
from turret.ops import table
from turret.ops.core import is_enabled
from turret.ops.cpu.compiled import library
from turret.ops.table import DECODER, ENCODER, PATHS

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels on this machine")
FAMILIES = {ENCODER: "bert", DECODER: "llama"}
TRAINED = [(name, base) for name, path in PATHS.items() if path.trains for base in path.bases]
ROWS = [torch.tensor([2, *range(5, 5 + n), 3]) for n in (5, 40, 9)]


def model_of(base: str, p: float) -> Any:
    dropped = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p} if base == ENCODER else {"hidden_size": 64}
    method = LoRA(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=p)
    task: Any = "classify" if base == ENCODER else "generate"
    model = build(FAMILIES[base], task, **dropped)
    return attach(model, method, generator=torch.Generator().manual_seed(1)).train()


def loss(model: Any, base: str) -> Tensor:
    torch.manual_seed(3)
    if base == ENCODER:
        return classify_logits(model, ROWS).square().sum()
    return target_states(model, ROWS, [torch.tensor([7, 8, 3]) for _ in ROWS]).square().sum()


def gradients(model: Any, base: str) -> list[Tensor]:
    found = torch.autograd.grad(loss(model, base), list(trainable_parameters(model).values()), allow_unused=True)
    return [each for each in found if each is not None]


def shape_of(model: Any, base: str) -> tuple[list[str], int, float]:
    """The nodes of autograd's graph by name, the bytes that they save, and the loss, which dropout changes."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = loss(model, base)
    nodes, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [each for each, _ in node.next_functions]
    names = sorted(f"{node.name()} {type(getattr(node, 'ops', None)).__name__}" for node in nodes)
    return names, sum(saved.values()), y.item()


@pytest.mark.parametrize(("name", "base"), TRAINED)
def test_a_path_gives_the_gradients_of_its_reference(name: str, base: str) -> None:
    model = model_of(base, 0.0)
    given = gradients(model, base)
    with table.without(name):
        reference = gradients(model, base)
    assert given
    for mine, theirs in zip(given, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), TRAINED)
def test_turning_a_path_off_changes_what_is_computed(name: str, base: str) -> None:
    """The control of the test above."""
    model = model_of(base, 0.2)
    with table.without(*PATHS[name].part_of):
        before = shape_of(model, base)
    with table.without(name):
        assert shape_of(model, base) != before
    with table.without(*PATHS[name].part_of):
        assert shape_of(model, base) == before


def test_the_table_lists_every_path_that_the_code_asks_for() -> None:
    asked = set()
    for file in Path(turret.__file__).parent.rglob("*.py"):
        for arguments in re.findall(r"(?<![\w.])is_enabled\(([^)]*)\)", file.read_text(encoding="utf-8")):
            asked |= set(re.findall(r'"(\w+)"', arguments))
    assert asked == set(PATHS)


def test_a_larger_path_is_off_with_its_parts() -> None:
    with table.without("flash"):
        assert not is_enabled("trained_layer")
        assert is_enabled("rms_norm")
    assert is_enabled("trained_layer")


def test_an_unknown_path_is_an_error() -> None:
    with pytest.raises(KeyError, match="flsh"), table.without("flsh"):
        pass
