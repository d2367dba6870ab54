"""Layers in one call: bit-equal to their modules; layers that do not fit are computed by their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import small_models
import torch
import transformers
from adapters_at_hand import CLASSIFIES, GENERATES
from compiled_kernels import BOTH, compiled, needed
from tiny_training import Base
from torch import Tensor

from turret.adapters import Adapter, BaseInfo, attach, detach, extract
from turret.adapters.layers import FrozenNorm, OneCall
from turret.engine.adapter_pool import AdapterPool
from turret.engine.runner import Runner
from turret.engine.sequence import DecodeStep, Prefill
from turret.families import family_of
from turret.methods import Head, LoRA, Method, Prefix
from turret.ops.cpu import compiled as kernels
from turret.ops.table import without

pytestmark = needed
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama with biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),  # narrower than the rows
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
}
ENCODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "num_labels": 3,
}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**ENCODER),
    "roberta": lambda: transformers.RobertaConfig(**ENCODER, max_position_embeddings=64),
}
METHODS: list[Method] = [
    LoRA(r=4, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear"),
    LoRA(r=9, lora_dropout=0.0, init_lora_weights=False),  # queries and values only
    Prefix(num_virtual_tokens=5, reparametrize=False),
]
LENGTHS = (9, 3, 14, 1, 40, 6)
SLOTS = (1, 2, 0, 3, 1, 3)


def model_of(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    if name in ENCODERS:
        auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config((CONFIGS | ENCODERS)[name]()).eval().requires_grad_(False)
    for key, each in model.named_parameters():  # norms and biases that affect the result
        if each.ndim == 1:
            each.add_(torch.randn_like(each) * 0.2)
        assert bool(each.any()), key
    return model.to(dtype)


@torch.no_grad()
def made(model: Any, method: Method) -> Adapter:
    attach(model, method, generator=torch.Generator().manual_seed(1))
    tensors, head, kept = extract(model)
    detach(model)
    return Adapter(
        kept, {key: each + 0.1 * torch.randn_like(each) for key, each in tensors.items()}, head, BaseInfo("b")
    )


def runner_of(name: str, dtype: torch.dtype) -> Runner:
    model = model_of(name, dtype)
    adapters = [made(model, method) for method in (*METHODS, *([Head()] if name in ENCODERS else []))]
    runner = Runner(Base(model, small_models.tokenizer("llama"), family_of(model.config), bytes=1))
    for slot, adapter in enumerate(adapters, 1):
        task = CLASSIFIES if name in ENCODERS else GENERATES
        runner.adapter_pool.mount(slot, runner.adapter_pool.prepare(adapter, f"sha256:{slot}", task))
    return runner


def steps(runner: Runner, count: int = 4) -> list[Tensor]:
    """The logits of a prefill pass of all prompts, and of that many decode steps after it."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(5, 128, (length,), generator=generator).tolist() for length in LENGTHS]
    kv_slots = [runner.kv_slot(len(row), count + 1, slot) for row, slot in zip(rows, SLOTS, strict=True)]
    said = [runner.run([Prefill(*each) for each in zip(rows, SLOTS, kv_slots, strict=True)]).vocabulary]
    for place in range(count):
        going = [DecodeStep(7 + place, slot, kv_slot) for slot, kv_slot in zip(SLOTS, kv_slots, strict=True)]
        said.append(runner.run([], going).vocabulary)
    for kv_slot in kv_slots:
        runner.cache.close(kv_slot)
    return said


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each layer of each pass, whether the one call computed it."""
    taken: list[bool] = []
    own = OneCall.__call__

    def counted(self: OneCall, *arguments: Any) -> Tensor | None:
        y = own(self, *arguments)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(OneCall, "__call__", counted)
    return taken


def require_the_modules_bits(
    ours: list[Tensor], asked: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same passes, computed by the modules, are bit-equal."""
    with monkeypatch.context() as patch:
        patch.setattr(OneCall, "__call__", lambda *_: None)
        theirs = asked()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def few(dtype: torch.dtype) -> bool:
    return compiled(dtype).few >= len(SLOTS)


