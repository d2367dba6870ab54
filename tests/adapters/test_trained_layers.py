"""A layer as one operation gives the numbers of its modules, forward and backward, and draws the same masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import pytest
import torch
import transformers
from small_models import build
from torch import Tensor, nn

from turret.adapters import (
    attach,
    attachment,
    classify_logits,
    detach,
    trainable_parameters,
)
from turret.adapters.batch_context import set_context
from turret.adapters.layers import LayerHook
from turret.adapters.packed import target_states
from turret.methods import LoRA, Method, Prefix
from turret.ops import table
from turret.ops.cpu.compiled import CpuOps, library
from turret.ops.dropout import Masks

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels on this machine")
ENCODERS, DECODERS = ("bert", "roberta"), ("llama", "llama with biases", "mistral", "qwen2", "qwen3")
DROPPED = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "intermediate_size": 128}
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "llama with biases": partial(transformers.LlamaConfig, attention_bias=True, mlp_bias=True),
    "mistral": partial(transformers.MistralConfig, sliding_window=7),  # narrower than a row
    "qwen2": partial(transformers.Qwen2Config, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": transformers.Qwen3Config,
}
METHODS: dict[str, Method] = {
    "LoRA on all": LoRA(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2),
    "LoRA on some": LoRA(r=3, init_lora_weights=False, lora_dropout=0.0),
    "prefix": Prefix(num_virtual_tokens=3),
}
BEHIND = {
    **dict.fromkeys(ENCODERS, LoRA(r=2, target_modules=("output.dense",), init_lora_weights=False)),
    **dict.fromkeys(DECODERS, LoRA(r=2, target_modules=("o_proj", "up_proj"), init_lora_weights=False)),
}
ROWS = [torch.tensor([2, *range(5, 5 + n), 3]) for n in (5, 0, 60)]


def model_of(family: str, method: Method, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    if family in ENCODERS:
        model: Any = build(family, "classify", **{**DROPPED, **changes})
    else:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**{**SIZES, **changes}))
        for each in model.parameters():
            each.data.add_(0.05 * torch.randn_like(each))  # norms and biases too
    return attach(model.to(dtype), method, generator=torch.Generator().manual_seed(1)).train()


def outcome(model: Any) -> list[Tensor]:
    """The output, all gradients, and the next random number."""
    torch.manual_seed(5)
    if hasattr(model, "classifier"):
        y = classify_logits(model, ROWS)
    else:
        y = target_states(model, ROWS, [torch.tensor([7, 8, 9, 3]) for _ in ROWS])
    trained = list(trainable_parameters(model).values())
    given = torch.autograd.grad(y.float().square().sum(), trained, allow_unused=True)
    return [y.detach(), *(each for each in given if each is not None), torch.rand(1)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of a layer, whether it computed as one operation."""
    found: list[bool] = []

    def counting(theirs: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*given: Any) -> Tensor | None:
            y = theirs(*given)
            found.append(y is not None)
            return y

        return call

    monkeypatch.setattr(LayerHook, "trained_output", counting(LayerHook.trained_output))
    return found


def by_modules(model: Any) -> list[Tensor]:
    """The same, computed by the layers' modules."""
    with table.without("trained_layer"):
        return outcome(model)


EXACT, HALF = 1e-4, 0.1


def off(given: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """How far each tensor is from the wanted one, over its norm."""
    pairs = [(mine.double(), theirs.double()) for mine, theirs in zip(given, wanted, strict=True)]
    return [float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30)) for mine, theirs in pairs]


def same(given: list[Tensor], wanted: list[Tensor], allowed: float = EXACT) -> bool:
    """Up to the rounding of the dtype."""
    return max(off(given, wanted)) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*METHODS, "LoRA behind attention"])
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_it_gives_the_modules_numbers(family: str, method: str, dtype: torch.dtype, counted: list[bool]) -> None:
    model = model_of(family, METHODS.get(method) or BEHIND[family], dtype)
    given = outcome(model)
    assert counted == [True] * model.config.num_hidden_layers
    assert same(given, by_modules(model), HALF if dtype == torch.bfloat16 else EXACT)
    if dtype == torch.bfloat16:  # no further from float32 than the modules are
        exact = by_modules(model_of(family, METHODS.get(method) or BEHIND[family]))
        assert fmean(off(given, exact)) <= 1.3 * fmean(off(by_modules(model), exact))


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_gated_mlp_that_is_made_again_gives_the_same(
    method: Method, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuOps, "tiled", lambda *_: tiled)
    model = model_of("llama", method, torch.bfloat16)
    given = outcome(model)
    assert same(given, by_modules(model), HALF)


