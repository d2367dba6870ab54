"""Rows that share a pass equal PEFT and the bare base, each alone; with controls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters_at_hand import CLASSIFIES, LENGTHS, METHODS, alone, made, runner_of
from batches import padded, rows, with_eos
from peft_twins import lora_twin
from small_models import FAMILIES

from turret.adapters import Adapter, attachment, classify_logits
from turret.engine.adapter_pool import AdapterPool
from turret.engine.cache import KVSlot
from turret.engine.runner import Runner
from turret.engine.sequence import DecodeStep, Prefill
from turret.methods import LoRA
from turret.ops.table import without


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Adapters are multiplied by the kernel if this machine has one, or in torch."""
    with without("kernels") if request.param == "torch" else nullcontext():
        yield request.param


def loras(family: str, task: Any, count: int = 8) -> list[Adapter]:
    """LoRAs of different ranks, targets and scalings."""
    kinds = [
        LoRA(
            r=2 + seed % 3 * 3, lora_alpha=6 + seed, lora_dropout=0.0, init_lora_weights=False, use_rslora=seed % 2 == 0
        )
        for seed in range(count)
    ]
    kinds = [
        each.model_copy(update={"target_modules": "all-linear"}) if seed % 2 else each
        for seed, each in enumerate(kinds)
    ]
    return [made(family, task, kind, seed) for seed, kind in enumerate(kinds, 1)]


