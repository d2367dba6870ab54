"""A GGUF file is converted once to a folder of safetensors with the same weights, completely or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from small_models import build
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

from turret import bases
from turret.errors import BaseModelError

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 64, 2
TOKENS = [*sorted(ByteLevel.alphabet()), "he", "ll", "<|start|>", "<|end|>"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build("llama", "generate", vocab_size=len(TOKENS), hidden_size=HIDDEN, pad_token_id=None)


@pytest.fixture
def file(llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """Write the model as llama.cpp's converter does."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = llama.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    weights = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(LAYERS):
        for ours, theirs in NAMES.items():
            tensor = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                tensor = interleave(tensor, HEADS if theirs == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows for llama.cpp's rotary embedding: i and i + half are neighbours."""
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_a_gguf_file_loads_with_the_weights_it_was_made_from(file: Path, llama: LlamaForCausalLM, cache: Path) -> None:
    base = bases.load(str(file), task="generate", dtype="float32")
    assert base.family.name == "llama"
    assert base.fresh == ()
    assert base.folder.parent == cache
    assert base.revision is not None
    assert base.folder.name.endswith(base.revision.removeprefix("sha256:"))
    for name, tensor in llama.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    assert base.fingerprint == bases.fingerprint(llama)
    assert base.tokenizer.decode(base.tokenizer("hello there")["input_ids"]) == "hello there"
    assert base.tokenizer.eos_token == "<|end|>"
    assert not hasattr(base.model.config, "quantization_config")


def test_it_loads_as_a_classifier_of_the_same_base(file: Path) -> None:
    classifier = bases.load(str(file), task="classify", num_labels=2)
    assert classifier.fresh == ("score.weight",)
    assert classifier.fingerprint == bases.load(str(file), task="generate", verify=True).fingerprint


def test_it_is_converted_once(file: Path, cache: Path) -> None:
    folder = bases.load(str(file), task="generate").folder
    written = (folder / "model.safetensors").stat().st_mtime_ns
    elsewhere = file.rename(file.with_name("renamed.GGUF"))
    assert bases.load(str(elsewhere), task="generate").folder == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [folder.name]


def test_conversion_is_silent(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    bases.load(str(file), task="generate")
    assert capfd.readouterr() == ("", "")


def test_the_leftovers_of_a_killed_process_are_removed(file: Path, cache: Path) -> None:
    folder = bases.load(str(file), task="generate").folder
    folder.rename(cache / f".partial-{folder.name}-killed")
    assert bases.load(str(file), task="generate").folder == folder
    assert not list(cache.glob(".partial-*"))


@pytest.mark.slow
def test_two_processes_may_convert_at_once(file: Path, cache: Path) -> None:
    program = f"from turret import bases; print(bases.load({str(file)!r}, task='generate', verify=True).fingerprint)"
    children = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {child.communicate(timeout=120)[0] for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(outputs) == 1
    assert len([path for path in cache.iterdir() if path.suffix != ".lock"]) == 1


def test_a_file_that_is_not_gguf_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(b"PK\3\4 something else")
    with pytest.raises(BaseModelError, match="expected it to begin with 'GGUF'"):
        bases.load(str(path), task="generate")


@pytest.mark.parametrize("keep", [4, 40, 5000, -100])
def test_a_truncated_file_is_one_line_and_leaves_nothing(file: Path, cache: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BaseModelError, match="cannot be read as GGUF") as caught:
        bases.load(str(file), task="generate")
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "strange")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseModelError, match="strange"):
        bases.load(str(path), task="generate")


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="is not there: expected a GGUF file"):
        bases.load(str(tmp_path / "nowhere.gguf"), task="generate")


def test_a_cache_that_cannot_be_written_names_the_folder_and_the_setting(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BaseModelError, match="TURRET_CACHE"):
        bases.load(str(file), task="generate")
