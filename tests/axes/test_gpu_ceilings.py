"""Ceilings, counted on a pretend GPU: the kernels that one layer launches, and how often the CPU waits for the GPU.

A layer's launches are the difference between models of one and of three layers, so what a pass does once is left out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_training as tiny
import torch
from adapters_at_hand import GENERATES, made
from decoding_rows import SETTINGS, Row
from pretend_gpu import OnCard, on_cpu, pretend_gpu, to_gpu

from turret.engine.protocol import OptimStep
from turret.engine.request import GenerationSettings
from turret.engine.runner import Runner
from turret.engine.sampler import choose
from turret.engine.sequence import DecodeStep, Prefill
from turret.errors import AdapterError
from turret.methods import LoRA
from turret.train.losses import loss_of
from turret.train.slot import LocalSlot

ROWS = 32
SIZES = {"hidden_size": 128, "head_dim": 32}  # heads that a decoding step's program takes
FULL = {"method": "lora", "method.target_modules": "all-linear", "method.r": 4}


def step_counts(
    layers: int, *, dtype: torch.dtype = torch.float32, programs: bool = True, dropout: float = 0.1
) -> tuple[Counter[str], Counter[str]]:
    """Launches and syncs of one training step on a GPU."""
    base = tiny.base("llama", "generate", num_hidden_layers=layers)
    base.model.to(dtype)
    with pretend_gpu(programs) as gpu:
        to_gpu(base.model)
        settings = {**FULL, "method.lora_dropout": dropout}
        task, optimiser, items = tiny.started(base, "summarize", **settings)
        gpu.clear()
        LocalSlot(base, task, optimiser, 42, 1024).train_step(items, OptimStep(1e-3, clip=1.0))
        return Counter(gpu.launches), Counter(gpu.syncs)


def layer(one: Counter[str], three: Counter[str]) -> dict[str, float]:
    return {name: (three[name] - one[name]) / 2 for name in three if three[name] != one[name]}


@pytest.mark.parametrize(
    ("dtype", "dropout", "most", "products"),
    [
        (torch.float32, 0.0, 82, 14 + 33),
        (torch.bfloat16, 0.0, 104, 14 + 33),
        (torch.float32, 0.1, 119, 14 + 42),
        (torch.bfloat16, 0.1, 141, 14 + 42),
    ],
)
def test_training_lora_on_all_linears_launches_at_most_so_many_kernels_a_layer(
    dtype: torch.dtype, dropout: float, most: int, products: int
) -> None:
    """Seven products of the base forward and seven backward; LoRA's; a cast of each factor in 16 bits."""
    one, three = (step_counts(layers, dtype=dtype, dropout=dropout) for layers in (1, 3))
    own = layer(one[0], three[0])
    assert sum(own.values()) <= most, own
    assert own["mm"] + own["addmm_"] == products
    assert own["rms_norm"] + own["rms_norm_backward"] + own["rotate"] + own["swiglu"] + own["swiglu_backward"] == 11
    assert own.get("dropout", 0) == (21 if dropout else 0)
    assert sum(three[1].values()) <= 2, three[1]


@torch.no_grad()
def run(runner: Runner, fresh: list[Prefill], steps: Any = ()) -> Any:
    """A pass without inference mode, in which the pretended tensors cannot be written to."""
    return Runner.run.__wrapped__(runner, fresh, steps)  # type: ignore[attr-defined]


def settings(row: int) -> GenerationSettings:
    """Greedy rows and sampled ones, and every processor."""
    kinds: list[dict[str, Any]] = [
        *SETTINGS,
        {"forced_eos": (5,), "max_tokens": 4},
        {"min_length": 40, "repetition_penalty": 0.8, "temperature": 0.5},
    ]
    return GenerationSettings(**({"max_tokens": 99, "eos": (5,), "seed": row} | kinds[row % len(kinds)]))


def rows_to_decode() -> list[Row]:
    return [Row(settings(row), [row % 7, 3, 4, 3, 4, 3], new=3) for row in range(ROWS)]