@BOTH
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decode_step_is_bit_equal_to_the_modules(
    name: str, dtype: torch.dtype, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV slots of several lengths, adapters of different ranks and targets, prefixes, and rows without an adapter."""
    runner = runner_of(name, dtype)
    calls.clear()
    ours = steps(runner)
    layers = runner.model.config.num_hidden_layers
    assert calls == [False] * layers + [few(dtype)] * 4 * layers
    require_the_modules_bits(ours, lambda: steps(runner), monkeypatch)
    monkeypatch.setattr(AdapterPool, "_spans_of", lambda *_: [])  # the control: the adapters change the result
    bare = steps(runner)
    assert not few(dtype) or not torch.allclose(bare[1].float(), ours[1].float(), atol=0.1)


def short_texts(runner: Runner) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    fresh = [
        Prefill(torch.randint(5, 128, (length,), generator=generator).tolist(), slot)
        for length, slot in zip((9, 3, 14, 1, 11), (1, 2, 4, 3, 1), strict=True)
    ]
    return runner.run(fresh).classes


@BOTH
@pytest.mark.parametrize("name", ENCODERS)
def test_short_texts_are_bit_equal_to_the_modules(
    name: str, dtype: torch.dtype, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two LoRAs, a prefix and only a head."""
    runner = runner_of(name, dtype)
    calls.clear()
    ours = short_texts(runner)
    assert calls == [compiled(dtype).few >= 40] * 3
    require_the_modules_bits(ours, lambda: short_texts(runner), monkeypatch)
    monkeypatch.setattr(AdapterPool, "_spans_of", lambda *_: [])
    bare = short_texts(runner)
    assert not calls[0] or not torch.allclose(bare[0], ours[0], atol=0.02)
    assert torch.equal(bare[2], ours[2])  # only a head


def test_a_pass_with_prefill_rows_is_computed_by_the_modules(calls: list[bool]) -> None:
    if not few(torch.float32):
        pytest.skip("not for this processor")
    runner = runner_of("llama", torch.float32)
    calls.clear()
    first, second = runner.kv_slot(3, 4, 1), runner.kv_slot(2, 4, 2)
    runner.run([Prefill([5, 6, 7], 1, first)])
    runner.run([Prefill([8, 9], 2, second)], [DecodeStep(7, 1, first)])
    assert not any(calls)
    calls.clear()
    runner.run([], [DecodeStep(7, 1, first), DecodeStep(8, 2, second)])
    assert all(calls)
    assert len(calls) == 3


def test_more_rows_than_the_kernel_takes_are_computed_by_the_modules(
    calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled(torch.float32), "few", 5)
    steps(runner_of("llama", torch.float32), count=1)
    assert not any(calls)


def _other_mlp(layer: Any) -> None:
    layer.mlp = copy.deepcopy(layer.mlp.act_fn)


def _other_norm(layer: Any) -> None:
    layer.input_layernorm = torch.nn.Identity()


def _hooked(layer: Any) -> None:
    layer.self_attn.o_proj.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize("change", [_other_norm, _other_mlp, _hooked])
def test_a_changed_layer_is_computed_by_its_modules(
    change: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of("llama", torch.float32)
    change(runner.model.model.layers[1])
    calls.clear()
    ours = steps(runner, count=1)
    assert calls[3:] == [few(torch.float32), False, few(torch.float32)]
    require_the_modules_bits(ours, lambda: steps(runner, count=1), monkeypatch)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_pass_is_one_call_for_all_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, asked = runner_of(name, torch.float32), steps if name == "llama" else short_texts
    counts = []
    for kind in ("encoder", "decoder"):
        own = getattr(kernels.Layers, kind)

        def counted(self: Any, *rest: Any, own: Any = own) -> Tensor:
            counts.append(len(self))
            y: Tensor = own(self, *rest)
            return y

        monkeypatch.setattr(kernels.Layers, kind, counted)
    asked(runner)
    passes = 4 if name == "llama" else 1
    assert counts == [3] * passes * few(torch.float32)


def _before(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1, *inputs[1:]))


def _behind(layer: Any) -> None:
    layer.register_forward_hook(lambda module, inputs, output: output + 1)


def _fewer(layer: Any) -> None:
    layer.self_attn.config.num_hidden_layers = 2


@pytest.mark.parametrize("change", [_before, _behind, _fewer])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hook_between_two_layers_sees_the_modules_values(
    change: Any, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of("llama", torch.float32)
    plain = steps(runner, count=2)
    change(runner.model.model.layers[place])
    ours = steps(runner, count=2)
    require_the_modules_bits(ours, lambda: steps(runner, count=2), monkeypatch)
    assert not torch.allclose(ours[1], plain[1], atol=1e-3)


def test_without_kernels_and_after_close_the_layers_are_the_bases_own(calls: list[bool]) -> None:
    runner = runner_of("llama", torch.float32)
    with without("kernels"):
        steps(runner, count=1)
    assert not any(calls)
    layers = runner.model.model.layers
    assert all("forward" in vars(layer) for layer in layers)
    runner.close()
    assert not any("forward" in vars(layer) for layer in layers)
    assert not isinstance(layers[0].input_layernorm, FrozenNorm)


@torch.no_grad()
def test_a_copy_of_an_attached_model_computes_with_its_own_weights() -> None:
    for family, task in (("llama", "generate"), ("bert", "classify")):
        model: Any = attach(small_models.build(family, task), METHODS[0])
        ids = torch.tensor([[5, 6, 7]])
        before = model(input_ids=ids).logits
        twin = copy.deepcopy(model)
        for name, each in twin.named_parameters():
            if "layer" in name and "lora" not in name:
                each.mul_(1.5)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert not torch.allclose(twin(input_ids=ids).logits, before, atol=1e-3)
        detach(model)
        assert not any("forward" in vars(module) for module in model.modules())
