"""An adapter that starts from another answers exactly like it before the first step, or says why it cannot start."""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import torch

from turret import adapters
from turret.adapters import Adapter, BaseInfo
from turret.errors import AdapterError
from turret.methods import Full, Head, LoRA, Method, Prefix

IDS = [torch.tensor([5, 9, 17, 30, 8]), torch.tensor([40, 3])]


def made(model: Any, method: Method, seed: int) -> Adapter:
    """A finished adapter, every number of which differs from a new adapter's."""
    adapters.attach(model, method, generator=torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in adapters.trainable_parameters(model).values():
            each.add_(0.05 * torch.randn(each.shape, generator=draw))
    tensors, head, method = adapters.extract(model)
    adapters.detach(model)
    return Adapter(method, tensors, head, BaseInfo("small"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(each, other[name]) for name, each in one.items())


METHODS = (
    LoRA(),
    LoRA(use_rslora=True, init_lora_weights="gaussian"),
    Prefix(num_virtual_tokens=3, encoder_hidden_size=8),
    Prefix(num_virtual_tokens=3, reparametrize=False),
    Full(),
    Head(),
)
CASES = [(family, method) for family in ("bert", "llama", "t5") for method in METHODS]


@pytest.mark.parametrize(("family", "method"), CASES[:-1])  # the small T5 has no head
def test_it_begins_with_every_number_of_the_other_and_only_what_is_new_is_trained(family, method) -> None:
    model = small_models.build(family, "classify" if family != "t5" else "generate")
    parent = made(model, method, seed=1)
    adapters.attach(model, method, generator=torch.Generator().manual_seed(2))
    names = set(adapters.trainable_parameters(model))
    adapters.start_from(model, parent, torch.Generator().manual_seed(3))
    tensors, head, _ = adapters.extract(model)
    assert same({**tensors, **head}, {**parent.tensors, **parent.head})
    assert set(adapters.trainable_parameters(model)) == names
    if family != "t5":
        model.eval()  # no dropout
        with torch.no_grad():
            begun = adapters.classify_logits(model, IDS)
        adapters.detach(model)
        adapters.mount(model, parent)
        with torch.no_grad():
            assert torch.allclose(begun, adapters.classify_logits(model, IDS), atol=1e-6)


def test_pissa_goes_on_as_the_plain_lora_it_is_stored_as() -> None:
    model = small_models.build("bert", "classify")
    parent = made(model, LoRA(r=4, init_lora_weights="pissa"), seed=1)
    assert isinstance(parent.method, LoRA)
    adapters.attach(model, LoRA(r=8, lora_alpha=parent.method.lora_alpha))
    adapters.start_from(model, parent)
    assert same(adapters.extract(model).tensors, parent.tensors)


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (LoRA(r=4), r"it has r 8 and scaling 4, and this recipe has r 4 and scaling 8"),
        (LoRA(lora_alpha=8), r"scaling 4, .* recipe has r 8 and scaling 1: set method.r and method.lora_alpha"),
        (LoRA(target_modules=("query",)), r"it has base_model\.model\..*value\.lora_A\.weight, unlike this recipe"),
        (LoRA(target_modules="all-linear"), r"it has no base_model\.model\..*, unlike this recipe"),
        (LoRA(init_lora_weights="pissa"), 'init_lora_weights = "pissa" starts from the base'),
        (Prefix(num_virtual_tokens=3), "the adapter is a lora and the recipe trains prefix: set method.kind to lora"),
        (Full(), "the adapter is a lora and the recipe trains full"),
    ],
)
def test_another_method_or_shape_is_refused_by_what_differs(method, complaint) -> None:
    model = small_models.build("bert", "classify")
    parent = made(model, LoRA(), seed=1)
    adapters.attach(model, method)
    with pytest.raises(AdapterError, match=complaint) as refused:
        adapters.start_from(model, parent)
    assert "\n" not in str(refused.value)


def test_a_prefix_of_another_length_and_a_head_of_another_size_are_refused() -> None:
    model = small_models.build("bert", "classify", num_labels=3)
    parent = made(model, Prefix(num_virtual_tokens=3), seed=1)
    adapters.attach(model, Prefix(num_virtual_tokens=4))
    with pytest.raises(
        AdapterError, match=r"its prompt_embeddings has shape \(2, 2, 4, 3, 16\), expected \(2, 2, 4, 4, 16\)"
    ):
        adapters.start_from(model, parent)
    adapters.detach(model)
    other = small_models.build("bert", "classify", num_labels=2)
    adapters.attach(other, Prefix(num_virtual_tokens=3))
    with pytest.raises(AdapterError, match=r"its classifier.weight has shape \(3, 64\), expected \(2, 64\)"):
        adapters.start_from(other, parent)
