"""LoRA against PEFT: the same factors give the same outputs and the same gradients in every family."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from batches import padded, rows, with_eos
from marks import pairs
from peft_twins import adapter_from, lora_twin, require_the_same_gradients
from small_models import FAMILIES, build
from torch import nn
from transformers.pytorch_utils import Conv1D

from turret.adapters import (
    attach,
    attachment,
    classify_logits,
    detach,
    mount,
    set_context,
    trainable_parameters,
)
from turret.adapters.adapter import Adapter
from turret.adapters.batch_context import BatchContext
from turret.adapters.lora import LoRAFactors, ScaledLayer
from turret.errors import AdapterError, RecipeError
from turret.methods import LoRA, Peft
from turret.ops.core import REFERENCE
from turret.ops.cpu import compiled as kernels
from turret.ops.dropout import Masks
from turret.ops.lora import lora_delta
from turret.ops.structs import Lora
from turret.ops.table import without
from turret.recipe import Recipe

NOISY = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False)


def default_targets(family: str) -> list[str]:
    """PEFT's own; query and value where it has none."""
    without = {"distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"]}
    own = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return list(own[family] if family in own else without[family])


@pytest.mark.parametrize(("family", "targets"), pairs(list(FAMILIES), [None, "all-linear"]))
def test_outputs_and_gradients_equal_pefts(family: str, targets: Any) -> None:
    model = build(family, "classify")
    method = NOISY.model_copy(update={"target_modules": targets})
    attach(model, method, generator=torch.Generator().manual_seed(1))
    twin = lora_twin(family, "classify", adapter_from(model))
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    labels = torch.tensor([0, 2, 1, 0])

    for logits in (model(**batch).logits, classify_logits(model, inputs)):
        theirs = twin(**batch).logits
        torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
        require_the_same_gradients(model, twin, logits, theirs, labels)


def test_control_one_wrong_factor_would_be_seen() -> None:
    model = attach(build("bert", "classify"), NOISY, generator=torch.Generator().manual_seed(1))
    twin = lora_twin("bert", "classify", adapter_from(model), default_targets("bert"))
    batch = padded(rows(), model.config.pad_token_id)
    with torch.no_grad():
        next(iter(attachment(model).linears.values())).slots["1"].lora_B.zero_()
        assert (model(**batch).logits - twin(**batch).logits).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_pefts(family: str) -> None:
    model = attach(build(family, "classify"), LoRA())
    assert {path.rsplit(".", 1)[-1] for path in attachment(model).linears} == set(default_targets(family))


