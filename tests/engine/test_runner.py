"""One mixed pass: every row is what its adapter says alone, whoever shares the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters_at_hand import LENGTHS, METHODS, alone, made, runner_of
from batches import rows, with_eos
from small_models import FAMILIES, GENERATORS

from turret.adapters import Adapter, classify_logits
from turret.engine.runner import Fresh, Runner, Step

PATTERNS = {
    "identical": [1] * 8,
    "distinct": [1, 2, 3, 4, 5, 6, 7, 8],
    "uniform": [3, 1, 4, 2, 2, 1, 4, 3],
    "zipf": [1, 1, 1, 2, 1, 2, 3, 1],
    "skewed": [5, 1, 1, 1, 1, 1, 1, 1],
}


def adapters_of(family: str, task: Any) -> list[Adapter]:
    """Eight of different methods, ranks, targets and numbers of labels."""
    kinds = ["lora", "wide", "prefix", "lora", "wide", "prefix", "lora", "wide"]
    kinds = [*kinds[:6], "head", "wide"] if task == "classify" else kinds
    return [made(family, task, METHODS[kind], seed, 2 + seed % 3) for seed, kind in enumerate(kinds, 1)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mixed_pass_of_classifiers_equals_each_row_alone(family: str) -> None:
    adapters = adapters_of(family, "classify")
    runner = runner_of(family, "classify", adapters)
    models = [alone(family, "classify", adapter, 2 + seed % 3) for seed, adapter in enumerate(adapters, 1)]
    inputs = with_eos(runner.model, rows(lengths=LENGTHS))
    for name, slots in PATTERNS.items():
        outcome = runner.run([Fresh(row.tolist(), slot) for row, slot in zip(inputs, slots, strict=True)])
        for row, slot, logits in zip(inputs, slots, outcome.classes, strict=True):
            expected = classify_logits(models[slot - 1], [row])[0]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5, msg=name)


def greedy(runner: Runner, prompts: list[Any], slots: list[int], count: int, together: bool = True) -> list[list[int]]:
    """Token by token; with `together` the second half joins two steps later than the first."""
    said: list[list[int]] = [[] for _ in prompts]
    lanes: dict[int, Any] = {}
    waiting = list(range(len(prompts)))
    while waiting or lanes:
        begin = waiting[: (len(prompts) + 1) // 2] if together else waiting[:1] if not lanes else []
        if together and lanes and any(len(said[row]) < 2 for row in lanes):
            begin = []
        waiting = [row for row in waiting if row not in begin]
        going = list(lanes)
        steps = [Step(said[row][-1], slots[row], lanes[row]) for row in going]
        fresh = []
        for row in begin:
            lanes[row] = runner.lane(len(prompts[row]), count, slots[row])
            fresh.append(Fresh(prompts[row].tolist(), slots[row], lanes[row]))
        tokens = runner.run(fresh, steps).vocabulary.argmax(-1).tolist()
        for row, token in zip([*begin, *going], tokens, strict=True):
            said[row].append(token)
            if len(said[row]) == count:
                runner.cache.close(lanes.pop(row))
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
