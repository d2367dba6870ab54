"""Methods of PEFT that scale beside LoRA's factors answer in a mixed batch as PEFT does alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters_at_hand import METHODS, made, runner_of
from batches import padded, rows
from bundles.test_conversion import folder_of
from small_models import build

from turret import adapters, bundles
from turret.adapters import Adapter, attachment
from turret.adapters.tuners import peft as peft_tuner
from turret.engine.sequence import Prefill
from turret.methods import Peft
from turret.methods.peft import MARKS, MIXED, PROMPTS, SLOW, WRAPPED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
TARGETS = ["query", "value"]
KINDS: dict[str, Any] = {
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "dora with a pattern": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True, rank_pattern={"value": 5}
    ),
    "bias of B": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, lora_bias=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "vera": lambda: peft.VeraConfig(r=16, target_modules=TARGETS, d_initial=0.5),
    "dora of a pooler": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "dense"], use_dora=True),
}
WHOLE: dict[str, Any] = {  # with modules of the body that are trained whole
    "norms": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, modules_to_save=["LayerNorm"]),
    "embeddings": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, modules_to_save=["word_embeddings", "position_embeddings"]
    ),
    "a few tokens": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, trainable_token_indices={"word_embeddings": [70, 11, 33]}
    ),
    "every bias": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, bias="all"),
    "every bias of dora": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, bias="all", use_dora=True, rank_pattern={"value": 5}
    ),
    "ia3 with norms": lambda: peft.IA3Config(
        target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], modules_to_save=["LayerNorm"]
    ),
    "norms alone": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Adapter, Path]]:
    """An adapter of each kind as turret reads it, and the folder that PEFT wrote."""
    found = {}
    for kind, make in (KINDS | WHOLE).items():
        folder = folder_of(make, tmp_path_factory.mktemp("mixing") / "adapter")
        found[kind] = (bundles.read_bundle(folder), folder)
    return found


def by_peft(folder: Path, inputs: list[torch.Tensor]) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(build("bert", "classify"), str(folder)).eval()
    logits: torch.Tensor = model(**padded(inputs, 0)).logits
    return logits


@torch.no_grad()
def test_a_mixed_pass_equals_peft_row_by_row(given: dict[str, tuple[Adapter, Path]]) -> None:
    plain = [made("bert", "classify", METHODS[name], seed) for seed, name in enumerate(("lora", "prefix"), 1)]
    runner = runner_of("bert", "classify", [*plain, *(adapter for adapter, _ in given.values())])
    inputs = [*rows(), *rows(3), *rows(5), *rows(7)][: len(plain) + len(given)]
    outcome = runner.run([Prefill(row.tolist(), slot) for slot, row in enumerate(inputs, 1)]).classes
    again = runner.run([Prefill(row.tolist(), slot) for slot, row in reversed(list(enumerate(inputs, 1)))]).classes
    bare = by_bare(inputs)
    for place, (kind, (_, folder)) in enumerate(given.items(), len(plain)):
        expected = by_peft(folder, [inputs[place]])[0]
        torch.testing.assert_close(outcome[place], expected, atol=1e-5, rtol=1e-5, msg=kind)
        torch.testing.assert_close(again[len(inputs) - 1 - place], expected, atol=1e-5, rtol=1e-5, msg=kind)
        assert (expected - bare[place]).abs().max() > 1e-3, kind  # control: the adapter does something


def by_bare(inputs: list[torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = build("bert", "classify")(**padded(inputs, 0)).logits
    return logits


@torch.no_grad()
def test_slots_of_one_model_equal_peft_padded_and_packed(given: dict[str, tuple[Adapter, Path]]) -> None:
    model = build("bert", "classify")
    adapters.mount(model, made("bert", "classify", METHODS["lora"], 1), 1)
    for slot, (adapter, _) in enumerate(given.values(), 2):
        adapters.mount(model, adapter, slot)
    inputs = rows(lengths=(9, 3, 14, 1, 6, 11, 5, 7, 2, 12, 8, 4, 10))[: len(given)]
    slots = list(range(2, 2 + len(given)))
    packed = adapters.classify_logits(model, inputs, slots)
    for place, (kind, (_, folder)) in enumerate(given.items()):
        expected = by_peft(folder, [inputs[place]])[0]
        torch.testing.assert_close(packed[place], expected, atol=1e-5, rtol=1e-5, msg=kind)
        with adapters.on_slot(model, slots[place]):
            alone = model(**padded([inputs[place]], 0)).logits[0]
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5, msg=kind)
    adapters.unmount(model, 3)
    assert not any(3 in layer.scaled for layer in attachment(model).linears.values())
    names = {name for name, _ in build("bert", "classify").named_modules()}
    assert {name for name, _ in adapters.detach(model).named_modules()} == names


def test_what_a_method_says_of_mixing_is_what_is_computed() -> None:
    assert set(MARKS) == set(peft_tuner.METHODS)
    assert set(MIXED) == {*MARKS, *WRAPPED, *PROMPTS} - set(SLOW)
    assert Peft.mixes({"peft_type": "IA3"})
    assert not Peft.mixes({"peft_type": "ADAMSS"})
