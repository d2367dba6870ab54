"""Write a LoRA as a GGUF file, which llama.cpp puts on a GGUF file of the same base.

For every layer there are two float32 tensors, `<name>.weight.lora_a` (R, D_in) and `<name>.weight.lora_b` (D_out, R),
where the name is llama.cpp's, such as `blk.0.attn_q`. llama.cpp computes `W x + (alpha / R) B A x`. The keys are
`general.type = adapter`, `general.architecture`, `adapter.type = lora` and `adapter.lora.alpha`.

Source: llama.cpp's `convert_lora_to_gguf.py` (names, keys) and `conversion` of Llama (order of the rows of q and k).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turret.adapters.adapter import LORA_PREFIX, Adapter
from turret.adapters.tuners.lora import lora_pairs
from turret.bases.source import ModelFile
from turret.errors import AdapterError
from turret.families import FAMILIES, Family
from turret.tasks import stored_task

# --- vllm -------------------------------------------------------------------------------------------------------------
# Which adapters vLLM serves, according to its documentation.
#
# - `vllm.lora.peft_helper.PEFTHelper` (docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/): a LoRA by `r`,
#   `lora_alpha`, `target_modules` and `use_rslora`; `bias` is "none", `modules_to_save` is None, no DoRA; one rank for
#   all layers.
# - `vllm.config.lora` (docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/): `max_lora_rank` is one of `RANKS`; adapters of
#   a larger rank are refused.
# - `vllm.lora.lora_model.LoRAModel`: tensors are called `base_model.model.<layer>.lora_A.weight`, and every layer is a
#   linear layer of the model.
# - the LoRA column of the supported models (docs.vllm.ai/en/v0.6.1/models/supported_models.html): Llama, Mistral and
#   the Qwens have it, GPT-2 has not; encoders and encoder-decoders do not generate there.


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_LAYER = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)", re.ASCII)


def _classifies(adapter: Adapter) -> bool:
    """Whether a head answers."""
    return bool(adapter.head) or not stored_task(adapter.task).generates


def max_lora_rank(adapter: Adapter) -> int:
    """The smallest `--max-lora-rank` that fits the adapter. Raises AdapterError if vLLM does not serve it."""
    method, family = adapter.method, adapter.base.family
    if (r := method.vllm_rank) is None:
        raise AdapterError(f"vLLM serves only LoRA, and this is a {method.kind}: export it without --vllm")
    if _classifies(adapter):
        raise AdapterError(
            "vLLM serves no adapter with a head (modules_to_save), and this one classifies: use --merged"
        )
    served = [name for name, each in FAMILIES.items() if each.vllm_lora]
    if family not in served:
        raise AdapterError(f"vLLM serves LoRA on {', '.join(served)}, and this base is a {family}: use --merged")
    if r > RANKS[-1]:
        raise AdapterError(f"vLLM serves ranks up to {RANKS[-1]}, and this one has {r}: use --merged")
    for name in adapter.tensors:
        path = name.removeprefix(LORA_PREFIX).rsplit(".lora_", 1)[0]
        if not _VLLM_LAYER.fullmatch(path):
            raise AdapterError(
                f"vLLM serves LoRA on the linear layers of a decoder's blocks, not on {path}: use --merged"
            )
    return next(rank for rank in RANKS if rank >= r)


# --- gguf lora --------------------------------------------------------------------------------------------------------


FILE = "adapter.gguf"
_LAYER = re.compile(r"model\.layers\.(\d+)\.[\w.]+", re.ASCII)

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]  # A (R, D_in), B (D_out, R)


def require_llama_cpp(adapter: Adapter) -> Family:
    """The family of the adapter's base. Raises AdapterError if llama.cpp cannot run the adapter."""
    family = FAMILIES.get(adapter.base.family or "")
    if adapter.method.gguf_alpha is None:
        raise AdapterError(f"llama.cpp runs only LoRA, and this is a {adapter.method.kind}: export it without --gguf")
    if _classifies(adapter):
        raise AdapterError("llama.cpp runs no adapter with a head, and this one classifies: export it without --gguf")
    if family is None or family.gguf is None:
        known = [name for name, each in FAMILIES.items() if each.gguf]
        raise AdapterError(
            f"a GGUF file is written for LoRA on {', '.join(known)}, and this base is a {adapter.base.family}: "
            "use --merged and llama.cpp's own converter"
        )
    return family


def write(adapter: Adapter, config: ModelFile, path: Path, name: str) -> int:
    """Write `adapter` to `path`.

    Args:
        config: the base's config.json, for the numbers of layers and heads.
        name: of the adapter, for `general.name`.

    Returns:
        The number of layers that it changes.

    Raises:
        AdapterError: llama.cpp has no such layer, or cannot run the adapter.
    """
    import gguf

    family = require_llama_cpp(adapter)
    architecture = next(key for key, each in gguf.MODEL_ARCH_NAMES.items() if each == family.gguf)
    names = gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(path, family.gguf)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.method.gguf_alpha)
    layers = factors(adapter)
    for layer, (A, B) in layers.items():
        known = names.get_name(layer) if _LAYER.fullmatch(layer) else None
        if known is None:
            raise AdapterError(f"llama.cpp has no LoRA on {layer}: use --merged and llama.cpp's own converter")
        if layer.rpartition(".")[2] in family.gguf_rotary:
            B = reorder_rows(B, _heads(config, layer))
        writer.add_tensor(f"{known}.weight.lora_a", np.ascontiguousarray(A))
        writer.add_tensor(f"{known}.weight.lora_b", np.ascontiguousarray(B))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(layers)


def factors(adapter: Adapter) -> dict[str, Factors]:
    """A (R, D_in) and B (D_out, R) in float32, by the path of the layer in the base."""
    return {
        path: (pair["lora_A"].float().numpy(), pair["lora_B"].float().numpy())
        for path, pair in sorted(lora_pairs(adapter).items())
    }


def reorder_rows(B: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The rows of B (D_out, R) in llama.cpp's order: the two halves of every head, one row of each in turn.

    Row `h D + 2 i + j` is row `h D + j D / 2 + i` of B, for head h, half j and D rows a head.
    """
    rows, rank = B.shape
    return B.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)


def _heads(config: ModelFile, layer: str) -> int:
    """The number of heads whose rows a q or k projection computes."""
    heads = config["num_attention_heads"]
    shared = config.get("num_key_value_heads") or heads
    return int(heads if layer.rpartition(".")[2].startswith("q") else shared)
