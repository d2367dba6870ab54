"""An export can be imported again unchanged, loads in PEFT and transformers, and is complete or missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
import transformers
from exchange.foreign import (
    CONFIG,
    LABELS,
    MANIFEST,
    TEXTS,
    WEIGHTS,
    chances,
    contents,
    peft_folder,
)
from safetensors.torch import load_file
from small_disk import mounted_disk

import turret
from turret import adapters, bases, bundles
from turret.adapters import Adapter, lifecycle
from turret.bundles import gguf_lora
from turret.errors import AdapterError, Corrupt, NotFound, StoreError
from turret.methods import Full, Head, Prefix
from turret.workspace import Workspace
from turret.workspace.card import card

ADAPTER = {WEIGHTS, CONFIG, MANIFEST, "README.md", "tokenizer.json", "tokenizer_config.json"}

# --- there and back --------------------------------------------------------------------------------------------------


def test_an_imported_peft_folder_answers_as_peft_does(workspace: Workspace, foreign: Path, bert: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(small_models.build("bert", "classify"), str(foreign)).eval()
    tokenizer = small_models.tokenizer("bert")
    with torch.no_grad():
        for text in TEXTS:
            expected = theirs(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.softmax(-1)[0]
            torch.testing.assert_close(chances(workspace, "sentiment", text), expected, atol=1e-5, rtol=1e-5)
    (answer,) = workspace.predict("sentiment", TEXTS[:1])
    assert list(answer["probabilities"]) == LABELS
    shown = workspace.show("sentiment")["manifest"]
    assert shown["base"] == {
        "id": str(bert),
        "fingerprint": bases.load(str(bert), task="classify").fingerprint,
        "family": "bert",
        "revision": None,
    }
    assert (
        shown["lineage"]["imported"]["sha256"][WEIGHTS] == hashlib.sha256((foreign / WEIGHTS).read_bytes()).hexdigest()
    )


@pytest.mark.parametrize("name", ["sentiment", "writer", "prefix"])
def test_what_is_exported_comes_back_with_the_same_digest(name: str, workspace: Workspace, tmp_path: Path) -> None:
    out = workspace.export(name, tmp_path / "out")
    assert set(out.files) == ADAPTER
    again = Workspace(tmp_path / "elsewhere").import_adapter(tmp_path / "out", "other")
    assert again.digest == out.digest == workspace.resolve(name).digest
    assert not any("already" in note for note in again.notes)
    known = workspace.import_adapter(tmp_path / "out", name)
    assert known.version == out.version
    assert f"{out.version} has this content already: nothing new is stored" in known.notes


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_exporting_twice_gives_the_same_bytes(form: Any, workspace: Workspace, tmp_path: Path) -> None:
    for name in ("one", "two"):
        workspace.export("sentiment", tmp_path / name, form=form)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_card_is_no_part_of_the_digest(workspace: Workspace, bundle: Path, tmp_path: Path) -> None:
    (bundle / "README.md").write_text("# mine\n")
    again = Workspace(tmp_path / "store").import_adapter(bundle, "x")
    assert again.digest == workspace.resolve("sentiment").digest


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "family", "task"),
    [("sentiment", "bert", "classify"), ("writer", "llama", "generate"), ("prefix", "llama", "generate")],
)
def test_peft_loads_an_export_and_gives_the_same_outputs(
    name: str, family: str, task: Any, workspace: Workspace, tmp_path: Path
) -> None:
    workspace.export(name, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(small_models.build(family, task), str(tmp_path / "out")).eval()
    ours = adapters.mount(small_models.build(family, task), bundles.read_bundle(tmp_path / "out"))
    ids = torch.tensor([[5, 9, 30, 31, 32]])
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "task"), [("bert", "classify"), ("t5", "generate"), ("llama", "generate"), ("gpt2", "classify")]
)
def test_a_merged_model_loads_in_transformers_and_gives_the_same_outputs(
    family: str, task: Any, tmp_path: Path
) -> None:
    base = small_models.save_base(family, tmp_path / "base")
    workspace = Workspace(tmp_path / "store")
    labels = LABELS if task == "classify" else None
    workspace.import_adapter(peft_folder(family, task, tmp_path / "peft"), "x", base=str(base), labels=labels)
    before = contents(base)
    found = workspace.export("x", tmp_path / "merged", form="merged")
    assert contents(base) == before
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(found.files)
    if task == "classify":
        auto: Any = transformers.AutoModelForSequenceClassification
    else:
        auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    merged = auto.from_pretrained(tmp_path / "merged")
    if task == "classify":
        assert merged.config.id2label == dict(enumerate(LABELS))
    theirs = peft.PeftModel.from_pretrained(small_models.build(family, task), str(tmp_path / "peft")).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXTS[1], return_tensors="pt")
    batch: dict[str, Any] = {"input_ids": tokens["input_ids"]}
    if family == "t5":
        batch["decoder_input_ids"] = torch.tensor([[0, 7, 8]])
    torch.testing.assert_close(merged(**batch).logits, theirs(**batch).logits, atol=1e-4, rtol=1e-4)


def test_a_merged_model_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    base = small_models.save_base("llama", tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    workspace = Workspace(tmp_path / "store")
    workspace.import_adapter(peft_folder("llama", "generate", tmp_path / "peft"), "x", base=str(base))
    found = workspace.export("x", tmp_path / "merged", form="merged")
    assert "Its weights are bfloat16" in found.notes[0]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {each.dtype for each in merged.parameters()} == {torch.bfloat16}


def test_merging_makes_new_tensors_and_writes_to_none_of_the_base(
    workspace: Workspace, bundle: Path, bert: Path
) -> None:
    base = bases.load(str(bert), task="classify", num_labels=3, dtype="float32")
    before = {name: each.clone() for name, each in base.model.state_dict().items()}
    adapter = bundles.read_bundle(bundle)
    state = lifecycle.merged_state(base.model, adapter)
    assert all(torch.equal(each, before[name]) for name, each in base.model.state_dict().items())
    changed = {name for name, each in state.items() if not torch.equal(each, before[name])}
    layers = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight" for name in adapter.tensors}
    assert changed == layers | set(adapter.head)


@pytest.mark.parametrize("method", [Head(), Full(), Prefix(num_virtual_tokens=2, encoder_hidden_size=8)])
def test_every_method_of_ours_goes_out_and_comes_back(method: Any, bert: Path, tmp_path: Path) -> None:
    base = bases.load(str(bert), task="classify", num_labels=2, dtype="float32")
    model = adapters.attach(base.model, method, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for each in adapters.trainable_parameters(model).values():
            each.add_(torch.randn_like(each) * 0.05)
    task = {"kind": "classify", "labels": ["no", "yes"], "max_tokens": 32, "prefix_text": "", "multi_label": False}
    turret.save(model, tmp_path / "mine", base=str(bert), task={**task, "class_weights": None})
    workspace = Workspace(tmp_path / "store")
    first = workspace.import_adapter(tmp_path / "mine", "x")
    workspace.export("x", tmp_path / "out")
    assert workspace.import_adapter(tmp_path / "out", "y").digest == first.digest
    assert workspace.predict("x", TEXTS) == workspace.predict("y", TEXTS)
    if isinstance(method, Prefix):
        with pytest.raises(AdapterError, match=r"a prefix cannot be merged: .* export it without --merged"):
            workspace.export("x", tmp_path / "merged", form="merged")
        assert not (tmp_path / "merged").exists()
        return
    workspace.export("x", tmp_path / "merged", form="merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = small_models.tokenizer("bert")(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = merged(input_ids=ids).logits.softmax(-1)[0]
    torch.testing.assert_close(theirs, chances(workspace, "x", TEXTS[0]), atol=1e-4, rtol=1e-4)


# --- export: the folder ----------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone_unless_forced(workspace, tmp_path) -> None:
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty: expected a new folder; choose another one, or give --force"):
        workspace.export("sentiment", out)
    assert {path.name for path in out.iterdir()} == {".git", "notes.txt"}
    workspace.export("sentiment", out, form="merged", force=True)
    assert (out / "config.json").exists()
    workspace.export("sentiment", out, force=True)  # what another form had written would be loaded in its place
    assert {path.name for path in out.iterdir()} == {".git", "notes.txt", *ADAPTER}
    assert (out / "notes.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".turret")]


def test_an_empty_folder_is_filled_and_a_file_or_a_link_is_not(workspace, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert workspace.export("sentiment", tmp_path / "empty").folder == str(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("file", "link"):
        with pytest.raises(StoreError, match=f"{name} is a {name}"):
            workspace.export("sentiment", tmp_path / name, force=True)


def test_what_is_not_there_or_does_not_fit_leaves_nothing(workspace, tmp_path) -> None:
    with pytest.raises(NotFound):
        workspace.export("nobody", tmp_path / "deep" / "out")
    for name, form in (("prefix", "merged"), ("sentiment", "vllm")):
        with pytest.raises(AdapterError):
            workspace.export(name, tmp_path / "out", form=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_full_disk_leaves_nothing_half_written(form, workspace, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "size=12k") as disk:
        with pytest.raises(
            StoreError, match=r"cannot write .*out: .*(No space left|os error 28).*the folder does not exist$"
        ):
            workspace.export("sentiment", disk / "out", form=form)
        assert list(disk.iterdir()) == []


def test_a_disk_that_is_mounted_as_the_folder_is_filled(workspace, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "size=1m") as disk:
        workspace.export("sentiment", disk)
        assert {path.name for path in disk.iterdir()} == ADAPTER


def test_a_damaged_version_is_never_exported(workspace, tmp_path) -> None:
    shutil.copytree(workspace.store.root, tmp_path / "store")
    spoilt = Workspace(tmp_path / "store")
    path = spoilt.store.files("sentiment")[WEIGHTS]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for form in ("peft", "merged"):
        with pytest.raises(Corrupt):
            spoilt.export("sentiment", tmp_path / "out", form=form)
    assert {each.name for each in tmp_path.iterdir()} == {"store"}


# --- export: for vLLM ------------------------------------------------------------------------------------------------


def test_a_lora_on_a_decoder_goes_to_vllm_with_the_rank_to_start_it_with(workspace, tmp_path) -> None:
    found = workspace.export("writer", tmp_path / "out", form="vllm")
    assert "--max-lora-rank 8" in found.notes[0]
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    # What vLLM's PEFTHelper reads: three keys it needs, and four that must be off.
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int)
    assert all(name.endswith(("q_proj", "v_proj")) for name in config["target_modules"])
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert not any(config.get(key) for key in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern"))
    names = load_file(tmp_path / "out" / WEIGHTS)
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    assert workspace.import_adapter(tmp_path / "out", "writer").digest == found.digest


@pytest.mark.parametrize(
    ("family", "task", "changes", "text"),
    [
        ("gpt2", "generate", {}, "this base is a gpt2"),
        ("t5", "generate", {}, "this base is a t5"),
        ("llama", "classify", {}, "no adapter with a head"),
        ("llama", "generate", {"r": 600}, "ranks up to 512, and this one has 600"),
    ],
)
def test_what_vllm_does_not_take_is_refused(family, task, changes, text, tmp_path) -> None:
    peft_folder(family, task, tmp_path / "peft", **changes)
    adapter = bundles.read_bundle(tmp_path / "peft")
    with pytest.raises(AdapterError, match=text) as caught:
        gguf_lora.max_lora_rank(replace(adapter, base=replace(adapter.base, family=family)))
    assert "\n" not in str(caught.value)


def test_a_layer_outside_the_blocks_does_not_go_to_vllm(bundle_of_writer: Adapter) -> None:
    tensors = {
        name.replace("model.layers.0.self_attn.q_proj", "lm_head"): each
        for name, each in bundle_of_writer.tensors.items()
    }
    with pytest.raises(AdapterError, match="the linear layers of a decoder's blocks, not on lm_head: use --merged"):
        gguf_lora.max_lora_rank(replace(bundle_of_writer, tensors=tensors))


def test_a_prefix_does_not_go_to_vllm(workspace, tmp_path) -> None:
    with pytest.raises(AdapterError, match="vLLM serves only LoRA, and this is a prefix"):
        workspace.export("prefix", tmp_path / "out", form="vllm")


# --- the card --------------------------------------------------------------------------------------------------------


def shown(**changes: Any) -> dict[str, Any]:
    manifest = {
        "base": {"id": "google/bert", "fingerprint": "sha256:" + "ab" * 32, "revision": "0" * 40},
        "method": {"kind": "lora", "r": 8},
        "task": {"kind": "classify", "labels": ["a", "b"]},
        "lineage": {"data": "sha256:" + "cd" * 32},
    }
    report = {"a": {"support": 30}, "b": {"support": 12}}
    metrics = {"test": {"accuracy": 0.9523, "loss": 0.18, "per_class": report}}
    return {"version": "news@3", "digest": "sha256:ef", "metrics": metrics, "manifest": manifest | changes}


def test_the_card_states_what_is_known() -> None:
    text = card(shown(), "apache-2.0", "peft", "SEQ_CLS", [])
    for said in (
        'base_model: "google/bert"',
        "| base fingerprint | `sha256:abab",
        "| data digest | `sha256:cdcd",
        "| licence of the base | `apache-2.0` |",
        "| method | `lora r=8` |",
        "| `test` | 42 | accuracy | 0.9523 |",
        "turret import FOLDER --name news",
        "    'google/bert',\n    id2label=dict(enumerate(labels)),",
        "labels = ['a', 'b']",
    ):
        assert said in text
    folder = card(shown(base={"id": "bert", "revision": None}), None, "peft", "SEQ_CLS", [])  # a folder in sight
    assert "base_model" not in folder
    assert "(BASE is a folder or a Hub id that has the weights of `bert`.)" in folder
    for task_type, said in (
        ("SEQ_CLS", "does not run a prefix"),
        ("SEQ_2_SEQ_LM", "gives other outputs"),
        (None, "PEFT"),
    ):
        text = card(shown(method={"kind": "prefix"}), None, "peft", task_type, [])
        assert said in text
        assert "from peft" not in text
    assert "unknown: the base's files state none" in card(shown(), None, "peft", "SEQ_CLS", [])


def test_the_code_of_a_card_keeps_the_base_in_the_4_bits_that_it_was_trained_in() -> None:
    base = {"id": "google/bert", "revision": "0" * 40, "quantization": "nf4"}
    for task in ({"kind": "classify", "labels": ["a", "b"]}, {"kind": "generate"}):
        text = card(shown(base=base, task=task), None, "peft", "SEQ_CLS", [])
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert "four_bits = BitsAndBytesConfig(load_in_4bit=True" in code
        assert "quantization_config=four_bits" in code
    assert "four_bits" not in card(shown(), None, "peft", "SEQ_CLS", [])


def test_words_from_outside_stay_words_on_the_card() -> None:
    nasty = "`</code><script>|\n# Title\n```[x](javascript:1)"
    text = card(shown(base={"id": nasty}, task={"kind": "classify", "labels": [nasty]}), None, "peft", "SEQ_CLS", [])
    assert "\n# Title" not in text
    for line in text.splitlines():
        outside_code = "".join(line.split("`")[::2]) if line.startswith("|") else ""
        assert "<script>" not in outside_code
