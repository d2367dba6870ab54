"""Adapters on a base in 4 bits: the numbers of the unpacked weights, little saved, and refusals in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters_at_hand import CLASSIFIES
from batches import rows
from four_bits import base_in_four_bits, needs_bitsandbytes
from small_models import build
from torch import nn

import turret
from turret import quantized
from turret.adapters import Adapter, BaseInfo, attach, attachment, classify_logits, detach, extract, mount
from turret.adapters.batch_context import BatchContext
from turret.adapters.lifecycle import merged_state
from turret.adapters.lora import LoRAFactors, dora
from turret.engine.runner import Runner
from turret.engine.sequence import Prefill
from turret.errors import AdapterError
from turret.methods import Full, Head, LoRA, Peft, Prefix
from turret.ops.table import without
from turret.train.memory import SavedForBackward


def layers(d_in: int = 64, d_out: int = 96, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """A layer in 4 bits, and a plain one with the same unpacked weight."""
    torch.manual_seed(0)
    packed = quantized.library().nn.LinearNF4(d_in, d_out).to("cpu")
    packed.bias.data = packed.bias.data.to(dtype)
    quantized.compute_in(packed, dtype)
    plain = nn.Linear(d_in, d_out)
    plain.weight.data, plain.bias.data = quantized.dense_weight(packed), packed.bias.data.clone()
    return packed.requires_grad_(False), plain.requires_grad_(False)


def factors(d_in: int = 64, d_out: int = 96, rate: float = 0.0) -> LoRAFactors:
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator)
    return LoRAFactors(A, B, 0.5, rate).train()


def passed(layer: nn.Module, rate: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of a layer with LoRA."""
    lora = factors(rate=rate)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    torch.manual_seed(3)  # of the dropout masks
    y = lora.with_base(layer, x, BatchContext())
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, lora.lora_A.grad, lora.lora_B.grad]


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("paths", [(), ("kernels",)])
def test_lora_on_four_bits_equals_lora_on_the_unpacked_weight(
    paths: tuple[str, ...], rate: float, dtype: torch.dtype
) -> None:
    packed, plain = layers(dtype=dtype)
    with without(*paths):
        mine, reference = passed(packed, rate, dtype), passed(plain, rate, dtype)
    for one, other in zip(mine, reference, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.float().abs().max()))


@needs_bitsandbytes
def test_only_the_input_and_the_narrow_product_are_saved() -> None:
    packed, _ = layers()
    x = torch.randn(7, 64, requires_grad=True)
    saved = SavedForBackward(nn.ModuleList([packed, lora := factors()]))
    with saved.counting():
        lora.with_base(packed, x, BatchContext())
    assert saved.bytes == 7 * 64 * 4 + 7 * 4 * 4


@needs_bitsandbytes
def test_peft_with_bitsandbytes_gives_the_same_outputs_and_gradients(tmp_path: Path) -> None:
    method = LoRA(r=4, lora_dropout=0.0, init_lora_weights=False)
    generator = torch.Generator().manual_seed(5)
    model = attach(base_in_four_bits("llama", tmp_path).model, method, generator=generator).train()
    tensors = extract(model).tensors
    ids = rows()[0]
    mine = classify_logits(model, [ids])
    mine.square().sum().backward()
    layer = attachment(model).linears["model.layers.0.self_attn.q_proj"].slots["1"]

    config = peft.LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    twin = peft.get_peft_model(base_in_four_bits("llama", tmp_path).model, config)
    state = twin.state_dict()
    for name, value in tensors.items():
        state[name.replace(".weight", ".default.weight")].copy_(value)
    theirs = twin(input_ids=ids[None]).logits
    theirs.square().sum().backward()
    torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-4, atol=1e-4)
    gradient = twin.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight").grad
    torch.testing.assert_close(layer.lora_A.grad, gradient, rtol=1e-3, atol=1e-4)
    assert float(gradient.abs().max()) > 1e-3  # the control: there is something to compare


@needs_bitsandbytes
@pytest.mark.parametrize(
    "method",
    [
        LoRA(init_lora_weights="pissa"),
        Prefix(num_virtual_tokens=2),
        Head(),
        Peft(peft_type="IA3"),
        Peft(peft_type="DORA", r=2),
        Peft(peft_type="VERA", r=2),
        Peft(peft_type="BOFT"),
    ],
    ids=lambda method: getattr(method, "peft_type", method.kind),
)
def test_a_method_trains_on_four_bits_and_leaves_them_as_they_were(method: Any, tmp_path: Path) -> None:
    model = base_in_four_bits("bert", tmp_path).model
    before = [each.detach().clone() for each in model.parameters()]
    attach(model, method, generator=torch.Generator().manual_seed(1)).train()
    classify_logits(model, rows()).float().square().sum().backward()
    trained = [each for each in model.parameters() if each.requires_grad]
    assert any(each.grad is not None and each.grad.abs().sum() > 0 for each in trained)
    detach(model)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["OFT", "ROAD"])