def test_a_sliding_window_slides(counted: list[bool]) -> None:
    model = model_of("mistral", METHODS["LoRA on some"], sliding_window=7)
    given = outcome(model)
    assert any(counted)
    assert same(given, by_modules(model))
    assert not same(given, outcome(model_of("mistral", METHODS["LoRA on some"], sliding_window=70)))


def test_another_order_of_random_words_gives_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the tests above."""
    model = model_of("bert", METHODS["LoRA on all"])
    given = outcome(model)
    drawn = Masks.arguments
    monkeypatch.setattr(Masks, "arguments", lambda self, p, keys: (drawn(self, p, keys), drawn(self, p, keys))[1])
    assert not same(given, outcome(model))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ["bert", "llama", "qwen3"])
def test_no_more_is_saved_than_the_modules_save(family: str, method: Method) -> None:
    def kept() -> int:
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outcome(model)
        return sum(found.values())

    model = model_of(family, method)
    mine = kept()
    with table.without("trained_layer"):
        assert mine <= kept()


def test_below_the_first_adapter_there_is_nothing_to_be_done(counted: list[bool]) -> None:
    last = LoRA(r=4, target_modules=("encoder.layer.1.attention.self.query",), init_lora_weights=False)
    model = model_of("bert", last, num_hidden_layers=3)
    given = outcome(model)
    assert counted == [False, True, True]
    assert same(given, by_modules(model))


def hooked(layer: Any) -> None:
    (layer.attention.self if hasattr(layer, "attention") else layer.self_attn).register_forward_hook(lambda *_: None)


def hooked_linear(layer: Any) -> None:
    linear = layer.intermediate.dense if hasattr(layer, "attention") else layer.mlp.up_proj
    linear.register_forward_pre_hook(lambda *_: None)


def thawed(layer: Any) -> None:
    norm = layer.output.LayerNorm if hasattr(layer, "attention") else layer.post_attention_layernorm
    norm.weight.requires_grad_(True)


def other(layer: Any) -> None:
    if hasattr(layer, "attention"):
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    else:
        layer.mlp = nn.Identity()


@pytest.mark.parametrize("change", [hooked, hooked_linear, thawed, other])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_it_does_not_know_the_modules_compute(
    family: str, change: Callable[[Any], None], counted: list[bool]
) -> None:
    model = model_of(family, METHODS["LoRA on some"], torch.bfloat16)
    layers = model.bert.encoder.layer if family == "bert" else model.model.layers
    change(layers[1])
    given = outcome(model)
    assert not counted[1]
    assert same(given, by_modules(model), HALF)


def test_rows_of_several_adapters_and_padded_ones_are_the_modules(counted: list[bool]) -> None:
    model = model_of("bert", METHODS["LoRA on some"])
    classify_logits(model, ROWS, slots=[1, 0, 1])
    with set_context(attachment(model).context, None, None):
        model(ROWS[0][None])
    model = model_of("llama", METHODS["LoRA on some"])
    model(ROWS[0][None])
    assert counted
    assert not any(counted)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pissa_is_the_modules(family: str, counted: list[bool]) -> None:
    outcome(model_of(family, LoRA(r=2, init_lora_weights="pissa")))
    assert counted
    assert not any(counted)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_machine_without_kernels_has_its_modules(family: str, counted: list[bool]) -> None:
    with table.without("kernels"):
        outcome(model_of(family, METHODS["LoRA on some"]))
    assert counted
    assert not any(counted)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_nothing_of_it_is_left_behind(family: str) -> None:
    model = build(family, "classify")
    before = [vars(each).copy() for each in model.modules()]
    detach(attach(model, METHODS["prefix"]))
    assert [vars(each).keys() for each in model.modules()] == [each.keys() for each in before]
