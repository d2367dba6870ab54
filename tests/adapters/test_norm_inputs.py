"""An operation that reads a norm's output saves the norm's input instead; its gradients stay the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import build
from torch import Tensor

from turret.adapters import attach, classify_logits, fused, trainable_parameters
from turret.adapters.fused import residual
from turret.adapters.packed import target_states
from turret.methods import LoRA, Method, Prefix
from turret.ops.cpu import Library, library

METHODS: tuple[Method, ...] = (
    LoRA(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2),
    Prefix(num_virtual_tokens=3),
)
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


def outcome(model: Any, family: str) -> tuple[int, list[Tensor]]:
    """(bytes saved, gradients) of one pass over three rows."""
    torch.manual_seed(3)
    rows = [torch.tensor([2, 5, 6, 7, 8, 9, 3]), torch.tensor([2, 3]), torch.tensor([2, *range(5, 40), 3])]
    with saved() as found:
        if family in ("bert", "roberta"):
            y = classify_logits(model, rows)
        else:
            y = target_states(model, rows, [torch.tensor([7, 8, 3]) for _ in rows])
    trained = list(trainable_parameters(model).values())
    given = torch.autograd.grad(y.square().sum(), trained, allow_unused=True)
    return sum(found.values()), [each for each in given if each is not None]


@needed
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "qwen3"])
def test_less_is_kept_and_the_gradients_are_the_same(
    family: str, method: Method, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiled: as on a processor with matrix tiles, where a gated MLP saves its input instead of gate and up."""
    monkeypatch.setattr(Library, "tiled", lambda *_: tiled)
    kind = "classify" if family in ("bert", "roberta") else "generate"
    wide = {} if kind == "classify" else {"hidden_size": 64}  # a multiple of what the kernels of LoRA take
    model = attach(build(family, kind, **wide), method, generator=torch.Generator().manual_seed(1)).train()
    with fused.without("trained_layer"):
        less, given = outcome(model, family)
    with fused.without("norm_inputs"):
        more, wanted = outcome(model, family)
    assert given
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, wanted, strict=True))
    if isinstance(method, LoRA) or (kind == "generate" and tiled):
        assert less < more
    else:  # nothing saves a norm's output
        assert less == more


@needed
def test_a_gated_mlp_has_the_same_gradients_whatever_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tiled in (True, False):
        monkeypatch.setattr(Library, "tiled", lambda *_, tiled=tiled: tiled)
        model = attach(build("llama", "generate"), METHODS[1], generator=torch.Generator().manual_seed(1)).train()
        found.append(outcome(model, "llama"))
    (less, given), (more, wanted) = found
    assert less < more
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, wanted, strict=True))


@needed
def test_an_output_that_was_changed_since_is_kept_itself() -> None:
    norm = build("llama", "generate").model.norm
    x = torch.randn(1, 5, norm.weight.numel(), requires_grad=True)
    found = library()
    assert found is not None
    y = found.rms_norm(x.detach(), norm.weight.detach(), 1e-6)[0]
    again = residual.RecomputedRMSNorm(norm.weight.detach(), 1e-6, found)
    marked = residual.with_input(y, x, again)
    own, by = residual.to_save(marked)
    assert by is again
    assert torch.equal(again.of(own), y)
    marked.add_(1.0)
    own, by = residual.to_save(marked)
    assert by is None
    assert own is marked
    assert residual.to_save(x) == (x, None)