def peft_logits(family: str, adapter: Adapter, inputs: list[torch.Tensor], *, exact: bool = False) -> torch.Tensor:
    """PEFT's logits; exact: in float64."""
    model = lora_twin(family, "classify", adapter)
    model = model.double() if exact else model
    logits: torch.Tensor = model(**padded(inputs, model.config.pad_token_id)).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mixed_pass_of_loras_equals_peft_row_by_row(family: str, way: str) -> None:
    adapters = loras(family, "classify", 4)
    runner = runner_of(family, "classify", adapters)
    inputs = with_eos(runner.model, rows())
    mixed = runner.run([Prefill(row.tolist(), slot) for slot, row in enumerate(inputs, 1)]).classes
    for adapter, row, logits in zip(adapters, inputs, mixed, strict=True):
        theirs, exact = (peft_logits(family, adapter, [row], exact=each)[0] for each in (False, True))
        rounding = float((theirs - exact).abs().max())  # PEFT's own: up to 1.4e-5 for T5, depending on the processor
        torch.testing.assert_close(logits, theirs, atol=1e-5 + rounding, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_control_one_layer_left_out_for_one_row_would_be_seen(family: str, way: str) -> None:
    adapters = loras(family, "classify", 4)
    runner = runner_of(family, "classify", adapters)
    inputs = with_eos(runner.model, rows())
    fresh = [Prefill(row.tolist(), slot) for slot, row in enumerate(inputs, 1)]
    whole = runner.run(fresh).classes
    loaded = runner.adapter_pool._slots[2]
    for layer, (_, B) in loaded.pairs().items():
        own = B.clone()
        B.zero_()
        torn = runner.run(fresh).classes
        B.copy_(own)
        assert (torn[1] - whole[1]).abs().max() > 1e-4, layer
        assert all(torch.equal(torn[row], whole[row]) for row in (0, 2, 3))


def prompts(runner: Runner, slots: list[int]) -> tuple[torch.Tensor, list[KVSlot]]:
    """The logits of a prefill pass of eight prompts, and their KV slots."""
    inputs = with_eos(runner.model, rows(lengths=LENGTHS))
    kv_slots = [runner.kv_slot(len(row), 8, slot) for row, slot in zip(inputs, slots, strict=True)]
    fresh = [Prefill(row.tolist(), slot, kv_slot) for row, slot, kv_slot in zip(inputs, slots, kv_slots, strict=True)]
    return runner.run(fresh).vocabulary, kv_slots


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
@torch.no_grad()
def test_a_bare_row_is_bit_equal_to_the_bare_base_in_a_pass_of_the_same_shapes(family: str, way: str) -> None:
    runner = runner_of(family, "generate", loras(family, "generate"))
    bare, kv_slots = prompts(runner, [0] * 8)
    steps = runner.run([], [DecodeStep(5 + row, 0, kv_slot) for row, kv_slot in enumerate(kv_slots)]).vocabulary
    for kv_slot in kv_slots:
        runner.cache.close(kv_slot)
    slots = [0, 0, 0, 1, 2, 3, 4, 5]  # sorted, as in a pass, so that every row keeps its place
    mixed, kv_slots = prompts(runner, slots)
    assert torch.equal(mixed[:3], bare[:3])
    assert (mixed[3:] - bare[3:]).abs().amin(0).max() > 1e-3
    again = runner.run([], [DecodeStep(5 + row, slot, kv_slots[row]) for row, slot in enumerate(slots)]).vocabulary
    assert torch.equal(again[:3], steps[:3])


@torch.no_grad()
def test_a_bare_row_next_to_prefixes_equals_the_bare_base() -> None:
    adapters = [made("llama", "generate", METHODS["prefix"], seed) for seed in range(5)]
    runner = runner_of("llama", "generate", adapters)
    bare, _ = prompts(runner, [0] * 8)
    mixed, _ = prompts(runner, [1, 0, 2, 0, 3, 4, 0, 5])
    torch.testing.assert_close(mixed[[1, 3, 6]], bare[[1, 3, 6]], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@torch.no_grad()
def test_permuting_rows_permutes_answers(family: str, way: str) -> None:
    adapters = [made(family, "classify", METHODS[kind], seed) for seed, kind in enumerate(["lora", "wide", "prefix"])]
    runner = runner_of(family, "classify", adapters)
    inputs = with_eos(runner.model, rows(lengths=LENGTHS))
    slots = [1, 2, 3, 3, 2, 1, 2, 1]
    fresh = [Prefill(row.tolist(), slot) for row, slot in zip(inputs, slots, strict=True)]
    straight = runner.run(fresh).classes
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
    permuted = runner.run([fresh[row] for row in order]).classes
    for place, row in enumerate(order):
        torch.testing.assert_close(permuted[place], straight[row], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "slots",
    [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [3, 3, 3, 3, 3, 3, 3, 3],
        [1, 1, 1, 1, 1, 1, 2, 0],
        [0, 4, 4, 0, 2, 2, 8, 1],
        [0, 0, 0, 0, 0, 0, 0, 5],
        [2, 1, 2, 1, 2, 1, 0, 3],
    ],
)
@torch.no_grad()
def test_decode_steps_of_any_mixture_equal_sgmv_of_whole_rows(way: str, slots: list[int]) -> None:
    runner = runner_of("llama", "generate", loras("llama", "generate"))
    inputs = rows(lengths=LENGTHS)
    kv_slots = [runner.kv_slot(len(row), 8, slot) for row, slot in zip(inputs, slots, strict=True)]
    runner.run([Prefill(r.tolist(), slot, kv_slot) for r, slot, kv_slot in zip(inputs, slots, kv_slots, strict=True)])
    for count in (8, 5, 8):  # rows leave and come back
        picked = slots[:count]
        fresh = [Prefill([*row.tolist(), 7], slot, runner.kv_slot(30, 8, slot)) for row, slot in zip(inputs, picked)]  # noqa: B905
        with without("kernels"):
            whole = runner.run(fresh).vocabulary  # every row is a segment of a prompt
        for each in fresh:
            assert each.kv_slot is not None
            runner.cache.close(each.kv_slot)
        before = [dict(kv_slot.lengths) for kv_slot in kv_slots]
        steps = runner.run([], [DecodeStep(7, slot, kv_slot) for slot, kv_slot in zip(picked, kv_slots)]).vocabulary  # noqa: B905
        for kv_slot, lengths in zip(kv_slots, before, strict=True):
            kv_slot.lengths = lengths
        torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_a_mixed_pass_is_as_near_to_float32_as_each_row_alone(way: str) -> None:
    adapters = loras("bert", "classify", 4)
    exact = [alone("bert", "classify", adapter) for adapter in adapters]
    runner = runner_of("bert", "classify", adapters, torch.bfloat16)
    inputs = rows()
    mixed = runner.run([Prefill(row.tolist(), slot) for slot, row in enumerate(inputs, 1)]).classes
    for model, row, logits in zip(exact, inputs, mixed, strict=True):
        wanted = classify_logits(model, [row])[0]
        assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max() + 0.05


@torch.no_grad()
def test_decoding_in_bfloat16_is_near_to_float32(way: str) -> None:
    adapters = loras("llama", "generate", 8)
    outcomes = []
    for dtype in (torch.float32, torch.bfloat16):
        runner = runner_of("llama", "generate", adapters, dtype)
        _, kv_slots = prompts(runner, [1, 2, 3, 4, 5, 6, 7, 8])
        steps = [DecodeStep(9, slot, kv_slot) for slot, kv_slot in enumerate(kv_slots, 1)]
        outcomes.append(runner.run([], steps).vocabulary)
    assert (outcomes[0] - outcomes[1]).abs().max() < 0.05 * outcomes[0].abs().max()


def test_mounting_touches_no_module_of_the_base() -> None:
    adapter = loras("bert", "classify", 1)[0]
    adapter_pool: AdapterPool = runner_of("bert", "classify", [adapter]).adapter_pool
    touched: list[Any] = []
    loaded = adapter_pool.prepare(adapter, "sha256:x", CLASSIFIES)
    for slot in range(1, 1001):
        adapter_pool.mount(slot, loaded)
    for linear in attachment(adapter_pool._model).linears.values():
        linear.register_module = lambda *a: touched.append(a)  # type: ignore[method-assign]
    adapter_pool.mount(1001, loaded)
    adapter_pool.unmount(1)
    assert not touched
    assert all(not linear.slots for linear in attachment(adapter_pool._model).linears.values())


def test_a_lora_in_memory_is_one_buffer_in_the_bases_precision() -> None:
    adapter = made("bert", "classify", METHODS["wide"])
    loaded = runner_of("bert", "classify", [], torch.bfloat16).adapter_pool.prepare(adapter, "sha256:x", CLASSIFIES)
    numbers = sum(each.numel() for each in adapter.tensors.values())
    numbers += sum(each.numel() for each in adapter.head.values())
    assert loaded.flat.untyped_storage().nbytes() == loaded.bytes == 2 * numbers
    for name, value in adapter.head.items():
        torch.testing.assert_close(loaded.head[name].float(), value, atol=0, rtol=2**-8)


@torch.no_grad()
def test_the_pooler_that_a_head_reads_is_adapted() -> None:
    adapter = made("bert", "classify", METHODS["wide"], 4)
    assert any("pooler" in name for name in adapter.tensors)
    runner = runner_of("bert", "classify", [adapter])
    row = rows()[0]
    own = runner.run([Prefill(row.tolist(), 1)]).classes[0]
    torch.testing.assert_close(own, classify_logits(alone("bert", "classify", adapter), [row])[0], atol=1e-5, rtol=1e-5)
    without = {name: each * (0.0 if "pooler" in name else 1.0) for name, each in adapter.tensors.items()}
    changed = Adapter(adapter.method, without, adapter.head, adapter.base)
    runner.adapter_pool.mount(2, runner.adapter_pool.prepare(changed, "sha256:y", CLASSIFIES))
    assert (runner.run([Prefill(row.tolist(), 2)]).classes[0] - own).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_heads_with_and_without_their_own_pooler_and_with_other_classes_share_a_pass(
    dtype: torch.dtype, way: str
) -> None:
    adapters = [made("bert", "classify", METHODS["wide"], seed, labels=2 + seed) for seed in (1, 2, 3)]
    draw = torch.Generator().manual_seed(5)
    pooler = {  # as large as a pooler is: a larger one multiplies the rounding of bfloat16
        f"bert.pooler.dense.{name}": 0.1 * torch.randn(shape, generator=draw)
        for name, shape in (("weight", (64, 64)), ("bias", (64,)))
    }
    without = {name: each for name, each in adapters[1].tensors.items() if "pooler" not in name}
    adapters[1] = replace(adapters[1], tensors=without, head=adapters[1].head | pooler)
    runner = runner_of("bert", "classify", [*adapters, made("bert", "classify", METHODS["head"], 4)], dtype)
    close = 1e-5 if dtype == torch.float32 else 0.03
    inputs = [row.tolist() for row in rows()]
    slots = [2, 1, 4, 2, 3]
    mixed = runner.run([Prefill(row, slot) for row, slot in zip(inputs, slots, strict=False)]).classes
    for row, slot, logits in zip(inputs, slots, mixed, strict=False):
        assert len(logits) == (3 if slot == 4 else 2 + slot)
        torch.testing.assert_close(logits, runner.run([Prefill(row, slot)]).classes[0], atol=close, rtol=close)
    shared = replace(adapters[1], head={name: each for name, each in adapters[1].head.items() if "pooler" not in name})
    runner.adapter_pool.mount(5, runner.adapter_pool.prepare(shared, "sha256:y", CLASSIFIES))
    assert (runner.run([Prefill(inputs[0], 5)]).classes[0] - mixed[0]).abs().max() > 1e-3


def test_adapters_of_one_shape_share_their_layout_for_any_order_in_a_file() -> None:
    one, other = (made("bert", "classify", METHODS["wide"], seed) for seed in (1, 2))
    turned = replace(other, **{part: dict(reversed(getattr(other, part).items())) for part in ("tensors", "head")})
    adapter_pool = runner_of("bert", "classify", []).adapter_pool
    first, second, third = (adapter_pool.prepare(each, "sha256:x", CLASSIFIES) for each in (one, other, turned))
    assert first.layout is second.layout is third.layout
    assert first.head_layout is third.head_layout
    assert torch.equal(second.flat, third.flat)
    assert not torch.equal(first.flat, third.flat)


@torch.no_grad()
def test_a_pass_of_prefill_and_decode_rows_is_the_same_by_kernel_and_by_torch() -> None:
    """Adapters of different ranks and targets, a prefix, and rows without an adapter."""
    adapters = [*loras("llama", "generate", 4), made("llama", "generate", METHODS["prefix"], 9)]
    outcomes = []
    for context in (nullcontext(), without("kernels")):
        runner = runner_of("llama", "generate", adapters)
        with context:
            _, kv_slots = prompts(runner, [0, 1, 2, 2, 3, 4, 5, 5])
            fresh = [Prefill(row.tolist(), slot, runner.kv_slot(30, 8, slot)) for slot, row in enumerate(rows())]
            steps = [
                DecodeStep(9, slot, kv_slot) for slot, kv_slot in zip([0, 1, 2, 2, 3, 4, 5, 5], kv_slots, strict=True)
            ]
            outcomes.append(runner.run(fresh, steps).vocabulary)
            assert not runner.adapter_pool._rows
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=2e-5, rtol=2e-5)
