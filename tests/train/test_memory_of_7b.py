"""A base of 7 billion weights in 4 bits trains on a GPU of 8 GB. No GPU is needed to count the bytes.

Counted: the packed weights, embeddings and output layer in bfloat16, LoRA with its gradients and moments, the input of
every layer, what one layer saves for its backward pass (by autograd's own hooks), the largest temporaries, the logits
of one piece, and what CUDA's context takes. Not counted: what the allocator loses between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from four_bits import needs_bitsandbytes

from turret import quantized
from turret.adapters import attach, classify_logits, trainable_parameters
from turret.adapters.packed import TARGETS
from turret.methods import LoRA
from turret.ops.table import without
from turret.train.adamw import moment_bytes
from turret.train.memory import SavedForBackward

GB = 1e9
CONTEXT = 0.6 * GB  # of CUDA and its libraries
LAYERS, VOCABULARY, TOKENS = 32, 32_000, 1024
WIDTH, INNER, HEADS = 4096, 11_008, 32  # of Llama 2 7B
HALF = 2  # bytes of a bfloat16


@dataclass
class Layer:
    """What one layer of a Llama takes."""

    weights: int  # bytes of its frozen weights
    trained: int  # weights of LoRA
    saved: int  # bytes that a pass keeps for the backward pass


def layer(share: int, packed: bool = True) -> Layer:
    """One layer of Llama 2 7B with a `share`-th of its widths, LoRA of rank 16 on every linear layer, and 1,024 tokens.

    The kernels are off, because a GPU has none of them.
    """
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH // share,
        intermediate_size=INNER // share,
        num_attention_heads=HEADS // share,
        num_key_value_heads=HEADS // share,
        num_hidden_layers=1,
        num_labels=2,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForSequenceClassification(config).to(torch.bfloat16)
    body = model.model.layers[0]
    if packed:
        pack(body)
    weights, empty = quantized.stored_bytes(body), saved_by(model, [])
    attach(model, LoRA(r=16, lora_dropout=0.1, target_modules="all-linear"))
    trained = sum(each.numel() for name, each in trainable_parameters(model).items() if ".layers." in name)
    return Layer(weights, trained, saved_by(model, [torch.randint(1, 128, (TOKENS,))]) - empty)


def pack(module: torch.nn.Module) -> None:
    """Put every linear layer of a module into 4 bits."""
    library = quantized.library()
    for path, each in list(module.named_modules()):
        if isinstance(each, torch.nn.Linear):
            new = library.nn.LinearNF4(each.in_features, each.out_features, bias=False)
            new.weight = library.nn.Params4bit(each.weight.data, quant_type="nf4", compress_statistics=True).to("cpu")
            module.set_submodule(path, new.requires_grad_(False))
    quantized.compute_in(module, torch.bfloat16)


def saved_by(model: Any, rows: list[torch.Tensor]) -> int:
    if not rows:
        return 0
    counted = SavedForBackward(model.train())
    with without("kernels"), counted.counting():
        classify_logits(model, rows)
    return counted.bytes


def total(one: Layer, share: int, optimizer: str | None = None) -> dict[str, float]:
    """Bytes by component, with checkpointed layers.

    share: a layer's numbers are of widths divided by it. Weights grow with its square. What is saved is multiplied by
    it, which is too much for the part that does not depend on the width.
    """
    trained = LAYERS * one.trained * share
    return {
        "weights": LAYERS * one.weights * share**2 + 2 * VOCABULARY * WIDTH * HALF,
        "adapter": 4 * trained,
        "gradients": 4 * trained,
        "moments": moment_bytes(optimizer, trained),
        "inputs of layers": LAYERS * TOKENS * WIDTH * HALF,
        "saved by a layer": one.saved * share,
        "temporaries": 2 * INNER * WIDTH * HALF + 4 * TOKENS * INNER * HALF,
        "logits": 3 * 4 * TARGETS * VOCABULARY,
        "context": CONTEXT,
    }


@needs_bitsandbytes
def test_a_7b_in_nf4_trains_on_1024_tokens_within_8_gb() -> None:
    bytes_of = total(layer(16), 16)
    assert sum(bytes_of.values()) < 8 * GB, bytes_of
    assert 3.5 * GB < bytes_of["weights"] < 4.5 * GB  # 4.13 bits for each of 6.5 billion, and two embeddings


@needs_bitsandbytes
def test_control_neither_plain_weights_nor_all_layers_saved_fit() -> None:
    assert sum(total(layer(16, packed=False), 16).values()) > 13 * GB
    one = layer(16)
    whole = sum(total(one, 16).values()) + (LAYERS - 1) * one.saved * 16
    assert whole > sum(total(one, 16).values()) + 2 * GB


@needs_bitsandbytes
def test_moments_in_8_bits_take_a_quarter() -> None:
    one = layer(16)
    assert total(one, 16, "adamw8bit")["moments"] < 0.27 * total(one, 16)["moments"]


@needs_bitsandbytes
@pytest.mark.slow
def test_a_layer_of_its_real_widths_saves_no_more_than_the_small_one_says() -> None:
    real, small = layer(1), layer(16)
    assert real.saved <= 16 * small.saved
    assert real.weights == pytest.approx(small.weights * 16**2, rel=0.05)
    assert sum(total(real, 1).values()) < 8 * GB