@torch.no_grad()
def test_rank_stabilised_scaling_equals_pefts() -> None:
    method = NOISY.model_copy(update={"use_rslora": True})
    model = attach(build("bert", "classify"), method, generator=torch.Generator().manual_seed(1))
    twin = lora_twin("bert", "classify", adapter_from(model), default_targets("bert"))
    batch = padded(rows(), model.config.pad_token_id)
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@torch.no_grad()
def test_pissa_starts_at_the_base_and_is_stored_as_plain_lora_of_twice_the_rank(family: str, rslora: bool) -> None:
    method = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights="pissa", use_rslora=rslora)
    model, inputs = build(family, "classify"), rows()
    batch = padded(inputs, model.config.pad_token_id)
    own = model(**batch).logits
    attach(model, method)
    torch.testing.assert_close(model(**batch).logits, own, atol=1e-5, rtol=1e-5)
    factors = next(iter(attachment(model).linears.values())).slots["1"]
    weight = next(iter(attachment(model).linears.values())).base_layer.weight
    weight = weight if family == "bert" else weight.mT
    U, S, Vh = torch.linalg.svd(weight)
    product = factors.lora_B @ factors.lora_A * factors.scaling
    torch.testing.assert_close(product, U[:, :4] * S[:4] @ Vh[:4], atol=1e-4, rtol=1e-4)
    for each in trainable_parameters(model).values():
        each.add_(torch.randn_like(each) * 0.02)
    trained = model(**batch).logits
    stored = adapter_from(model)
    assert isinstance(stored.method, LoRA)
    assert stored.method.r == 8
    fresh = mount(build(family, "classify"), stored)
    torch.testing.assert_close(fresh(**batch).logits, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_a_start_that_needs_data_is_refused_in_one_line(start: str) -> None:
    with pytest.raises(RecipeError, match=f'without a pass over the data, given "{start}": leave it out'):
        Recipe(name="a", base="b", data="c").with_overrides({"method.init_lora_weights": start})
    with pytest.raises(RecipeError, match=f'without a pass over the data, given "{start}": leave it out'):
        attach(build("bert", "classify"), Peft(peft_type="LORA", init_lora_weights=start))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mixed_batch_equals_each_row_alone_and_a_bare_row_equals_the_base(family: str) -> None:
    adapters = []
    for seed, r in ((1, 2), (2, 8)):
        method = NOISY.model_copy(update={"r": r, "target_modules": None if seed == 1 else "all-linear"})
        generator = torch.Generator().manual_seed(seed)
        adapters.append(adapter_from(attach(build(family, "classify"), method, generator=generator)))
    model = build(family, "classify")
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    own = model(**batch).logits
    for slot, adapter in enumerate(adapters, 1):
        mount(model, adapter, slot)
    slots = (1, 0, 2, 1)
    context = attachment(model).context
    with set_context(context, slots, None):
        mixed = model(**batch).logits
    unpadded = classify_logits(model, inputs, slots)
    torch.testing.assert_close(mixed, unpadded, atol=2e-5, rtol=2e-5)
    for row, slot in enumerate(slots):
        context.active = slot
        torch.testing.assert_close(mixed[row], model(**batch).logits[row], atol=1e-5, rtol=1e-5)
        alone = classify_logits(model, [inputs[row]])[0]
        torch.testing.assert_close(unpadded[row], alone, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(mixed[1], own[1], atol=1e-5, rtol=1e-5)
    assert (mixed[0] - own[0]).abs().max() > 1e-3


def test_detach_gives_back_the_very_same_model() -> None:
    model = build("roberta", "classify")
    before = {name: (id(each), each.clone(), each.requires_grad) for name, each in model.named_parameters()}
    modules = {name: id(each) for name, each in model.named_modules()}
    implementation = model.config._attn_implementation
    attach(model.train(), LoRA(r=2, target_modules="all-linear"))
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    classify_logits(model, rows()).square().sum().backward()
    optimizer.step()
    detach(model)
    assert model.training
    assert modules == {name: id(each) for name, each in model.named_modules()}
    assert implementation == model.config._attn_implementation
    after = {name: (id(each), each, each.requires_grad) for name, each in model.named_parameters()}
    assert before.keys() == after.keys()
    for name, (identity, value, flag) in before.items():
        assert identity == after[name][0]
        assert torch.equal(value, after[name][1])
        assert flag == after[name][2]


def test_only_the_adapter_and_its_head_are_trained() -> None:
    model = attach(build("distilbert", "classify"), LoRA(r=2))
    names = trainable_parameters(model)
    assert all("slots.1" in name for name in names)
    assert any("pre_classifier" in name for name in names)


@pytest.mark.parametrize(
    "parts", [("factors",), ("input",), ("output",), ("shift",), ("factors", "input", "output", "shift")]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merged_layer_is_the_layer_with_its_change(parts: tuple[str, ...], transposed: bool) -> None:
    torch.manual_seed(3)
    layer = Conv1D(5, 3) if transposed else nn.Linear(3, 5)
    nn.init.normal_(layer.bias)
    every = {
        "factors": (torch.randn(2, 3), torch.randn(5, 2)),
        "input": torch.randn(3),
        "output": torch.randn(5),
        "shift": torch.randn(5),
    }
    change = ScaledLayer(**{part: every[part] for part in parts})
    x = torch.randn(4, 3)

    merged = torch.func.functional_call(layer, change.merged_parameters(layer), x)
    # the change is LoRA's, IA3's and DoRA's: what multiplies the output multiplies the base's bias too
    torch.testing.assert_close(merged, change(layer, x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged, layer(x), atol=1e-2)
    assert [t.tolist() for t in change.to(torch.device("cpu")).tensors] == [t.tolist() for t in change.tensors]
    assert {t.dtype for t in change.merged_parameters(layer.bfloat16()).values()} == {torch.bfloat16}


@torch.no_grad()
def test_a_merged_weight_is_the_sum_written_out() -> None:
    torch.manual_seed(3)
    A, B = torch.randn(2, 6), torch.randn(4, 2)
    for layer in (nn.Linear(6, 4), Conv1D(4, 6)):
        W = layer.weight if isinstance(layer, nn.Linear) else layer.weight.mT
        expected = torch.tensor(
            [[W[i, j] + 3 * sum(B[i, k] * A[k, j] for k in range(2)) for j in range(6)] for i in range(4)]
        )
        merged = ScaledLayer((A, 3 * B)).merged_parameters(layer)["weight"]
        torch.testing.assert_close(merged if isinstance(layer, nn.Linear) else merged.mT, expected)


def test_a_layer_without_a_bias_takes_what_needs_none() -> None:
    layer = nn.Linear(3, 5, bias=False)
    assert ScaledLayer(output=torch.ones(5)).merged_parameters(layer).keys() == {"weight"}
    with pytest.raises(AdapterError, match="has no bias to merge a trained one into: export it unmerged"):
        ScaledLayer(shift=torch.ones(5)).merged_parameters(layer)


def test_a_target_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(AdapterError, match=r"target_modules q_proj not found in bert: expected some of .*query"):
        attach(build("bert", "classify"), LoRA(target_modules=("q_proj",)))


def test_a_second_attach_is_refused() -> None:
    model = attach(build("bert", "classify"), LoRA())
    with pytest.raises(AdapterError, match="already carries"):
        attach(model, LoRA())


def test_factors_that_do_not_fit_are_refused_by_name() -> None:
    adapter = adapter_from(attach(build("bert", "classify"), NOISY))
    name = next(iter(adapter.tensors))
    for change, message in (
        ({**adapter.tensors, name: torch.zeros(4, 5)}, "has shapes"),
        ({k: v for k, v in adapter.tensors.items() if k != name}, "needs lora_A and lora_B"),
        ({**adapter.tensors, "base_model.model.bert.nowhere.lora_A.weight": torch.zeros(4, 64)}, "no layer"),
        ({**adapter.tensors, "odd": torch.zeros(1)}, "not a LoRA factor"),
        ({}, "has no effect"),
    ):
        broken = Adapter(adapter.method, change, adapter.head, adapter.base)
        with pytest.raises(AdapterError, match=message):
            mount(build("bert", "classify"), broken)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("sizes", [(8, 6), (64, 32)], ids=["odd sizes", "sizes that kernels take"])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_the_fast_way_is_the_formula_with_its_gradients(rate: float, sizes: tuple[int, int], by_kernels: bool) -> None:
    torch.manual_seed(0)
    d_in, d_out = sizes
    factors = LoRAFactors(torch.randn(3, d_in), torch.randn(d_out, 3), 0.7, rate).train()
    x, layer = torch.randn(2, 5, d_in, requires_grad=True), nn.Linear(d_in, d_out).requires_grad_(False)
    inputs = (x, factors.lora_A, factors.lora_B)
    with nullcontext() if by_kernels else without("kernels"):
        torch.manual_seed(1)
        fast = factors.with_base(layer, x, BatchContext())
        torch.manual_seed(1)
        plain = layer(x) + factors(x)
        expected = by_kernels and kernels.library() is not None and d_in % 32 == 0
        assert fast.grad_fn.ops.kernels == expected
        torch.testing.assert_close(fast, plain)
        dy = torch.randn_like(plain)
        given, wanted = (torch.autograd.grad(each, inputs, dy) for each in (fast, plain))
        for ours, theirs in zip(given, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.manual_seed(2)
        other = factors.with_base(layer, x, BatchContext())
    assert rate == 0.0 or not torch.allclose(other, plain)  # the control: another mask


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_gradients_that_are_written_out_are_those_of_the_formula(p: float) -> None:
    x, A, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 6), (3, 6), (5, 3)))
    dropped = Masks().arguments(p, lambda: torch.arange(7))
    y, dy = torch.zeros(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    mask = dropped.keep_mask(x.shape) if p else 1.0
    expected = lora_delta(x * mask * dropped.scale, A, B, 0.7)
    lora, dx = Lora(A, B, 0.7, p, dropped), torch.zeros(7, 6, dtype=torch.float64)
    with torch.no_grad():
        inner = REFERENCE.add_lora([y], x, [lora])
        dA, dB = REFERENCE.lora_backward([lora], lambda: x, inner, [dy], dx)
    torch.testing.assert_close(y, expected)
    for given, wanted in zip((dx, dA, dB), torch.autograd.grad(expected, (x, A, B), dy), strict=True):
        torch.testing.assert_close(given, wanted.to(given.dtype))
