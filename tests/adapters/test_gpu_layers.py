"""A decoder's layer as a GPU computes it, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pretend_gpu
import pytest
import small_models
import torch
from batches import rows, without_dropout
from four_bits import base_in_four_bits, needs_bitsandbytes

from turret.adapters import attach, detach, layers, lifecycle, packed
from turret.methods import LoRA, Prefix
from turret.ops.gpu.ops import ATTENTION, GpuOps, ops_with

SOME = LoRA(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"), init_lora_weights=False)
PREFIX = Prefix(num_virtual_tokens=3, reparametrize=False)
ALL = LoRA(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let CPU tensors take a GPU's layers; gives the number of layers that did."""
    assert pretend_gpu._on_a_cpu, "its attention over rows computes on a CPU too"
    taken: list[int] = []
    ops: GpuOps = ops_with(frozenset({ATTENTION}))
    own = layers.LayerHook.trained_output

    def on_gpu(self: layers.LayerHook, x: torch.Tensor, cos_sin: Any) -> torch.Tensor | None:
        y = own(self, x, cos_sin)
        taken.extend([1] * (y is not None))
        return y

    with monkeypatch.context() as patched:
        patched.setattr(layers, "ops_for", lambda *tensors: ops)
        patched.setattr(layers.LayerHook, "trained_output", on_gpu)
        yield taken


def gradients(model: Any, method: LoRA | Prefix, checkpoint: bool = False) -> dict[str, torch.Tensor]:
    """Of every factor, of a sum over the logits of three rows."""
    attach(model, method, generator=torch.Generator().manual_seed(0))
    if checkpoint:
        lifecycle.checkpoint_layers(model)
    model.train()
    sources, targets = rows(lengths=(9, 3, 14)), rows(seed=1, lengths=(4, 6, 2))
    packed.target_logits(model, sources, targets).float().logsumexp(-1).sum().backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}
    detach(model)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(gradient, other[name], atol=1e-4 * float(other[name].abs().max()), rtol=1e-3)


@pytest.mark.parametrize(
    "method", [SOME, ALL, Prefix(num_virtual_tokens=3, reparametrize=False)], ids=["some", "all", "prefix"]
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_its_gradients_are_the_modules(monkeypatch: pytest.MonkeyPatch, family: str, method: LoRA | Prefix) -> None:
    model = without_dropout(small_models.build(family, "generate"))
    with as_on_a_gpu(monkeypatch) as taken:
        found = gradients(model, method)
    hides = isinstance(method, Prefix) and family == "mistral"  # a window would hide the prefix
    assert len(taken) == (0 if hides else 2)  # layers
    same(found, gradients(model, method))


def test_its_gradients_are_the_same_if_layers_are_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.build("llama", "generate")
    dropped = ALL.model_copy(update={"lora_dropout": 0.2})
    with as_on_a_gpu(monkeypatch) as taken:
        torch.manual_seed(5)
        found = gradients(model, dropped, checkpoint=True)
        assert len(taken) == 2  # the second time ends as soon as all is saved again
        torch.manual_seed(5)
        same(found, gradients(model, dropped))


@needs_bitsandbytes
def test_its_gradients_are_the_modules_on_a_base_in_4_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = without_dropout(base_in_four_bits("llama", tmp_path, task="generate").model)
    with as_on_a_gpu(monkeypatch) as taken:
        found = gradients(model, ALL)
    assert len(taken) == 2
    same(found, gradients(model, ALL))