def decode_counts(layers: int, *, programs: bool = True) -> tuple[Counter[str], Counter[str], torch.Tensor]:
    """Launches and syncs of a decoding step of 32 rows with 32 adapters, in steady state, and its logits."""
    base = tiny.base("llama", "generate", num_hidden_layers=layers, **SIZES)
    method = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
    few = [made("llama", "generate", method, seed, num_hidden_layers=layers, **SIZES) for seed in range(3)]
    with pretend_gpu(programs) as gpu:
        to_gpu(base.model)
        runner = Runner(base)  # type: ignore[arg-type]
        for slot in range(1, ROWS + 1):
            loaded = runner.adapter_pool.prepare(few[slot % 3], f"sha256:{slot}", GENERATES)  # type: ignore[arg-type]
            runner.adapter_pool.mount(slot, loaded)
        slots = range(1, ROWS + 1)
        places = [runner.kv_slot(4, 8, slot) for slot in slots]
        run(runner, [Prefill([7, 8, 9 + slot, 10], slot, place) for slot, place in zip(slots, places, strict=True)])
        steps = [DecodeStep(7 + slot, slot, place) for slot, place in zip(slots, places, strict=True)]
        run(runner, [], steps)
        gpu.clear()
        scores = run(runner, [], steps).vocabulary
        launches, syncs, logits = Counter(gpu.launches), Counter(gpu.syncs), on_cpu(scores).clone()
        gpu.clear()
        rows = rows_to_decode()
        assert isinstance(scores, OnCard)
        tokens = choose(scores, rows)
        syncs += gpu.syncs
        assert sum(gpu.launches.values()) <= 60, gpu.launches
    assert tokens == choose(logits.clone(), rows_to_decode())
    return launches, syncs, logits


@pytest.mark.slow
def test_a_decoding_step_of_32_rows_with_32_adapters_launches_at_most_32_kernels_a_layer_and_waits_once() -> None:
    one, two = decode_counts(1), decode_counts(2)
    own = {name: two[0][name] - one[0][name] for name in two[0] if two[0][name] != one[0][name]}
    assert sum(own.values()) <= 32, own
    assert own["bmm"] + own["baddbmm_"] == 14  # the LoRAs of all rows, two products for each linear layer
    assert sum(two[1].values()) == 1, two[1]


@pytest.mark.slow
def test_control_without_the_programs_a_layer_launches_more() -> None:
    """The same with the base's own modules, which compute where a GPU has no Triton."""
    one, three = (step_counts(layers, programs=False) for layers in (1, 3))
    assert sum(layer(one[0], three[0]).values()) > 100
    one, two = decode_counts(1, programs=False), decode_counts(2, programs=False)
    assert sum(two[0].values()) - sum(one[0].values()) > 40
    torch.testing.assert_close(decode_counts(2)[2], two[2], atol=2e-4, rtol=1e-3)


def decoding(layers: int, adapters: int, gpu: Any) -> tuple[Runner, list[DecodeStep]]:
    """A runner on the pretend GPU with so many adapters, and a step of a row for each after its prompt."""
    base = to_gpu(tiny.base("llama", "generate", num_hidden_layers=layers, **SIZES).model)
    method = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
    few = [made("llama", "generate", method, seed, num_hidden_layers=layers, **SIZES) for seed in range(3)]
    on = tiny.base("llama", "generate", num_hidden_layers=layers, **SIZES)
    on.model = base
    runner = Runner(on)  # type: ignore[arg-type]
    for slot in range(1, adapters + 1):
        loaded = runner.adapter_pool.prepare(few[slot % 3], f"sha256:{slot}", GENERATES)  # type: ignore[arg-type]
        runner.adapter_pool.mount(slot, loaded)
    slots = range(1, adapters + 1)
    places = [runner.kv_slot(4, 8, slot) for slot in slots]
    run(runner, [Prefill([7, 8, 9 + slot, 10], slot, place) for slot, place in zip(slots, places, strict=True)])
    return runner, [DecodeStep(7 + slot, slot, place) for slot, place in zip(slots, places, strict=True)]


