"""A mixed pass: every row equals its adapter alone, whatever else is in the pass."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from adapters_at_hand import LENGTHS, METHODS, alone, made, runner_of
from batches import own_target_logits, rows, with_eos
from small_models import FAMILIES, GENERATORS
from tiny_training import base

from turret.adapters import Adapter, classify_logits
from turret.engine import runner as runner_module
from turret.engine.runner import Runner, pass_tokens
from turret.engine.sequence import DecodeStep, Prefill
from turret.methods import Method, Peft, Prefix
from turret.ops.table import without

PATTERNS = {  # the adapter of each row; number 7 of every set is only a head, so its body is the bare base
    "identical": [2] * 8,
    "distinct": [1, 2, 3, 4, 5, 6, 7, 8],
    "uniform": [3, 1, 4, 2, 2, 1, 4, 3],
    "zipf": [1, 1, 1, 2, 1, 2, 3, 1],
    "skewed": [5, 1, 1, 1, 1, 1, 1, 1],
    "with base rows": [7, 1, 7, 2, 7, 3, 4, 7],
    "with prefix rows": [1, 3, 2, 6, 3, 4, 6, 8],
    "other ranks": [1, 2, 4, 5, 1, 2, 4, 5],
    "other heads": [4, 5, 6, 7, 8, 4, 6, 5],
}
SETS = {
    "lora": ["lora", "wide", "high", "lora", "wide", "high", "head", "one"],  # ranks 4, 12, 20 and 1
    "prefix": ["prefix", "long", "prefix", "long", "prefix", "long", "head", "prefix"],
    "all": ["lora", "wide", "prefix", "high", "one", "long", "head", "wide"],
}
MORE: dict[str, Method] = {
    "high": METHODS["wide"].model_copy(update={"r": 20}),
    "one": METHODS["lora"].model_copy(update={"r": 1, "lora_alpha": 2}),
    "long": Prefix(num_virtual_tokens=9, reparametrize=False),
}


@functools.cache
def adapter_of(family: str, task: Any, kind: str, seed: int) -> tuple[Adapter, Any]:
    """An adapter with 2, 3 or 4 labels, and a model with only this adapter."""
    labels = 2 + seed % 3
    adapter = made(family, task, (METHODS | MORE)[kind], seed, labels)
    return adapter, alone(family, task, adapter, labels)


def set_of(family: str, task: Any, methods: str) -> tuple[list[Adapter], list[Any]]:
    """Eight adapters of a set of methods, and a model for each. Generators have no head, so there 7 is another LoRA."""
    kinds = [kind if task == "classify" or kind != "head" else "lora" for kind in SETS[methods]]
    both = [adapter_of(family, task, kind, seed) for seed, kind in enumerate(kinds, 1)]
    return [adapter for adapter, _ in both], [model for _, model in both]


def adapters_of(family: str, task: Any) -> list[Adapter]:
    return set_of(family, task, "all")[0]


@pytest.mark.slow
@pytest.mark.parametrize("methods", SETS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mixed_pass_of_classifiers_equals_each_row_alone(family: str, methods: str) -> None:
    adapters, models = set_of(family, "classify", methods)
    runner = runner_of(family, "classify", adapters)
    inputs = with_eos(runner.model, rows(lengths=LENGTHS))
    for name, slots in PATTERNS.items():
        outcome = runner.run([Prefill(row.tolist(), slot) for row, slot in zip(inputs, slots, strict=True)])
        for row, slot, logits in zip(inputs, slots, outcome.classes, strict=True):
            expected = classify_logits(models[slot - 1], [row])[0]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("without_kernels", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_the_last_layer_computes_only_what_a_long_pass_of_classifiers_reads(family: str, without_kernels: bool) -> None:
    """The first token of each row. A short pass is one call for all layers, which is faster: the control."""
    adapters, models = set_of(family, "classify", "all")
    adapters.append(made(family, "classify", Peft(peft_type="IA3"), 3, 2))
    models.append(alone(family, "classify", adapters[-1], 2))
    runner, computed = runner_of(family, "classify", adapters), list[int]()
    runner.model.base_model.encoder.register_forward_hook(lambda _, __, output: computed.append(output[0].shape[1]))
    inputs = with_eos(runner.model, rows(lengths=[40, 3, 25, 33, 9, 40, 17, 28, 30]))
    slots = [7, 1, 3, 2, 9, 3, 4, 6, 9]
    with without("kernels") if without_kernels else nullcontext():
        for few in (9, 1):
            prefill = [Prefill(row.tolist(), slot) for row, slot in zip(inputs[:few], slots, strict=False)]
            for row, slot, logits in zip(inputs, slots, runner.run(prefill).classes, strict=False):
                expected = classify_logits(models[slot - 1], [row])[0]
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        with without("first_token"):
            runner.run([Prefill(row.tolist(), slot) for row, slot in zip(inputs, slots, strict=True)])
        runner.run([Prefill(row.tolist(), slot, pooling="mean") for row, slot in zip(inputs, slots, strict=True)])
    assert computed == [9, 1 if without_kernels else 40, 225, 225]


@pytest.mark.parametrize("methods", SETS)
@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_logits_of_a_mixed_prefill_and_of_the_next_step_equal_each_row_alone(family: str, methods: str) -> None:
    """Slot 0, the bare base, replaces adapter 7."""
    adapters, models = set_of(family, "generate", methods)
    runner = runner_of(family, "generate", adapters)
    inputs = with_eos(runner.model, rows(lengths=LENGTHS))
    models = [alone(family, "generate", None), *models]
    target = torch.tensor([17, 23])
    wanted = {
        (row, slot): own_target_logits(models[slot], [inputs[row]], [target])
        for slots in PATTERNS.values()
        for row, slot in enumerate(0 if slot == 7 else slot for slot in slots)
    }  # (2, V) each
    for name, numbers in PATTERNS.items():
        slots = [0 if slot == 7 else slot for slot in numbers]
        kv_slots = [runner.kv_slot(len(row), 2, slot) for row, slot in zip(inputs, slots, strict=True)]
        fresh = [Prefill(r.tolist(), slot, kv_slot) for r, slot, kv_slot in zip(inputs, slots, kv_slots, strict=True)]
        first = runner.run(fresh).vocabulary
        second = runner.run(
            [], [DecodeStep(17, slot, kv_slot) for slot, kv_slot in zip(slots, kv_slots, strict=True)]
        ).vocabulary
        for row, slot in enumerate(slots):
            got = torch.stack([first[row], second[row]])
            torch.testing.assert_close(got, wanted[row, slot], atol=1e-5, rtol=1e-5, msg=name)
            runner.cache.close(kv_slots[row])


def greedy(runner: Runner, prompts: list[Any], slots: list[int], count: int, together: bool = True) -> list[list[int]]:
    """Token by token; with `together` the second half joins two steps later than the first."""
    said: list[list[int]] = [[] for _ in prompts]
    kv_slots: dict[int, Any] = {}
    waiting = list(range(len(prompts)))
    while waiting or kv_slots:
        begin = waiting[: (len(prompts) + 1) // 2] if together else waiting[:1] if not kv_slots else []
        if together and kv_slots and any(len(said[row]) < 2 for row in kv_slots):
            begin = []
        waiting = [row for row in waiting if row not in begin]
        going = list(kv_slots)
        steps = [DecodeStep(said[row][-1], slots[row], kv_slots[row]) for row in going]
        fresh = []
        for row in begin:
            kv_slots[row] = runner.kv_slot(len(prompts[row]), count, slots[row])
            fresh.append(Prefill(prompts[row].tolist(), slots[row], kv_slots[row]))
        tokens = runner.run(fresh, steps).vocabulary.argmax(-1).tolist()
        for row, token in zip([*begin, *going], tokens, strict=True):
            said[row].append(token)
            if len(said[row]) == count:
                runner.cache.close(kv_slots.pop(row))
    return said


def hf_greedy(model: Any, prompt: Any, count: int) -> list[int]:
    out = model.generate(
        input_ids=prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_a_prompt_in_several_passes_gives_the_same_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside short prompts and rows that decode, with LoRA, prefixes and the bare base; also after a failed pass."""
    adapters, models = set_of(family, "generate", "all")
    runner = runner_of(family, "generate", adapters)
    models = [alone(family, "generate", None), *models]
    inputs = with_eos(runner.model, rows(lengths=[23, 4, 11, 16, 3]))
    slots, target = [3, 1, 0, 6, 2], torch.tensor([17, 23])
    sizes: list[int] = []
    runner.model.base_model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["input_ids"].shape[1]), with_kwargs=True
    )

    def both(failing: bool = False) -> list[torch.Tensor]:
        """The logits after each prompt and after one more token. The first row decodes while the others begin."""
        kv_slots = [runner.kv_slot(len(row), 2, slot) for row, slot in zip(inputs, slots, strict=True)]
        fresh = [Prefill(r.tolist(), slot, kv_slot) for r, slot, kv_slot in zip(inputs, slots, kv_slots, strict=True)]
        if failing:
            with monkeypatch.context() as broken:
                broken.setattr(Runner, "_outcome", lambda *_: (_ for _ in ()).throw(MemoryError))
                with pytest.raises(MemoryError):
                    runner.run(fresh[:1])
        first = [runner.run(fresh[:1]).vocabulary[0]]
        begun = runner.run(fresh[1:], [DecodeStep(17, slots[0], kv_slots[0])]).vocabulary
        steps = [DecodeStep(17, slot, kv_slot) for slot, kv_slot in zip(slots[1:], kv_slots[1:], strict=True)]
        runner.cache.close(kv_slots[0])
        second = [begun[-1], *runner.run([], steps).vocabulary]
        first += begun[:-1]
        for kv_slot in kv_slots[1:]:
            runner.cache.close(kv_slot)
        return [torch.stack(each) for each in zip(first, second, strict=True)]

    whole = both()
    assert max(sizes) == 35, "the control: four prompts and a token in one pass"
    monkeypatch.setattr(runner_module, "PROMPT_PASS", 7)
    sizes.clear()
    for failing in (False, True):
        cut = both(failing)
        for row, slot in enumerate(slots):
            wanted = own_target_logits(models[slot], [inputs[row]], [target])
            torch.testing.assert_close(cut[row], wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cut[row], whole[row], atol=1e-5, rtol=1e-5)
    assert sizes[:4] == [7, 7, 7, 2], "the prompt of 23 tokens"


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
@torch.no_grad()
def test_a_prompt_under_a_sliding_window_stays_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier keys would be seen from beyond the window, as a prefix is."""
    runner = runner_of(family, "generate", [])
    monkeypatch.setattr(runner_module, "PROMPT_PASS", 7)
    sizes: list[int] = []
    runner.model.base_model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    runner.run([Prefill(list(range(2, 25)), 0, runner.kv_slot(23, 1, 0))])
    assert sizes == [23]


@pytest.mark.slow
@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_greedy_tokens_of_a_mixed_batch_equal_transformers_generate_alone(family: str) -> None:
    adapters = adapters_of(family, "generate")
    runner = runner_of(family, "generate", adapters)
    prompts = with_eos(runner.model, rows(lengths=LENGTHS))
    models = [alone(family, "generate", adapter) for adapter in [None, *adapters]]
    for slots in ([1, 2, 0, 3, 4, 5, 6, 8], [3, 3, 3, 1, 1, 0, 1, 1]):
        got = greedy(runner, prompts, slots, 12)
        for prompt, slot, tokens in zip(prompts, slots, got, strict=True):
            assert tokens == hf_greedy(models[slot], prompt, 12), slot
    assert len(runner.cache) == 0


def test_a_small_encoder_takes_longer_passes_than_others() -> None:
    encoder, decoder = (base(family, task) for family, task in (("bert", "classify"), ("llama", "generate")))
    assert (pass_tokens(encoder), pass_tokens(decoder)) == (1024, 512)
    encoder.model.config.num_hidden_layers = 400
    assert pass_tokens(encoder) == 512


@pytest.mark.parametrize("family", ["bert", "llama"])
@torch.no_grad()
def test_heads_on_the_bare_base_share_the_body_of_rows_with_the_same_tokens(family: str) -> None:
    kinds = ["head", "head", "lora", "head", "head"]
    adapters, models = zip(
        *(adapter_of(family, "classify", kind, seed) for seed, kind in enumerate(kinds, 1)), strict=True
    )
    runner = runner_of(family, "classify", list(adapters))
    same, other = with_eos(runner.model, rows(lengths=(9, 7)))
    asked = [(same, 1), (same, 2), (same, 3), (same, 4), (other, 5), (same, 1)]
    passed: list[int] = []
    hook = runner.model.base_model.register_forward_pre_hook(
        lambda _, __, given: passed.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        outcome = runner.run([Prefill(row.tolist(), slot) for row, slot in asked])
    finally:
        hook.remove()
    assert passed == [2 * len(same) + len(other)], "one body for the heads, one for the LoRA, one for the other text"
    for (row, slot), logits in zip(asked, outcome.classes, strict=True):
        torch.testing.assert_close(logits, classify_logits(models[slot - 1], [row])[0], atol=1e-5, rtol=1e-5)


def upper(family: str, layers: tuple[int, ...], seed: int) -> tuple[Adapter, Any]:
    """A LoRA of these layers alone, and a model with it."""
    names = tuple(f"layer.{layer}.attention.self.{part}" for layer in layers for part in ("query", "value"))
    method = METHODS["lora"].model_copy(update={"target_modules": names})
    adapter = made(family, "classify", method, seed, 3)
    return adapter, alone(family, "classify", adapter, 3)


@pytest.mark.parametrize("lengths", [(9, 7), (40, 33)], ids=["one call", "first token"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_rows_with_the_same_tokens_share_the_layers_below_the_first_that_their_adapters_change(
    family: str, kernels: bool, lengths: tuple[int, ...]
) -> None:
    both = [upper(family, (1,), 1), upper(family, (1,), 2), adapter_of(family, "classify", "head", 3),
            adapter_of(family, "classify", "lora", 4), upper(family, (1,), 5)]  # fmt: skip
    runner = runner_of(family, "classify", [adapter for adapter, _ in both])
    same, other = with_eos(runner.model, rows(lengths=lengths))
    asked = [(same, 1), (same, 4), (same, 2), (other, 5), (same, 3), (same, 5)]
    prefill = [Prefill(row.tolist(), slot) for row, slot in asked]
    expected = [classify_logits(both[slot - 1][1], [row])[0] for row, slot in asked]
    with nullcontext() if kernels else without("kernels"):
        plain = runner.run(prefill).classes
        passed: list[list[int]] = [[], []]
        for layer, seen in zip(runner.adapter_pool.layers, passed, strict=True):
            layer.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0].shape[1]))
        counted = runner.run(prefill).classes
        runner.run(prefill[1:4])
    first, second = len(same), len(other)
    assert passed == [[2 * first + second, 2 * first + second], [5 * first + second, 2 * first + second]]
    for found in (plain, counted):
        for logits, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
