"""A layer that reads a norm's output saves the norm's input instead; its gradients stay the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import build
from torch import Tensor

from turret.adapters import attach, classify_logits, trainable_parameters
from turret.adapters.fused import layers
from turret.kernels import NO_DROPOUT, library
from turret.methods import LoRA

needed = pytest.mark.skipif(library() is None, reason="no kernels on this machine")


@contextmanager
def saved() -> Iterator[dict[int, int]]:
    """Bytes of everything that is saved for a backward pass, by address."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def outcome(model: Any) -> tuple[int, list[Tensor]]:
    """(bytes saved, gradients) of one pass over three rows."""
    torch.manual_seed(3)
    rows = [torch.tensor([2, 5, 6, 7, 8, 9, 3]), torch.tensor([2, 3]), torch.tensor([2, *range(5, 40), 3])]
    with saved() as found:
        y = classify_logits(model, rows)
    trained = list(trainable_parameters(model).values())
    given = torch.autograd.grad(y.square().sum(), trained, allow_unused=True)
    return sum(found.values()), [each for each in given if each is not None]


@needed
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_less_is_kept_and_the_gradients_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoRA(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2)
    model = attach(build(family, "classify"), lora, generator=torch.Generator().manual_seed(1)).train()
    less, given = outcome(model)
    monkeypatch.setattr(layers, "to_save", lambda y: (y, None))
    more, wanted = outcome(model)
    assert given
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, wanted, strict=True))
    assert less < more


@needed
def test_an_output_that_was_changed_since_is_kept_itself() -> None:
    found = library()
    assert found is not None
    weight, bias, x = torch.rand(16), torch.rand(16), torch.randn(1, 5, 16)
    y, s, stats = found.added_norm(x, torch.zeros_like(x), weight, bias, 1e-6, NO_DROPOUT)
    again = layers.RecomputedLayerNorm(weight, bias, stats, found)
    marked = layers.with_input(y, s, again)
    own, by = layers.to_save(marked)
    assert by is again
    assert torch.equal(again.of(own), y)
    marked.add_(1.0)
    own, by = layers.to_save(marked)
    assert by is None
    assert own is marked
    assert layers.to_save(x) == (x, None)