@pytest.mark.parametrize("layers", [1, 4])
def test_a_load_beside_decoding_is_one_copy_and_launches_nothing(layers: int) -> None:
    """It would take its turn among the passes; and each wait would wait for them."""
    method = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
    adapter = made("llama", "generate", method, 3, num_hidden_layers=layers, **SIZES)
    with pretend_gpu() as gpu:
        runner, _ = decoding(layers, 1, gpu)
        gpu.clear()
        loaded = runner.adapter_pool.prepare(adapter, "sha256:new", GENERATES)  # type: ignore[arg-type]
        assert dict(gpu.copies) == {"copy_": 1}
        assert not gpu.launches
        assert not gpu.syncs
        assert sum(gpu.allocated.values()) == loaded.bytes == loaded.flat.nbytes
        assert isinstance(loaded.flat, OnCard)
        runner.adapter_pool.mount(2, loaded)
    here = Runner(tiny.base("llama", "generate", num_hidden_layers=layers, **SIZES))  # type: ignore[arg-type]
    same = here.adapter_pool.prepare(adapter, "sha256:new", GENERATES)  # type: ignore[arg-type]
    assert torch.equal(on_cpu(loaded.flat), same.flat)


def test_a_load_of_numbers_that_are_not_finite_is_refused_before_they_reach_the_gpu() -> None:
    method = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
    adapter = made("llama", "generate", method, 3, num_hidden_layers=1, **SIZES)
    next(iter(adapter.tensors.values()))[0, 0] = float("nan")
    with pretend_gpu() as gpu:
        runner, _ = decoding(1, 1, gpu)
        with pytest.raises(AdapterError, match="not finite"):
            runner.adapter_pool.prepare(adapter, "sha256:new", GENERATES)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_row_that_joins_costs_one_copy_of_the_mixture_for_all_layers() -> None:
    found: list[dict[str, int]] = []
    for layers in (1, 3):
        with pretend_gpu() as gpu:
            runner, steps = decoding(layers, 8, gpu)
            run(runner, [], steps[:7])
            gpu.clear()
            run(runner, [], steps[:7])
            steady = Counter(gpu.launches), Counter(gpu.copies), Counter(gpu.syncs)
            gpu.clear()
            run(runner, [], steps)
            joined = Counter(gpu.launches), Counter(gpu.copies), Counter(gpu.syncs)
            found.append(dict(joined[0] - steady[0]))
            assert joined[1] == steady[1]
            assert not joined[2]
            assert sum(steady[1].values()) <= 6, steady[1]  # ids, positions, lengths, prefixes, tokens to read
    assert found == [{"stack": 1}, {"stack": 1}]


def test_a_decoding_step_allocates_activations_alone() -> None:
    """Nothing that grows with the length of the cache but its bias and its scores, and no copy of a factor."""
    with pretend_gpu() as gpu:
        runner, steps = decoding(1, 8, gpu)
        run(runner, [], steps)
        gpu.clear()
        run(runner, [], steps)
        largest = max(gpu.allocated.items(), key=lambda each: each[1])
        assert largest[1] <= 8 * 4 * 4 * SIZES["hidden_size"] * 8, largest
        assert not gpu.allocations["stack"]


def test_a_training_step_waits_for_two_numbers_and_copies_what_it_reads() -> None:
    base = tiny.base("llama", "generate", num_hidden_layers=2)
    with pretend_gpu() as gpu:
        to_gpu(base.model)
        task, optimiser, items = tiny.started(base, "summarize", **FULL)
        gpu.clear()
        LocalSlot(base, task, optimiser, 42, 1024).train_step(items, OptimStep(1e-3, clip=1.0))
        assert dict(gpu.syncs) == {"a number": 2}, gpu.syncs  # the loss, and the norm of the gradients
        assert sum(gpu.copies.values()) <= 10, gpu.copies
        assert ("MainThread", "cuda:0") in gpu.devices, "programs start on the base's own GPU"


def test_a_second_backward_pass_of_one_graph_is_an_error_and_not_a_wrong_sum() -> None:
    """liger-kernel writes the gradients of SwiGLU over its inputs, which the graph keeps."""
    base = tiny.base("llama", "generate", num_hidden_layers=1)
    with pretend_gpu():
        to_gpu(base.model)
        task, _, items = tiny.started(base, "summarize", **FULL)
        loss = loss_of(base.model, task, items[:2])
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]
