"""Adapters of other PEFT methods become LoRA: exactly where they are one, else as PEFT converts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
from batches import padded, rows

from turret import adapters, bundles
from turret.bundles.conversion import Converted, as_lora, needs_conversion
from turret.errors import BundleError
from turret.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
TARGETS = ["query", "value"]
EXACT: dict[str, Any] = {
    "rank pattern": lambda: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, rank_pattern={"value": 7}, alpha_pattern={"layer.1.*query": 20}
    ),
    "trained biases": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, bias="lora_only"),
    "adalora with norms": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=10, target_modules=TARGETS, modules_to_save=["LayerNorm"]
    ),
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=TARGETS, lora_alpha=9),
}
CUT: dict[str, Any] = {
    "loha": lambda: peft.LoHaConfig(r=4, alpha=4, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=4, target_modules=TARGETS),
}


def folder_of(make: Any, folder: Path, family: str = "bert", scale: float = 0.2) -> Path:
    """What somebody who trains a small model with PEFT has."""
    torch.manual_seed(0)
    return trained_by_peft(small_models.build(family, "classify"), make, folder, scale)


def trained_by_peft(classifier: Any, make: Any, folder: Path, scale: float) -> Path:
    """The folder that PEFT writes after a training that moved every trained number."""
    config = make()
    config.task_type = "SEQ_CLS"
    model = peft.get_peft_model(classifier, config)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.requires_grad and "original_module" not in name:
                each.add_(torch.randn_like(each) * scale)
    model.save_pretrained(folder)
    return folder


def converted(folder: Path, target: Path, family: str = "bert", rank: int | None = None) -> Converted:
    model = small_models.build(family, "classify").requires_grad_(False)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    ids = torch.stack(rows(lengths=(9, 9, 9)))
    found = as_lora(folder, target, model, FAMILIES[family], ids, rank)
    assert [name for name, _ in model.named_modules()] == names  # the base is given back as it was
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not any(each.requires_grad for each in model.parameters())
    return found


def answers(folder: Path, family: str = "bert") -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT says with a folder on its own model, and turret with it on another."""
    batch = padded(rows(), 0)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(small_models.build(family, "classify"), str(folder)).eval()(**batch)
        model = adapters.mount(small_models.build(family, "classify"), bundles.read_bundle(folder))
        return theirs.logits, adapters.classify_logits(model, rows())


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_a_lora_is_converted_exactly(kind: str, tmp_path: Path) -> None:
    folder = folder_of(EXACT[kind], tmp_path / "given")
    assert needs_conversion(json.loads((folder / "adapter_config.json").read_text()))
    found = converted(folder, tmp_path / "lora")
    assert found.deviation < 1e-5
    theirs = peft.PeftModel.from_pretrained(small_models.build("bert", "classify"), str(folder)).eval()
    with torch.no_grad():
        expected = theirs(**padded(rows(), 0)).logits
    peft_again, ours = answers(tmp_path / "lora")
    torch.testing.assert_close(peft_again, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CUT)
def test_what_is_cut_equals_pefts_own_conversion_and_says_how_far_off_it_is(kind: str, tmp_path: Path) -> None:
    folder = folder_of(CUT[kind], tmp_path / "given", scale=0.1)
    rank = {"loha": 16, "lokr": 48}[kind]
    found = converted(folder, tmp_path / "lora", rank=rank)
    model = peft.PeftModel.from_pretrained(small_models.build("bert", "classify"), str(folder)).eval()
    with torch.no_grad():
        original = model(**padded(rows(), 0)).logits
    _, state = peft.convert_to_lora(model, rank)
    ours = bundles.read_bundle(tmp_path / "lora").tensors
    for name, value in state.items():
        if ".lora_" in name:
            torch.testing.assert_close(ours[name], value.float(), atol=1e-5, rtol=1e-5)
    assert 0 <= found.deviation <= 0.05
    assert (answers(tmp_path / "lora")[1] - original).abs().max() <= 0.06 * original.abs().max()


def test_a_conversion_that_cuts_too_much_is_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = folder_of(CUT["lokr"], tmp_path / "given", scale=1.0)
    with pytest.raises(BundleError, match=r"LOKR as LoRA of rank 1 would change outputs by \d+%.*give a larger --rank"):
        converted(folder, tmp_path / "lora", rank=1)


def test_what_is_no_low_rank_change_is_refused_with_a_sentence_that_helps(tmp_path: Path) -> None:
    turned = folder_of(lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4), tmp_path / "given")
    assert not needs_conversion(json.loads((turned / "adapter_config.json").read_text()))
    with pytest.raises(BundleError, match="OFT cannot be a LoRA: it rotates whole layers; train it again as LoRA"):
        converted(turned, tmp_path / "lora")


def test_a_configuration_that_names_code_is_not_opened(tmp_path: Path) -> None:
    folder = folder_of(EXACT["adalora"], tmp_path / "given")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"x": "y.Z"}}))
    with pytest.raises(BundleError, match="names code"):
        converted(folder, tmp_path / "lora")
