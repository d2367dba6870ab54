"""A bundle round-trips exactly and loads in PEFT; what must be refused is refused in one line."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from batches import own_target_logits, padded, rows, with_eos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import few, kind_of, pairs
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, GENERATORS, build

from turret.adapters import Adapter, BaseInfo, attach, classify_logits, extract, mount
from turret.bases.fingerprints import fingerprint
from turret.bundles import read_bundle, save, save_bundle
from turret.errors import AdapterError, BundleError, WrongBase
from turret.methods import Full, Head, LoRA, Method, Prefix

METHODS: tuple[Method, ...] = (
    LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False),
    LoRA(r=2, lora_dropout=0.0, init_lora_weights="pissa", target_modules="all-linear"),
    Prefix(num_virtual_tokens=5, encoder_hidden_size=8),
    Head(),
    Full(),
)


def trained(family: str, method: Method, task: Any = "classify") -> tuple[Any, Adapter]:
    """An attached model with every trained number moved, and the Adapter read off it."""
    model = attach(build(family, task), method, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=generator) * 0.05)
    tensors, head, stored = extract(model)
    base = BaseInfo("small", "sha256:" + "ab" * 32, family)
    kind = {"kind": task, "labels": ["a", "b", "c"]}
    return model, Adapter(stored, tensors, head, base, kind, {"max_new_tokens": 9}, {"seed": 1})


@pytest.mark.parametrize(("family", "method"), pairs(list(FAMILIES), METHODS), ids=kind_of)
@torch.no_grad()
def test_what_was_saved_is_read_back_bit_for_bit_and_answers_the_same(
    family: str, method: Method, tmp_path: Path
) -> None:
    model, adapter = trained(family, method)
    manifest = save_bundle(adapter, tmp_path / "bundle")
    again = read_bundle(tmp_path / "bundle")
    everything = {**adapter.tensors, **adapter.head}
    back = {**again.tensors, **again.head}
    assert everything.keys() == back.keys()
    assert all(torch.equal(value, back[name]) for name, value in everything.items())
    assert (again.method, again.base, again.task) == (adapter.method, adapter.base, adapter.task)
    inputs = with_eos(model, rows())
    fresh = mount(build(family, "classify", seed=0), again)
    torch.testing.assert_close(classify_logits(fresh, inputs), classify_logits(model, inputs), atol=1e-5, rtol=1e-5)
    assert save_bundle(again, tmp_path / "twice")["digest"] == manifest["digest"]


@pytest.mark.parametrize("family", few(list(FAMILIES), 4))
@torch.no_grad()
def test_a_lora_bundle_loads_in_peft_and_gives_the_same_outputs(family: str, tmp_path: Path) -> None:
    for number, method in enumerate(METHODS[:2]):
        model, adapter = trained(family, method)
        save_bundle(adapter, tmp_path / str(number))
        theirs = peft.PeftModel.from_pretrained(build(family, "classify"), str(tmp_path / str(number))).eval()
        batch = padded(with_eos(model, rows()), model.config.pad_token_id)
        torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_peft_lora_folder_loads_here_and_gives_the_same_outputs(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=3,
        lora_alpha=6,
        init_lora_weights=False,
        use_rslora=True,
        target_modules=["Wqkv"] if family == "modernbert" else ["q_lin"] if family == "distilbert" else None,
        modules_to_save=["pre_classifier", "head", "classification_head"],
        fan_in_fan_out=family == "gpt2",
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build(family, "classify"), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    adapter = read_bundle(tmp_path / "peft")
    model = mount(build(family, "classify"), adapter)
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    torch.testing.assert_close(classify_logits(model, inputs), theirs(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_a_prefix_bundle_loads_in_peft(family: str, tmp_path: Path) -> None:
    model, adapter = trained(family, Prefix(num_virtual_tokens=5, encoder=False), "generate")
    save_bundle(adapter, tmp_path / "bundle")
    theirs = peft.PeftModel.from_pretrained(build(family, "generate"), str(tmp_path / "bundle")).eval()
    embeddings = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(embeddings, load_file(tmp_path / "bundle" / "adapter_model.safetensors")["prompt_embeddings"])
    if family in ("llama", "qwen3", "gpt2"):  # in one plain forward pass PEFT's prefix works, and must agree
        row = rows(1, (7,))[0][None]
        out = theirs(input_ids=row, attention_mask=torch.ones_like(row)).logits
        torch.testing.assert_close(out, model(input_ids=row).logits, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_peft_prefix_folder_loads_here(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("llama", "generate"), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    model = mount(build("llama", "generate"), read_bundle(tmp_path / "peft"))
    row = rows(1, (7,))[0][None]
    out = theirs(input_ids=row, attention_mask=torch.ones_like(row)).logits
    torch.testing.assert_close(model(input_ids=row).logits, out, atol=2e-5, rtol=2e-5)
    expected = own_target_logits(model, [row[0, :4]], [row[0, 4:]])
    torch.testing.assert_close(expected, out[0, 3:-1], atol=2e-5, rtol=2e-5)


@pytest.fixture(params=["read at once", "mapped, as a large file is"])
def bundle(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param != "read at once":
        monkeypatch.setattr("turret.bundles.bundle.AT_ONCE", 0)
    save_bundle(trained("bert", METHODS[0])[1], tmp_path / "bundle")
    return tmp_path / "bundle"


def refused(folder: Path, text: str) -> None:
    with pytest.raises(BundleError, match=text) as caught:
        read_bundle(folder)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_unread(bundle: Path) -> None:
    (bundle / "adapter_model.safetensors").rename(bundle / "adapter_model.bin")
    refused(bundle, r"adapter_model.bin is a pickle, which is never opened")


def test_both_ways_to_read_weights_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained("bert", METHODS[0])[1]
    odd = {"double": torch.randn(2, 3).double(), "half": torch.randn(5).half(), "brain": torch.randn(1).bfloat16()}
    save_bundle(replace(adapter, head={**adapter.head, **odd}), tmp_path / "bundle")
    at_once = read_bundle(tmp_path / "bundle")
    monkeypatch.setattr("turret.bundles.bundle.AT_ONCE", 0)
    mapped = read_bundle(tmp_path / "bundle")
    for one, other in ((at_once.tensors, mapped.tensors), (at_once.head, mapped.head)):
        assert {name: (each.dtype, each.tolist()) for name, each in one.items()} == {
            name: (each.dtype, each.tolist()) for name, each in other.items()
        }


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_flipped_bit_in_any_file_is_seen(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) * 2 // 3] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, ".")


def test_a_link_in_the_folder_is_not_followed(bundle: Path) -> None:
    (bundle / "adapter_config.json").rename(bundle.parent / "elsewhere.json")
    os.symlink(bundle.parent / "elsewhere.json", bundle / "adapter_config.json")
    refused(bundle, "is a link")


def test_a_newer_format_is_refused(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    refused(bundle, "format 2: this version reads up to 1")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"r": 0}, "unusable r"),
        ({"r": -1}, "unusable r"),
        ({"r": 10_000}, "unusable r"),
        ({"lora_alpha": 1e9}, "unusable lora_alpha"),
        ({"use_qalora": True}, "use_qalora to True"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern"),
        ({"auto_mapping": {"parent_library": "evil"}}, "auto_mapping"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    ],
)
def test_a_peft_folder_with_an_unusable_configuration_is_refused(
    bundle: Path, change: dict[str, Any], text: str
) -> None:
    (bundle / "manifest.json").unlink()
    config = json.loads((bundle / "adapter_config.json").read_text())
    (bundle / "adapter_config.json").write_text(json.dumps(config | change))
    refused(bundle, text)


def test_not_a_number_is_refused_at_reading_and_at_writing(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    tensors = load_file(bundle / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0] = torch.nan
    save_file(tensors, bundle / "adapter_model.safetensors")
    refused(bundle, "NaN or infinity")
    adapter = trained("bert", METHODS[0])[1]
    next(iter(adapter.tensors.values()))[0, 0] = torch.inf
    with pytest.raises(BundleError, match="diverged"):
        save_bundle(adapter, bundle.parent / "second")
    assert not (bundle.parent / "second").exists()
    assert not list(bundle.parent.glob(".second*"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), noise=st.binary(max_size=40), at=st.integers(0, 300))
def test_a_mangled_tensor_file_is_an_error_and_never_a_crash(bundle: Path, cut: int, noise: bytes, at: int) -> None:
    whole = save_once(bundle)
    mangled = whole[:at] + noise + whole[at + len(noise) : len(whole) - cut]
    path = bundle / "adapter_model.safetensors"
    path.write_bytes(mangled)
    (bundle / "manifest.json").unlink(missing_ok=True)
    with suppress(BundleError):
        read_bundle(bundle)


_whole: dict[Path, bytes] = {}


def save_once(bundle: Path) -> bytes:
    return _whole.setdefault(bundle, (bundle / "adapter_model.safetensors").read_bytes())


def test_a_header_that_promises_more_than_the_file_holds_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    for header in (
        b"\xff" * 8,
        (200 * 2**20).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
    ):
        (bundle / "adapter_model.safetensors").write_bytes(header)
        refused(bundle, "not a readable safetensors file")


def test_an_adapter_of_another_base_is_refused_by_its_fingerprint() -> None:
    _, adapter = trained("bert", METHODS[0])
    with pytest.raises(WrongBase, match="was trained on base sha256:abab"):
        mount(build("bert", "classify"), adapter, fingerprint="sha256:" + "cd" * 32)


def test_a_head_that_is_missing_or_does_not_fit_is_refused() -> None:
    _, adapter = trained("distilbert", METHODS[0])
    for head, text in (
        ({}, "has no head pre_classifier, classifier"),
        ({k: v for k, v in adapter.head.items() if k != "classifier.bias"}, "head classifier needs bias, weight"),
        ({**adapter.head, "pre_classifier.weight": torch.zeros(64, 5)}, "has shape"),
        ({**adapter.head, "odd.weight": torch.zeros(1)}, "belongs to no head"),
    ):
        broken = Adapter(adapter.method, adapter.tensors, head, adapter.base)
        with pytest.raises(AdapterError, match=text):
            mount(build("distilbert", "classify"), broken)


@torch.no_grad()
def test_a_head_may_have_another_number_of_labels_than_the_model_was_loaded_with(tmp_path: Path) -> None:
    model, adapter = trained("roberta", METHODS[0])
    wide = mount(build("roberta", "classify", num_labels=7), adapter)
    assert classify_logits(wide, rows()).shape == (4, 3)
    torch.testing.assert_close(classify_logits(wide, rows()), classify_logits(model, rows()), atol=1e-5, rtol=1e-5)


def test_a_folder_that_exists_is_not_overwritten(bundle: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        save_bundle(trained("bert", METHODS[0])[1], bundle)


@pytest.mark.parametrize(("family", "method"), pairs(["bert", "t5", "bart", "llama"], METHODS), ids=kind_of)
def test_save_keeps_the_fingerprint_of_the_base_below_whatever_is_attached(
    family: str, method: Method, tmp_path: Path
) -> None:
    expected = fingerprint(build(family, "classify"))
    model, _ = trained(family, method)
    assert save(model, tmp_path / "mine", base="small")["base"]["fingerprint"] == expected
    again = mount(build(family, "classify"), read_bundle(tmp_path / "mine"), fingerprint=expected)
    with torch.no_grad():
        inputs = with_eos(model, rows())
        torch.testing.assert_close(classify_logits(again, inputs), classify_logits(model, inputs), atol=1e-5, rtol=1e-5)
