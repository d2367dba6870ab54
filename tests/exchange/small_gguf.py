"""Small decoders as GGUF files that llama.cpp loads: float32 weights with llama.cpp's names, and no vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from turret.bundles.gguf_lora import reorder_rows
from turret.families import FAMILIES

# Settings with which llama.cpp computes what transformers does: it knows no others of these architectures.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 512},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 512,
        "layer_types": ["sliding_attention"] * 2,
        "final_logit_softcapping": None,
    },
    "mistral": {"sliding_window": 512},
    "phi3": {"sliding_window": 512, "hidden_size": 64},  # the heads together are as wide as the hidden states
    "qwen2": {"hidden_size": 64},
}


def write(model: Any, family: str, path: Path) -> None:
    """Write a model of `small_models` for llama.cpp."""
    config, known = model.config, FAMILIES[family]
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.gguf)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("sliding_attention", rope)
    writer = gguf.GGUFWriter(path, known.gguf)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("no_vocab")
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None) and known.gguf == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    tied = bool(config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        value = tensor.float().numpy()
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if layer in known.gguf_rotary:
            heads = config.num_attention_heads if layer.startswith("q") else config.num_key_value_heads
            value = reorder_rows(value.reshape(len(value), -1), heads).reshape(value.shape)
        if known.gguf.startswith("gemma") and "norm" in name:
            value = value + 1.0  # llama.cpp multiplies by the weight alone
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