def test_a_method_of_peft_on_four_bits_is_mounted_and_answered_by_the_engine(kind: str, tmp_path: Path) -> None:
    base, options = base_in_four_bits("bert", tmp_path), {"oft_block_size": 8} if kind == "OFT" else {"group_size": 8}
    model = base.model
    attach(model, Peft(peft_type=kind, **options), generator=torch.Generator().manual_seed(1))
    for place, each in enumerate(guest_parameters(model)):
        each.data.add_(0.2 * torch.randn(each.shape, generator=torch.Generator().manual_seed(place)))
    tensors, head, method = extract(model)
    adapter = Adapter(method, tensors, head, BaseInfo("small", None, "bert"))
    detach(model)
    with torch.no_grad():
        expected = classify_logits(mount(model, adapter), rows())
    detach(model)
    runner = Runner(base)
    runner.adapter_pool.mount(1, runner.adapter_pool.prepare(adapter, "sha256:1", CLASSIFIES))
    left_out = Adapter(Head(), {}, head, adapter.base)
    runner.adapter_pool.mount(2, runner.adapter_pool.prepare(left_out, "sha256:2", CLASSIFIES))
    found, without_it = (torch.stack(runner.run(each).classes) for each in prefills((1, 2)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (without_it - expected).abs().max() > 1e-3, "the control"


def guest_parameters(model: Any) -> list[nn.Parameter]:
    guest = attachment(model).guest
    assert guest is not None
    return list(guest.parameters.values())


def prefills(slots: tuple[int, ...]) -> list[list[Prefill]]:
    return [[Prefill(row.tolist(), slot) for row in rows()] for slot in slots]


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Full(), "replaces the weights"),
        (Peft(peft_type="LOHA", r=2), "LOHA cannot compute on a quantized base"),
        (Peft(peft_type="GRALORA", r=4, gralora_k=2), "GRALORA cannot compute on a quantized base"),
    ],
    ids=["full", "loha", "gralora"],
)
def test_a_method_that_reads_the_weights_is_refused_in_one_line(method: Any, words: str, tmp_path: Path) -> None:
    model = base_in_four_bits("bert", tmp_path).model
    with pytest.raises(AdapterError, match=words) as caught:
        attach(model, method)
    assert "\n" not in str(caught.value)
    assert classify_logits(attach(model, Head()), rows()).isfinite().all()


@needs_bitsandbytes
def test_dora_reads_the_unpacked_weight() -> None:
    packed, plain = layers()
    A, B, magnitude = torch.randn(2, 64), torch.randn(96, 2), torch.rand(96)
    mine, reference = (dora(each, A, B, magnitude) for each in (packed, plain))
    assert mine.output is not None
    assert reference.output is not None
    torch.testing.assert_close(mine.output, reference.output)


@needs_bitsandbytes
def test_a_bundle_of_an_own_loop_names_checkpoint_and_quantisation(tmp_path: Path) -> None:
    base = base_in_four_bits("bert", tmp_path)
    attach(base.model, LoRA(r=2, init_lora_weights=False))
    manifest = turret.save(base.model, tmp_path / "bundle")
    assert manifest["base"]["fingerprint"] == base.fingerprint
    assert manifest["base"]["quantization"] == "nf4"


@needs_bitsandbytes
def test_nothing_is_merged_into_four_bits(tmp_path: Path) -> None:
    from peft_twins import adapter_from

    model = base_in_four_bits("bert", tmp_path).model
    adapter = adapter_from(attach(model, LoRA(r=2, init_lora_weights=False)))
    detach(model)
    with pytest.raises(AdapterError, match="nothing can be merged into it"):
        merged_state(model, adapter)


@needs_bitsandbytes
def test_loftq_starts_closer_to_the_plain_base_than_four_bits_alone(tmp_path: Path) -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    base = base_in_four_bits("bert", tmp_path)
    layer = base.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    original, dense = quantized.original_weight(layer), quantized.dense_weight(layer)
    assert original is not None
    attach(base.model, LoRA(r=8, lora_alpha=16, init_lora_weights="loftq"))
    started = attachment(base.model).linears["bert.encoder.layer.0.attention.self.query"].slots["1"]
    delta = started.scaling * started.lora_B @ started.lora_A
    theirs = _low_rank_decomposition(original - dense, 8)
    torch.testing.assert_close(delta.detach(), theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-5)
    lost, left = (original - dense).norm(), (original - dense - delta).norm()
    assert left < 0.9 * lost


@needs_bitsandbytes
def test_loftq_without_four_bits_is_refused(tmp_path: Path) -> None:
    base = base_in_four_bits("bert", tmp_path, quantization="none")
    with pytest.raises(AdapterError, match='expected base_quantization = "nf4"'):
        attach(base.model, LoRA(init_lora_weights="loftq"))


class PackedElsewhere(nn.Module):
    """A layer as GPTQ's library has it: whole numbers in `qweight`, and no weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("scales", plain.weight.detach().abs().amax(1, keepdim=True) / 7)
        self.register_buffer("qweight", (plain.weight.detach() / self.scales).round().to(torch.int32))

    def dense(self) -> torch.Tensor:
        return self.qweight * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dense().mT


def test_lora_runs_beside_a_layer_that_another_library_packs() -> None:
    gradients = []
    for packs in (True, False):
        model: Any = build("llama", "classify")
        attention = model.model.layers[0].self_attn
        packed = PackedElsewhere(attention.q_proj)
        if packs:
            attention.q_proj = packed
        else:
            attention.q_proj.weight.data = packed.dense()
        method = LoRA(r=2, lora_dropout=0.0, init_lora_weights=False)
        attach(model, method, generator=torch.Generator().manual_seed(1)).train()
        assert "model.layers.0.self_attn.q_proj" in attachment(model).linears
        classify_logits(model, rows()).square().sum().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, each in gradients[0].items():
        torch.testing.assert_close(each, gradients[1][name], rtol=1e-3, atol=1e-5)
