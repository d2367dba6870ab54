"""A folder or bundle that is wrong, does not fit or contains more than tensors is refused with one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
from exchange.foreign import (
    CONFIG,
    LABELS,
    MANIFEST,
    WEIGHTS,
    change_config,
    refused,
)
from safetensors.torch import load_file, save_file
from small_disk import mounted_disk

from turret.bundles.bundle import manifest_digest
from turret.cli.main import run
from turret.manifest import CODE, NEUTRAL, REDUNDANT, check_config
from turret.workspace import Workspace

# --- refused: the configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 0}, "unusable r"),
        ({"r": -4}, "unusable r"),
        ({"r": 10_000}, "unusable r"),
        ({"r": 4}, "expected (4, 64)"),
        ({"r": [3]}, "unusable r"),
        ({"lora_alpha": 1e30}, "unusable lora_alpha"),
        ({"lora_alpha": -6}, "unusable lora_alpha"),
        ({"lora_dropout": 7}, "unusable lora_dropout"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map, which names code"),
        ({"auto_mapping": {"parent_library": "evil"}}, "auto_mapping, which names code"),
        ({"trust_remote_code": True}, "unknown key 'trust_remote_code'"),
        ({"tokenizer_name_or_path": "evil/tokenizer"}, "unknown key 'tokenizer_name_or_path'"),
        ({"a" * 10_000: 1}, "unknown key 'aaa"),
        ({"init_lora_weights": "pissa"}, "which changes the base's weights"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"rank_pattern": {"query": 2}}, "PEFT does not read this adapter"),
        ({"peft_type": "IA3"}, "unknown key 'method.bias': IA3 knows"),
        ({"peft_type": ["LORA"]}, "peft_type ['LORA']"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes, text, folder, bert, tmp_path, capsys) -> None:
    change_config(folder, **changes)
    assert text in refused(capsys, tmp_path / "store", folder, "--base", str(bert), "--labels", "a,b,c")


def test_every_option_that_peft_writes_is_known() -> None:
    known = {*REDUNDANT, *NEUTRAL, *CODE}
    for config in (peft.LoraConfig(r=4), peft.PrefixTuningConfig(num_virtual_tokens=4)):
        assert set(config.to_dict()) <= known
        check_config(config.to_dict())


def test_an_empty_option_of_a_newer_peft_is_no_reason_to_refuse(folder, bert, tmp_path) -> None:
    change_config(folder, brand_new_config=None, use_brand_new=False)
    Workspace(tmp_path / "store").import_adapter(folder, "x", base=str(bert), labels=LABELS)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": NaN}', "[" * 100_000, "\ufeff\0", '{"r": 1e9999}'])
def test_a_configuration_that_is_no_json_object_is_refused(text, folder, bert, tmp_path, capsys) -> None:
    (folder / CONFIG).write_text(text)
    refused(capsys, tmp_path / "store", folder, "--base", str(bert), "--labels", "a,b,c")


def test_a_configuration_that_names_another_base_loses_to_what_the_weights_are(folder, llama, tmp_path, capsys) -> None:
    change_config(folder, base_model_name_or_path=str(llama))
    said = refused(capsys, tmp_path / "store", folder, "--labels", "a,b,c")
    assert "neither the adapter nor the checkpoint" in said or "has no layer" in said
    change_config(folder, base_model_name_or_path="../../nowhere")
    assert "is not there" in refused(capsys, tmp_path / "store", folder, "--labels", "a,b,c")
    change_config(folder, base_model_name_or_path=None)
    assert "names no base: give --base" in refused(capsys, tmp_path / "store", folder, "--labels", "a,b,c")


# --- refused: the tensors --------------------------------------------------------------------------------------------

LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def spoil(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: value})


def silence(tensors: dict[str, torch.Tensor]) -> None:
    for name, each in tensors.items():
        if "lora_B" in name:
            each.zero_()


def only_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora" in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (spoil(f"{LAYER}.lora_A.weight", float("nan")), "holds NaN or infinity"),
        (spoil(f"{LAYER}.lora_B.weight", float("inf")), "holds NaN or infinity"),
        (spoil("base_model.model.classifier.weight", float("-inf")), "holds NaN or infinity"),
        (put(f"{LAYER}.lora_A.weight", torch.full((3, 64), 1e200, dtype=torch.float64)), "holds NaN or infinity"),
        (put(f"{LAYER}.lora_A.weight", torch.full((3, 64), 1e38)), "not finite"),
        (put(f"{LAYER}.lora_A.weight", torch.ones(3, 64, dtype=torch.int8)), "has dtype I8"),
        (put(f"{LAYER}.lora_A.weight", torch.ones(3, 64).to(torch.float8_e4m3fn)), "has dtype F8_E4M3"),
        (put(f"{LAYER}.lora_A.weight", torch.ones(3, 65)), "has shapes (3, 65)"),
        (put(f"{LAYER}.lora_B.weight", torch.ones(32, 3)), "has shapes"),
        (put(f"{LAYER}.lora_B.weight", torch.ones(192)), "has shapes"),
        (rename(f"{LAYER}.lora_A.weight", f"{LAYER}.lora_C.weight"), "is not a LoRA factor"),
        (lambda tensors: tensors.pop(f"{LAYER}.lora_A.weight"), "needs lora_A and lora_B, given only lora_B"),
        (lambda tensors: tensors.pop(f"{LAYER}.lora_B.weight"), "needs lora_A and lora_B, given only lora_A"),
        (put("base_model.model.bert.nowhere.lora_A.weight", torch.ones(3, 64)), "has no layer 'bert.nowhere'"),
        (put("base_model.model.lora_A.weight", torch.ones(3, 64)), "needs lora_A and lora_B"),
        (
            put("base_model.model.bert.encoder.layer.0.output.dense.weight", torch.ones(64, 96)),
            "but no other module",
        ),
        (put("base_model.model.bert.embeddings.LayerNorm.weight", torch.ones(63)), "it belongs to another base"),
        (put("base_model.model.bert.embeddings.LayerNorm.gain", torch.ones(64)), "has no 'gain'"),
        (put("base_model.model.bert.nothing.weight", torch.ones(64)), "has no module 'bert.nothing'"),
        (put("something.else", torch.ones(2)), "belongs neither to the method lora nor to a head"),
        (put("a" * 10_000, torch.ones(2)), "names a tensor aaaa"),
        (put("base_model.model.\n\x1b[31m", torch.ones(2)), "names a tensor base_model.model.\\n"),
        (only_head, "without factors"),
        (silence, "outputs equal the bare base"),
        (put("base_model.model.classifier.bias", torch.ones(2)), "cannot be used on"),
        (put("base_model.model.classifier.weight", torch.ones(3, 63)), "has shape (3, 63)"),
        (lambda tensors: tensors.pop("base_model.model.classifier.bias"), "classifier.bias is missing"),
        (
            lambda t: [t.pop(f"base_model.model.classifier.{k}") for k in ("bias", "weight")],
            "classifier.bias is missing",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, text, folder, bert, tmp_path, capsys) -> None:
    change_tensors(folder, change)
    said = refused(capsys, tmp_path / "store", folder, "--base", str(bert), "--labels", "a,b,c")
    assert text in said


def test_an_adapter_of_another_architecture_or_size_is_refused(foreign, llama, tmp_path, capsys) -> None:
    refused(capsys, tmp_path / "store", foreign, "--base", str(llama), "--labels", "a,b,c")
    narrow = small_models.save_base("bert", tmp_path / "narrow", hidden_size=32)
    said = refused(capsys, tmp_path / "store", foreign, "--base", str(narrow), "--labels", "a,b,c")
    assert "has shape" in said


def raw(header: dict[str, Any] | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(words) if size is None else size).to_bytes(8, "little") + words + data


def entry(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        raw({"a": entry(0, 4)}, b"\0\0"),
        raw({"a": entry(0, 4)}, size=10_000),
        raw(b"{}", size=2**63),
        raw(b"{}", size=100_000_000),
        raw(b" " * (17 * 2**20)),
        raw({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
        raw({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
        raw({"a": entry(4, 8)}, bytes(8)),
        raw({"a": entry(0, 2**64)}, bytes(4)),
        raw({"a": entry(-4, 0)}, bytes(4)),
        raw({"a": entry(0, 4, shape=(2**40, 2**40))}, bytes(4)),
        raw({"a": entry(0, 4, shape=(2,))}, bytes(4)),
        raw({"a": entry(0, 4, dtype="F31")}, bytes(4)),
        raw({"a": entry(0, 4), "__metadata__": {"x": 1}}, bytes(4)),
        raw(b"[" * 100_000),
    ],
    ids=lambda content: f"{len(content)}-{hashlib.sha256(content).hexdigest()[:6]}",
)
def test_a_safetensors_file_that_lies_is_refused(content, folder, bert, tmp_path, capsys) -> None:
    (folder / WEIGHTS).write_bytes(content)
    said = refused(capsys, tmp_path / "store", folder, "--base", str(bert), "--labels", "a,b,c")
    assert "not a readable safetensors file" in said


def test_a_file_of_more_tensors_than_any_adapter_has_is_refused(folder, bert, tmp_path, capsys) -> None:
    content = raw({f"t{i}": entry(4 * i, 4 * i + 4) for i in range(100_000)}, bytes(400_000))
    (folder / WEIGHTS).write_bytes(content)
    said = refused(capsys, tmp_path / "store", folder, "--base", str(bert), "--labels", "a,b,c")
    assert "tensors: the limit is 20000" in said


def test_a_file_cut_at_any_point_is_refused(folder, bert, tmp_path, capsys) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        refused(capsys, tmp_path / "store", folder, "--base", str(bert), "--labels", "a,b,c")


# --- refused: the files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl", "ADAPTER_MODEL.BIN"])
def test_a_pickle_in_place_of_safetensors_is_refused_unread(name, folder, tmp_path, capsys) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert f"{name} is a pickle, which is never opened" in refused(capsys, tmp_path / "store", folder)
    assert f"{name}' is a pickle" in refused(capsys, tmp_path / "store", folder / name)


def test_a_pickle_beside_safetensors_is_not_taken_along(folder, bert, tmp_path) -> None:
    (folder / "training_args.bin").write_bytes(b"a pickle")
    workspace = Workspace(tmp_path / "store")
    workspace.import_adapter(folder, "x", base=str(bert), labels=LABELS)
    assert set(workspace.show("x")["files"]) == {WEIGHTS, CONFIG, MANIFEST}


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_link_in_a_folder_is_refused(make, name, folder, tmp_path, capsys) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    make(tmp_path / "elsewhere", folder / name)
    assert "link" in refused(capsys, tmp_path / "store", folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_device_or_a_pipe_in_a_folder_is_refused_unread(name, folder, tmp_path, capsys) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "is not a plain file" in refused(capsys, tmp_path / "store", folder)


def test_a_case_clash_in_a_folder_is_refused(folder, tmp_path, capsys) -> None:
    (folder / "Adapter_Config.json").write_text("{}")
    assert "in lower case" in refused(capsys, tmp_path / "store", folder)


@pytest.mark.parametrize(
    "source",
    ["", " ", "/nowhere", "../../nowhere", "owner/../x", "a\\b", "%2e%2e/x", "-x/y", "a" * 10_000, "оwner/name"],
)
def test_a_source_that_is_not_there_is_one_line(source, tmp_path, capsys) -> None:
    said = run(["import", "--name", "x", "--store", str(tmp_path / "store"), "--", source])
    assert said == 1
    err = capsys.readouterr().err
    assert "is not there: expected a folder" in err
    assert err.count("\n") == 1


def test_a_source_with_a_nul_is_one_line(tmp_path, capsys) -> None:
    assert run(["import", "--name", "x", "--store", str(tmp_path / "store"), "--", "\0"]) == 2
    err = capsys.readouterr().err
    assert "no path has the character NUL" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a\\b", "%2e%2e", "a\0b", "a" * 10_000, "sentimеnt", "-x", "A", "a..b", "", "x@1", "a/b"],
)
def test_a_name_that_could_mean_more_is_refused_before_anything_is_read(name, foreign, tmp_path, capsys) -> None:
    status = run(["import", str(foreign), f"--name={name}", "--store", str(tmp_path / "store")])
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1)
    assert "bad adapter name" in err
    assert not (tmp_path / "store").exists()


# --- refused: a bundle that was meddled with -------------------------------------------------------------------------


def resealed(bundle: Path, **changes: Any) -> None:
    """Change the manifest and its digests, as an attacker who can change files could."""
    manifest = json.loads((bundle / MANIFEST).read_text()) | changes
    for name in (CONFIG, WEIGHTS):
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["digest"] = manifest_digest(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def manifest_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / MANIFEST).read_text())


def test_a_bundle_of_another_base_is_refused_by_the_fingerprint(bundle, tmp_path, capsys) -> None:
    other = small_models.save_base("bert", tmp_path / "other", seed=1)
    assert "was trained on base sha256:" in refused(capsys, tmp_path / "store", bundle, "--base", str(other))


def test_a_base_that_changed_under_its_name_is_refused(bundle, bert, tmp_path, capsys) -> None:
    moved = tmp_path / "base"
    shutil.copytree(bert, moved)
    resealed(bundle, base={**manifest_of(bundle)["base"], "id": str(moved)})
    shutil.rmtree(moved)
    small_models.save_base("bert", moved, seed=1)
    assert "load that base, or retrain" in refused(capsys, tmp_path / "store", bundle)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, MANIFEST])
def test_a_flipped_bit_in_a_bundle_is_refused(name, bundle, tmp_path, capsys) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    refused(capsys, tmp_path / "store", bundle)


@pytest.mark.parametrize(
    ("key", "change", "text"),
    [
        ("method", {"r": 10_000}, "unusable method"),
        ("method", {"lora_alpha": 12.0}, "disagree on lora_alpha"),
        ("method", {"code": "x"}, "unusable method"),
        ("task", {"labels": ["a", "b"]}, "3 outputs, and the bundle names 2 labels"),
        ("task", {"labels": ["a", "a", "b"]}, "classes must be different"),
        ("task", {"labels": "abc"}, "not a list of names"),
        ("task", {"labels": [1, 2, 3]}, "not a list of names"),
        ("task", {"max_tokens": 10**12}, "task is invalid"),
        ("task", {"max_tokens": "many"}, "task is invalid"),
        ("task", {"kind": "shell"}, "is not known: expected chat, classify"),
        ("task", {"surprise": 1}, "cannot be read"),
        ("task", {"family_kind": "decoder"}, "is for another kind of base, 'decoder'"),
        ("base", {"id": 7}, "unusable base.id"),
        ("base", {"id": "a" * 10_000}, "unusable base.id"),
        ("base", {"id": "\x1b[31mbert"}, "unusable base.id"),
        ("base", {"fingerprint": ["x"]}, "unusable base.fingerprint"),
    ],
)
def test_a_bundle_that_says_nonsense_and_seals_it_is_refused(key, change, text, bundle, tmp_path, capsys) -> None:
    resealed(bundle, **{key: {**manifest_of(bundle)[key], **change}})
    assert text in refused(capsys, tmp_path / "store", bundle)


@pytest.mark.parametrize("value", [2, 0, -1, True, "1", None, 1e999])
def test_a_manifest_of_another_format_is_refused(value, bundle, tmp_path, capsys) -> None:
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace('"format": 1', f'"format": {json.dumps(value)}'))
    assert "format" in refused(capsys, tmp_path / "store", bundle) or value == 1e999


def test_an_error_never_moves_the_cursor(folder, bert, tmp_path, capsys) -> None:
    change_config(folder, base_model_name_or_path="\x1b[2J\x07nowhere")
    assert refused(capsys, tmp_path / "store", folder, "--labels", "a,b,c")[:-1].isprintable()


@pytest.mark.parametrize("key", ["task", "generation", "base", "lineage"])
def test_a_manifest_with_another_shape_is_refused(key, bundle, tmp_path, capsys) -> None:
    resealed(bundle, **{key: [1]})
    assert f"must have an object as {key}" in refused(capsys, tmp_path / "store", bundle)


@pytest.mark.parametrize("value", ['{"x": 1e9999}', '{"x": "\\ud800"}', '{"x": NaN}'])
def test_a_manifest_that_is_json_only_for_python_is_refused(value, bundle, tmp_path, capsys) -> None:
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace('"generation": {}', f'"generation": {value}'))
    assert "JSON" in refused(capsys, tmp_path / "store", bundle)


def test_a_bundle_whose_configuration_carries_code_is_refused(bundle, tmp_path, capsys) -> None:
    change_config(bundle, auto_map={"AutoModel": "evil.Model"})
    resealed(bundle)
    assert "turret runs no code from outside" in refused(capsys, tmp_path / "store", bundle)


def test_a_disk_without_room_for_the_copy_is_one_line(foreign, bert, tmp_path, capsys) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "size=4k") as disk:
        said = refused(capsys, disk / "store", foreign, "--base", str(bert), "--labels", "a,b,c")
        for part in ("cannot be copied into", "space left on", "free some space there"):
            assert part in said  # the line is cut between them where the folder's name is long
        assert list(disk.iterdir()) == []


def test_a_base_that_is_not_here_says_how_to_name_it(bundle, tmp_path, capsys) -> None:
    resealed(bundle, base={**manifest_of(bundle)["base"], "id": "/home/stranger/bert"})
    assert "or give the adapter's base with --base" in refused(capsys, tmp_path / "store", bundle)
