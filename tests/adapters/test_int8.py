"""Training with frozen layers in 8 bits gives nearly the same gradients, and does not change an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import build
from torch import Tensor

from turret import adapters
from turret.adapters import attach, classify_logits, detach, hooks, multiply_in_int8, trainable_parameters
from turret.adapters.packed import target_states
from turret.errors import AdapterError
from turret.methods import LoRA, Method, Prefix
from turret.ops import cpu as kernels
from turret.ops import frozen

able = pytest.mark.skipif(not kernels.int8(), reason="no products in 8 bits on this processor")
EVERYWHERE = LoRA(r=4, target_modules="all-linear", init_lora_weights=False)
FEW = LoRA(r=4, init_lora_weights=False)
PREFIX = Prefix(num_virtual_tokens=3)
WIDE: dict[str, dict[str, int]] = {
    "bert": {"intermediate_size": 128},
    "roberta": {"intermediate_size": 128},
    "distilbert": {"hidden_dim": 128},
    "modernbert": {"intermediate_size": 128},
    "llama": {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
    "qwen3": {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
    "t5": {"d_model": 64, "d_ff": 128},
    "bart": {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
}


def model_of(family: str, method: Method, dtype: torch.dtype = torch.float32) -> Any:
    classifies = family in ("bert", "roberta", "distilbert", "modernbert")
    model = build(family, "classify" if classifies else "generate", **WIDE[family]).to(dtype)
    return attach(model, method, generator=torch.Generator().manual_seed(1)).train()


def output(model: Any) -> Tensor:
    torch.manual_seed(3)  # of dropout
    rows = [torch.tensor([2, *range(5, 5 + n), 3]) for n in (40, 1, 17)]
    if hasattr(model, "classifier") or hasattr(model, "score"):
        return classify_logits(model, rows)
    return target_states(model, rows, [torch.tensor([*range(7, 27), 3]) for _ in rows])


def gradients(model: Any) -> Tensor:
    trained = list(trainable_parameters(model).values())
    given = torch.autograd.grad(output(model).float().square().mean(), trained, allow_unused=True)
    return torch.cat([each.flatten().float() for each in given if each is not None])


def off(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).norm() / expected.double().norm())


def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that counts as too large to keep its rounded matrices."""
    monkeypatch.setattr(hooks, "SMALL", 0)


@able
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [EVERYWHERE, FEW, PREFIX], ids=["LoRA on all", "LoRA on some", "prefix"])
@pytest.mark.parametrize("family", WIDE)
def test_gradients_are_off_by_little_more_than_those_in_bfloat16(
    family: str, method: Method, dtype: torch.dtype
) -> None:
    exact = model_of(family, method)
    expected, wanted = output(exact).detach(), gradients(exact)
    coarse = off(gradients(model_of(family, method, torch.bfloat16)), wanted)
    model = model_of(family, method, dtype)
    own = output(model).detach()
    multiply_in_int8(model)
    y, given = output(model).detach(), gradients(model)
    assert not torch.equal(y, own)  # 8 bits there are
    assert off(y, expected) < 0.2
    assert off(given, wanted) < 4 * coarse < 1.2


@able
def test_gradients_of_other_weights_are_far_away() -> None:
    """The control of the test above."""
    model = model_of("bert", EVERYWHERE)
    wanted = gradients(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.key.base_layer.weight.roll(1, 0)
        model.bert.encoder.layer[0].intermediate.dense.base_layer.weight.mul_(-1.0)
    multiply_in_int8(model)
    assert off(gradients(model), wanted) > 0.5


@able
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_who_wants_no_gradient_gets_the_bases_own_numbers(family: str) -> None:
    model = model_of(family, EVERYWHERE)
    with torch.no_grad():
        before = output(model)
        multiply_in_int8(model)
        assert torch.equal(output(model), before)


@able
def test_the_adapter_is_taken_off_with_everything() -> None:
    model = build("bert", "classify", **WIDE["bert"])
    ids = torch.tensor([[2, *range(5, 45), 3]])
    before, own = model(ids).logits, {name: vars(each).copy() for name, each in model.named_modules()}
    multiply_in_int8(attach(model, EVERYWHERE))
    detach(model)
    assert torch.equal(model(ids).logits, before)
    assert all(vars(each).keys() == own[name].keys() for name, each in model.named_modules())


@able
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_kept_rounded_gives_the_same_numbers_as_what_is_rounded_anew(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, anew = model_of(family, EVERYWHERE), model_of(family, EVERYWHERE)
    multiply_in_int8(kept)
    large(monkeypatch)
    multiply_in_int8(anew)
    monkeypatch.setattr(frozen, "LEAST", 1)  # as few tokens as are kept for
    assert torch.equal(output(kept), output(anew))
    assert torch.equal(gradients(kept), gradients(anew))
    first, second = (adapters.attachment(each).context.int8 for each in (kept, anew))
    assert first is not None
    assert second is not None
    assert first.rounded
    assert second.rounded is None


@able
def test_no_more_is_kept_rounded_than_the_layers_matrices_twice() -> None:
    model = model_of("bert", EVERYWHERE)
    layers = adapters.int8_layers(model)
    multiply_in_int8(model)
    gradients(model)
    int8 = adapters.attachment(model).context.int8
    assert int8 is not None
    bytes_, numbers = int8.bytes, 2 * sum(each.weight.numel() for each in layers)
    assert numbers * 0.9 < bytes_ < numbers * 1.1  # the first layer's queries have nobody to hand a gradient down to


@able
def test_weights_that_have_changed_since_are_rounded_again() -> None:
    model = model_of("bert", EVERYWHERE)
    multiply_in_int8(model)
    before = output(model).detach()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.base_layer.weight.mul_(-1.0)
    assert off(output(model).detach(), before) > 0.1


@able
def test_few_tokens_are_multiplied_as_ever_where_every_product_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    large(monkeypatch)
    model = model_of("bert", EVERYWHERE).eval()
    row = [torch.tensor([2, 7, 3])]
    before = classify_logits(model, row)
    multiply_in_int8(model)
    assert torch.equal(classify_logits(model, row), before)


@able
def test_a_number_that_is_not_finite_is_not_rounded_away() -> None:
    model = model_of("bert", EVERYWHERE)
    multiply_in_int8(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[6] = torch.nan
    assert output(model).isnan().any()


@able
def test_a_base_without_a_layer_of_such_sizes_is_refused_and_stays_attached_as_it_was() -> None:
    model = attach(build("llama", "generate"), FEW)  # 48 wide
    with pytest.raises(AdapterError, match=r"no layer of this base has sizes that are multiples of 64: leave"):
        multiply_in_int8(model)
    assert not adapters.attachment(model).context.int8


@able
def test_a_base_on_another_device_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"needs a CPU, and this base is on meta: leave train.int8 off"):
        adapters.int8_layers(build("bert", "classify").to("meta"))


def test_a_machine_that_cannot_says_so() -> None:
    model = attach(build("bert", "classify"), FEW)
    with kernels.without(), pytest.raises(AdapterError, match=r"cannot multiply in 8 bits .*: leave train.int8 off"):
        multiply_in_int8(model)
