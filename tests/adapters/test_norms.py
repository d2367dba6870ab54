"""The frozen norm equals transformers' own: bit for bit without gradients, up to rounding in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import build
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from turret.adapters import attach, detach
from turret.adapters.batch_context import BatchContext
from turret.adapters.layers import FrozenNorm
from turret.families import family_of
from turret.methods import Full, Head

OWN: tuple[Any, ...] = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, T5LayerNorm)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize(
    ("weight", "input_"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_it_gives_the_same_bits_and_in_training_the_same_gradient(kind: Any, weight: str, input_: str) -> None:
    own, narrows = kind(16, eps=1e-5).requires_grad_(False), kind is T5LayerNorm
    own.weight.copy_(torch.randn(16))
    own = own.to(getattr(torch, weight))
    x = (3 * torch.randn(2, 7, 16)).to(getattr(torch, input_)).requires_grad_()
    with torch.no_grad():
        assert torch.equal(FrozenNorm(own, BatchContext(), narrows)(x), own(x))
    ours, theirs = FrozenNorm(own, BatchContext(), narrows)(x), own(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6 if weight == "float32" else 2**-7, atol=1e-6)
    assert ours.dtype == theirs.dtype
    dy = torch.randn_like(ours)
    (mine,), (reference,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
    accuracy = {"atol": 1e-6, "rtol": 1e-5} if "bfloat16" not in (weight, input_) else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(mine, reference, **accuracy)
    assert not torch.allclose(mine.float(), dy.float())  # the control: the gradient is not passed through


@pytest.mark.parametrize("family", ["llama", "qwen3", "t5"])
def test_every_norm_of_the_family_is_replaced_and_comes_back(family: str) -> None:
    model = build(family, "generate")
    norms = family_of(model.config).fast.rms_norms
    own = {path: module for path, module in model.named_modules() if type(module).__name__ in norms}
    names = [name for name, _ in model.named_parameters()]
    assert own
    attach(model, Head())
    assert all(isinstance(model.get_submodule(path), FrozenNorm) for path in own)
    assert set(names) <= {name for name, _ in model.named_parameters()}  # no parameter has another name
    detach(model)
    assert all(model.get_submodule(path) is module for path, module in own.items())


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    model = attach(build("llama", "generate"), Full()).train()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
    assert all(each.grad is not None for name, each in model.named_parameters() if "norm" in name)
