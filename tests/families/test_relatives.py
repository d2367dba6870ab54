"""Families beside those of `small_models.FAMILIES` in one matrix: bare, padded, packed, mixed, cached, and PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters_at_hand import LENGTHS, METHODS, alone, made, runner_of
from batches import own_target_logits, padded, rows, with_eos
from peft_twins import adapter_from, lora_twin, require_the_same_gradients
from small_models import RELATIVE_DECODERS, RELATIVE_ENCODER_DECODERS, RELATIVES, build, config

from turret.adapters import attach, attachment, classify_logits, on_slot, target_logits
from turret.adapters.tuners.tuner import tuner_of
from turret.engine.sequence import DecodeStep, Prefill
from turret.errors import AdapterError
from turret.families import FAMILIES
from turret.methods import LoRA, Method, Prefix

GENERATORS = RELATIVE_ENCODER_DECODERS + RELATIVE_DECODERS
CLASSIFIERS = tuple(family for family in RELATIVES if family != "pegasus")  # transformers has no classifier of it
PREFIXED = tuple(family for family in RELATIVES if not FAMILIES[family].rows_alone)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
NOISY = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False)


@pytest.mark.parametrize("family", CLASSIFIERS)
@torch.no_grad()
def test_the_bare_base_classifies_as_before_padded_and_packed(family: str) -> None:
    model = build(family, "classify")
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    own = model(**batch).logits
    attach(model, NOISY, generator=torch.Generator().manual_seed(1))
    adapted = classify_logits(model, inputs)
    assert (adapted - own).abs().max() > 1e-3
    with on_slot(model, 0):
        extract_free = model(**batch).logits
        packed = classify_logits(model, inputs)
    heads = attachment(model).heads
    assert heads  # slot 0 reads the base's own head
    torch.testing.assert_close(extract_free, own, **CLOSE)
    torch.testing.assert_close(packed, own, **CLOSE)


@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_the_bare_base_scores_targets_as_before_packed(family: str) -> None:
    model = build(family, "generate")
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    own = own_target_logits(model, sources, targets)
    attach(model, NOISY, generator=torch.Generator().manual_seed(1))
    assert (target_logits(model, sources, targets) - own).abs().max() > 1e-3
    with on_slot(model, 0):
        torch.testing.assert_close(target_logits(model, sources, targets), own, **CLOSE)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_lora_of_a_classifier_equals_pefts_in_outputs_and_gradients(family: str, targets: Any) -> None:
    model = build(family, "classify")
    attach(model, NOISY.model_copy(update={"target_modules": targets}), generator=torch.Generator().manual_seed(1))
    twin = lora_twin(family, "classify", adapter_from(model))
    inputs = with_eos(model, rows())
    batch, labels = padded(inputs, model.config.pad_token_id), torch.tensor([0, 2, 1, 0])
    for logits in (model(**batch).logits, classify_logits(model, inputs)):
        theirs = twin(**batch).logits
        torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
        require_the_same_gradients(model, twin, logits, theirs, labels)


@pytest.mark.parametrize("family", GENERATORS)
def test_lora_of_a_generator_equals_pefts_in_outputs_and_gradients(family: str) -> None:
    model = build(family, "generate")
    attach(model, NOISY, generator=torch.Generator().manual_seed(1))
    twin = lora_twin(family, "generate", adapter_from(model))
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    logits, theirs = target_logits(model, sources, targets), own_target_logits(twin, sources, targets)
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
    require_the_same_gradients(model, twin, logits, theirs, torch.cat(targets))


def methods_of(family: str, task: Any) -> list[Method]:
    names = ["lora", "wide", "prefix" if family in PREFIXED else "lora", "head" if task == "classify" else "lora"]
    return [METHODS[name] for name in names]


@pytest.mark.parametrize("family", CLASSIFIERS)
@torch.no_grad()
def test_a_mixed_pass_of_classifiers_equals_each_row_alone(family: str) -> None:
    adapters = [made(family, "classify", method, seed) for seed, method in enumerate(methods_of(family, "classify"), 1)]
    models = [alone(family, "classify", adapter) for adapter in adapters]
    runner = runner_of(family, "classify", adapters)
    inputs, slots = with_eos(runner.model, rows(lengths=LENGTHS)), [3, 1, 4, 2, 2, 1, 4, 3]
    outcome = runner.run([Prefill(row.tolist(), slot) for row, slot in zip(inputs, slots, strict=True)])
    for row, slot, logits in zip(inputs, slots, outcome.classes, strict=True):
        torch.testing.assert_close(logits, classify_logits(models[slot - 1], [row])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_a_cached_step_of_a_mixed_pass_equals_each_row_alone_without_a_cache(family: str) -> None:
    adapters = [made(family, "generate", method, seed) for seed, method in enumerate(methods_of(family, "generate"), 1)]
    models = [alone(family, "generate", None), *(alone(family, "generate", adapter) for adapter in adapters)]
    runner = runner_of(family, "generate", adapters)
    inputs, slots = with_eos(runner.model, rows(lengths=LENGTHS)), [3, 0, 1, 2, 0, 4, 3, 1]
    kv_slots = [runner.kv_slot(len(row), 2, slot) for row, slot in zip(inputs, slots, strict=True)]
    fresh = [Prefill(r.tolist(), slot, kv_slot) for r, slot, kv_slot in zip(inputs, slots, kv_slots, strict=True)]
    first = runner.run(fresh).vocabulary
    steps = [DecodeStep(17, slot, kv_slot) for slot, kv_slot in zip(slots, kv_slots, strict=True)]
    second = runner.run([], steps).vocabulary
    for row, slot in enumerate(slots):
        wanted = own_target_logits(models[slot], [inputs[row]], [torch.tensor([17, 23])])
        torch.testing.assert_close(torch.stack([first[row], second[row]]), wanted, **CLOSE)


@pytest.mark.parametrize("family", [family for family in CLASSIFIERS if family in PREFIXED])
@torch.no_grad()
def test_a_prefix_tuned_classifier_is_the_same_padded_and_packed(family: str) -> None:
    model = build(family, "classify")
    attach(model, Prefix(num_virtual_tokens=4, encoder_hidden_size=8))
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    torch.testing.assert_close(classify_logits(model, inputs), model(**batch).logits, **CLOSE)


@pytest.mark.parametrize("family", [family for family in RELATIVES if family not in PREFIXED])
def test_a_family_that_computes_attention_itself_refuses_a_prefix_in_one_line(family: str) -> None:
    method = Prefix(num_virtual_tokens=4)
    with pytest.raises(AdapterError, match=f"{family} computes its attention itself.*use method.kind"):
        attach(build(family, "classify"), method)
    check = tuner_of(method).targets(build(family, "classify"))
    assert (check.level, check.remedy) == ("refuse", 'use method.kind = "lora"')


def test_frequencies_that_change_with_the_longest_row_of_a_batch_are_not_used() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    long = config("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert FAMILIES["phi3"].position_limit(long) == 64
    assert FAMILIES["phi3"].position_limit(config("phi3")) == 520
    assert [FAMILIES["phi3"].last_position(each) for each in (long, config("phi3"))] == [64, None]
    assert FAMILIES["bert"].last_position(config("bert")) == 520


FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # the configuration of FLAN-T5
PHI4 = {"partial_rotary_factor": 0.5}  # of Phi 4 mini, which is a Phi 3 with fewer rotated dimensions


@pytest.mark.parametrize(("family", "changes"), [("t5", FLAN), ("phi3", PHI4)], ids=["flan-t5", "phi-4"])
def test_models_of_another_name_and_the_same_code_pass_the_matrix(family: str, changes: dict[str, Any]) -> None:
    model = build(family, "generate", **changes)
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    with torch.no_grad():
        own = own_target_logits(model, sources, targets)
        attach(model, NOISY, generator=torch.Generator().manual_seed(1))
        with on_slot(model, 0):
            torch.testing.assert_close(target_logits(model, sources, targets), own, **CLOSE)
    adapter = adapter_from(model)
    twin = lora_twin(family, "generate", adapter, **changes)
    logits, theirs = target_logits(model, sources, targets), own_target_logits(twin, sources, targets)
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
    require_the_same_gradients(model, twin, logits, theirs, torch.cat(targets))
    runner = runner_of(family, "generate", [adapter], **changes)
    kv_slots = [runner.kv_slot(len(row), 2, slot) for row, slot in zip(sources, (1, 0, 1, 0), strict=True)]
    fresh = [Prefill(r.tolist(), slot, kv) for r, slot, kv in zip(sources, (1, 0, 1, 0), kv_slots, strict=True)]
    first = runner.run(fresh).vocabulary
    second = runner.run(
        [], [DecodeStep(17, slot, kv) for slot, kv in zip((1, 0, 1, 0), kv_slots, strict=True)]
    ).vocabulary
    bare = build(family, "generate", **changes)
    with torch.no_grad():
        for place, slot in enumerate((1, 0, 1, 0)):
            wanted = own_target_logits(twin if slot else bare, [sources[place]], [torch.tensor([17, 23])])
            torch.testing.assert_close(torch.stack([first[place], second[place]]), wanted, **CLOSE)
