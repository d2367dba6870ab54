"""A base loads in 4 bits with the fingerprint of its checkpoint, and a quantized checkpoint loads as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from four_bits import base_in_four_bits, needs_bitsandbytes
from safetensors.torch import load_file, save_file
from small_models import FAMILIES

from turret import bases, quantized
from turret.bases.fingerprints import is_within
from turret.bases.quantized import arguments
from turret.errors import BaseModelError
from turret.families import Family, family_named

pytestmark = needs_bitsandbytes


def hidden(model: Any) -> torch.Tensor:
    """Some outputs of a model's body."""
    ids = torch.arange(5, 21)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        states: torch.Tensor = model.base_model(**inputs)[0]
    return states


@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_is_in_four_bits_and_the_fingerprint_the_checkpoints(family: str, tmp_path: Path) -> None:
    packed = base_in_four_bits(family, tmp_path, verify=True)  # hashes the files, one tensor at a time
    plain = base_in_four_bits(family, tmp_path, quantization="none", verify=True)
    assert packed.fingerprint == plain.fingerprint == bases.fingerprint(packed.model)
    names = {path for path, each in packed.model.named_modules() if quantized.in_four_bits(each)}
    assert names
    outside = (*packed.family.beside_body, *packed.family.body_excludes)
    assert not [name for name in names if is_within(name.removeprefix(f"{packed.model.base_model_prefix}."), outside)]
    assert packed.bytes < plain.bytes
    assert quantized.count_weights(packed.model) == quantized.count_weights(plain.model)
    assert any(f"{len(names)} linear layers are kept in nf4" in note for note in packed.notes)
    one, other = hidden(packed.model), hidden(plain.model)
    assert not torch.equal(one, other)  # the control: it does not compute with the plain weights
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.8


def test_a_weight_in_four_bits_is_what_bitsandbytes_says_it_is(tmp_path: Path) -> None:
    base = base_in_four_bits("llama", tmp_path)
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    original = quantized.original_weight(layer)
    assert original is not None
    bitsandbytes = quantized.library()
    packed, state = bitsandbytes.functional.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed.flatten(), layer.weight.data.flatten())
    assert torch.equal(quantized.dense_weight(layer), bitsandbytes.functional.dequantize_4bit(packed, state))


def test_gpt2s_turned_weights_are_read_the_right_way_round(tmp_path: Path) -> None:
    layer = base_in_four_bits("gpt2", tmp_path).model.get_submodule("transformer.h.0.mlp.c_fc")
    original, dense = quantized.original_weight(layer), quantized.dense_weight(layer)
    assert original is not None
    assert original.shape == dense.shape == (96, 64)
    assert float((original - dense).norm() / original.norm()) < 0.15


def test_names_that_only_transformers_understands_give_the_same_fingerprint(tmp_path: Path) -> None:
    folder = small_models.save_base("bert", tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): each for name, each in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    plain = base_in_four_bits("bert", tmp_path, quantization="none", verify=True)
    assert base_in_four_bits("bert", tmp_path, verify=True).fingerprint == plain.fingerprint


def test_an_evaluation_leaves_the_weights_as_they_are_and_gradients_pass_after_it(tmp_path: Path) -> None:
    base = base_in_four_bits("bert", tmp_path, dtype="bfloat16")
    layers = [each for each in base.model.modules() if quantized.in_four_bits(each)]
    before = [each.weight.data.clone() for each in layers]
    hidden(base.model.eval())
    assert all(torch.equal(old, each.weight.data) for old, each in zip(before, layers, strict=True))
    x = torch.ones(2, 64, dtype=torch.bfloat16, requires_grad=True)
    layers[0](x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_control_bitsandbytes_itself_rewrites_a_weight_at_the_first_evaluation_here() -> None:
    bitsandbytes = quantized.library()
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("this processor has no AVX-512 BF16")
    layer = bitsandbytes.nn.LinearNF4(64, 64, bias=False).to("cpu").eval()
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer(torch.ones(1, 64))
    assert layer.weight.data.shape != before.shape or not torch.equal(layer.weight.data, before)


FETCHES = """
import sys
sys.path.insert(0, {folder!r})
{load}
print("fetched" if "kernels" in sys.modules and sys.modules["kernels"].ASKED else "nothing")
"""


def fetched(folder: Path, load: str) -> str:
    """What a fresh process does that loads bitsandbytes beside a package `kernels` which notes what it is asked for."""
    (folder / "kernels.py").write_text(
        "ASKED = []\ndef get_kernel(name, **_):\n    ASKED.append(name)\n    raise OSError\n"
    )
    program = FETCHES.format(folder=str(folder), load=load)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


ON_PEFT = """
import kernels, small_models
import turret
from turret.methods import Peft
turret.attach(small_models.build("bert", "classify"), Peft(peft_type="IA3"))
import bitsandbytes
"""


@pytest.mark.slow
def test_a_method_of_peft_fetches_no_kernel_either(tmp_path: Path) -> None:
    assert fetched(tmp_path, f"sys.path.insert(0, {str(Path(small_models.__file__).parent)!r})\n{ON_PEFT}") == "nothing"


@pytest.mark.slow
def test_loading_the_library_fetches_no_kernel(tmp_path: Path) -> None:
    assert fetched(tmp_path, "import kernels; from turret import quantized; quantized.library()") == "nothing"
    if quantized.library().functional.has_avx512bf16():
        assert fetched(tmp_path, "import bitsandbytes") == "fetched"  # the control


def test_without_the_library_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_models.save_base("bert", tmp_path / "bert")
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with quantized.hide_package("bitsandbytes"), pytest.raises(BaseModelError) as caught:
        bases.load(str(folder), task="classify", quantization="nf4")
    assert "pip install 'turret[quantized]'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gptq_checkpoint_names_the_packages_that_read_it(tmp_path: Path) -> None:
    folder = small_models.save_base("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    for kind, package in (("gptq", "optimum"), ("awq", "gptqmodel")):
        config["quantization_config"] = {"quant_method": kind, "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BaseModelError, match=f"quantized by {kind}.*pip install .*{package}"):
            bases.load(str(folder), task="generate")


def test_a_checkpoint_in_four_bits_loads_as_it_is_and_is_another_base(tmp_path: Path) -> None:
    base = base_in_four_bits("llama", tmp_path, task="generate")
    kept = tmp_path / "packed"
    base.model.save_pretrained(kept)
    base.tokenizer.save_pretrained(kept)
    again = bases.load(str(kept), task="generate", dtype="float32")
    assert torch.equal(hidden(again.model), hidden(base.model))
    assert again.fingerprint != base.fingerprint
    assert again.fingerprint == bases.load(str(kept), task="classify", num_labels=2, verify=True).fingerprint
    assert again.info.quantization is None  # the checkpoint itself says it
    with pytest.raises(BaseModelError, match="quantized already"):
        bases.load(str(kept), task="generate", quantization="nf4")


def test_a_gpu_packs_the_weights_itself_unless_the_family_is_a_guess() -> None:
    def packs(family: Family, device: str, kept: str = "nf4") -> str:
        return arguments(family, kept, torch.device(device))["device_map"][""]

    llama = family_named("llama")
    assert packs(llama, "cuda:1") == "cuda:1"
    assert packs(llama, "cpu") == "cpu"
    assert packs(replace(llama, guessed=True), "cuda:0") == "cpu", "its outputs are checked on the CPU first"
    assert packs(llama, "cuda:0", "gptq") == "cpu"
    assert arguments(llama, "none", torch.device("cuda:0")) == {}
