"""A fingerprint depends on every weight of the body and on nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import DECODERS, FAMILIES, GENERATORS, build, save_base

from turret import bases
from turret.disk import cache_folder


@pytest.mark.parametrize("family", GENERATORS)
def test_a_classifier_and_a_generator_of_one_base_have_the_same_fingerprint(family: str, tmp_path: Path) -> None:
    folder = str(save_base(family, tmp_path))
    one = bases.load(folder, task="classify", num_labels=3, verify=True)
    two = bases.load(folder, task="generate", verify=True)
    assert one.fingerprint == two.fingerprint
    assert re.fullmatch("sha256:[0-9a-f]{64}", one.fingerprint)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dtype_it_is_cast_to_the_seed_and_the_labels_do_not_change_it(family: str, tmp_path: Path) -> None:
    folder = str(save_base(family, tmp_path))
    loads = [
        bases.load(folder, task="classify", num_labels=labels, dtype=dtype, seed=labels, verify=True)
        for dtype, labels in (("float32", 2), ("bfloat16", 5))
    ]
    assert loads[0].fingerprint == loads[1].fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bit_of_any_weight_of_the_body_changes_it(family: str) -> None:
    model = build(family, "classify")
    before = bases.fingerprint(model)
    for name, parameter in model.base_model.named_parameters():
        if "pooler" in name:
            continue
        flat = parameter.data.view(-1)
        kept = flat[0].clone()
        flat[0] = torch.nextafter(kept, torch.tensor(torch.inf))
        assert bases.fingerprint(model) != before, name
        flat[0] = kept
    assert bases.fingerprint(model) == before


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "llama"])
def test_the_head_and_the_pooler_do_not_change_it(family: str) -> None:
    model = build(family, "classify")
    before = bases.fingerprint(model)
    body = dict(model.base_model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if all(parameter is not each for each in body.values()) or "pooler" in name:
                parameter.add_(1)
    assert bases.fingerprint(model) == before


def test_an_untied_language_model_head_does_not_change_it() -> None:
    model = build("llama", "generate")
    before = bases.fingerprint(model)
    model.lm_head.weight.data.add_(1)
    assert bases.fingerprint(model) == before


@pytest.mark.parametrize("family", DECODERS)
def test_two_bases_of_one_shape_differ(family: str) -> None:
    assert bases.fingerprint(build(family, "body", seed=0)) != bases.fingerprint(build(family, "body", seed=1))


def test_the_dtype_of_the_checkpoint_changes_it(tmp_path: Path) -> None:
    full = bases.load(str(save_base("llama", tmp_path / "full")), task="generate")
    folder = tmp_path / "half"
    build("llama", "generate").bfloat16().save_pretrained(folder)
    full.tokenizer.save_pretrained(folder)
    half = bases.load(str(folder), task="generate", dtype="float32", verify=True)
    assert half.fingerprint != full.fingerprint
    assert half.fingerprint == bases.load(str(folder), task="classify", dtype="bfloat16", verify=True).fingerprint


def test_it_is_cached_for_files_that_did_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path / "cache"))
    folder = str(save_base("bert", tmp_path / "bert"))
    true = bases.load(folder, task="classify").fingerprint
    (record,) = (cache_folder() / "fingerprints").iterdir()
    record.write_text(record.read_text().replace(true, "sha256:" + "0" * 64))
    assert bases.load(folder, task="classify").fingerprint == "sha256:" + "0" * 64
    assert bases.load(folder, task="classify", verify=True).fingerprint == true
    assert bases.load(folder, task="classify").fingerprint == true  # verifying repairs the cache


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": 3}', '{"fingerprint": "md5:1"}'])
def test_a_broken_record_in_the_cache_is_ignored(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path / "cache"))
    folder = str(save_base("bert", tmp_path / "bert"))
    true = bases.load(folder, task="classify").fingerprint
    (record,) = (cache_folder() / "fingerprints").iterdir()
    record.write_text(text)
    assert bases.load(folder, task="classify").fingerprint == true


def test_weights_replaced_under_the_same_name_size_and_time_are_seen(tmp_path: Path) -> None:
    folder = save_base("bert", tmp_path)
    weights = folder / "model.safetensors"
    first, times = bases.load(str(folder), task="classify").fingerprint, weights.stat()
    tensors = load_file(weights)
    tensors["embeddings.word_embeddings.weight"][5, 5] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_size == times.st_size
    assert bases.load(str(folder), task="classify").fingerprint != first
