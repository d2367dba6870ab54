"""Faster ways to compute what the base's modules and the two hooks compute.

`FAST_PATHS` lists all of them. Each has a reference in plain torch that gives the same numbers. `without` turns paths
off by name for a test or a benchmark. `benchmarks/fast_paths.py` measures how much faster each makes a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from turret.ops import cpu as kernels

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class FastPath:
    """One faster way to the same numbers.

    Args:
        computes: what it computes, in one operation or with less memory.
        module: where it is, under `turret.adapters`.
        reference: where the plain formula is.
        taken: when it is used.
        part_of: larger paths that compute this as well. While this path is off they are off too, and its benefit is
            measured with them off on both sides.
        bases: the kinds of base that have such modules.
        trains: whether a training step takes it; else only an engine does.
    """

    computes: str
    module: str
    reference: str
    taken: str
    part_of: tuple[str, ...] = ()
    bases: tuple[str, ...] = (ENCODER, DECODER)
    trains: bool = True


_LAYER, _KERNELS = ("trained_layer",), ("kernels",)
FAST_PATHS: dict[str, FastPath] = {
    "kernels": FastPath(
        "everything below that is written in C",
        "turret.ops.cpu",
        "the same paths in torch's operations",
        "the processor's library loads and passes its check",
    ),
    "trained_layer": FastPath(
        "a layer of BERT, RoBERTa, Llama, Mistral or Qwen, forward and backward, as one operation of autograd",
        "fused.trained_layer",
        "the layer's modules",
        "one LoRA or prefix trains on unpadded rows, with kernels",
    ),
    "flash": FastPath(
        "attention of all rows of an unpadded batch; the probabilities are not saved",
        "fused.flash",
        "`attention._unpadded_plainly`",
        "an unpadded batch without softcap, with kernels",
        part_of=_LAYER,
    ),
    "lora_kernel": FastPath(
        "what LoRA adds to a frozen layer, and its gradients, in float32",
        "lora",
        "`lora.lora_delta`",
        "LoRA trains with widths that are multiples of 32, with kernels",
        part_of=_LAYER,
    ),
    "gated_mlp": FastPath(
        "a gated MLP; gate and up, or its input alone, are saved",
        "fused.activations",
        "the base's module",
        "a frozen MLP of Llama, Mistral or Qwen trains through, with kernels",
        part_of=_LAYER,
        bases=(DECODER,),
    ),
    "gelu": FastPath(
        "the exact GELU",
        "fused.activations",
        "the base's module",
        "gradients pass, with kernels",
        part_of=_LAYER,
        bases=(ENCODER,),
    ),
    "rms_norm": FastPath(
        "an RMS norm; its input is saved, and no float32 copy of it",
        "fused.residual",
        "`residual.rms_norm`",
        "gradients pass through a frozen norm",
        part_of=_LAYER,
        bases=(DECODER,),
    ),
    "added_norm": FastPath(
        "dropout, residual sum and LayerNorm of an encoder's layer",
        "fused.residual",
        "the base's modules",
        "gradients pass through a frozen norm, with kernels",
        part_of=_LAYER,
        bases=(ENCODER,),
    ),
    "norm_inputs": FastPath(
        "saves a norm's input, which the norm saves anyway, instead of its output",
        "fused.residual",
        "save the output",
        "LoRA or a gated MLP reads a norm's output, with kernels",
        part_of=_LAYER,
    ),
    "rotary": FastPath(
        "rotary positions of queries and keys",
        "fused.rotary",
        "the base's `apply_rotary_pos_emb`",
        "one unpadded row of tokens trains, with kernels",
        part_of=_LAYER,
        bases=(DECODER,),
    ),
    "first_token": FastPath(
        "the last layer of a classifier, for the first token of each row alone",
        "packed",
        "the same layer for all tokens",
        "the classifier reads the first token only (BERT, RoBERTa)",
        bases=(ENCODER,),
    ),
    "lora_gradient": FastPath(
        "a frozen layer with LoRA and its gradients, without masked copies of the input",
        "lora",
        "`lora.lora_delta`",
        "LoRA trains on a CPU and the kernels do not take it",
        part_of=_KERNELS,
    ),
    "attention_gradient": FastPath(
        "attention and its gradient; one matrix of probabilities is saved",
        "attention",
        "`attention.attend_plainly`",
        "training on a CPU where `flash` is not taken",
        part_of=_KERNELS,
    ),
    "blocks": FastPath(
        "attention over unpadded rows of similar length as one padded block",
        "fused.blocks",
        "one block for each row",
        "an unpadded batch where `flash` is not taken",
        part_of=_KERNELS,
    ),
    "dropout": FastPath(
        "dropout masks from 16 random bits an element",
        "fused.dropout",
        "`torch.Tensor.bernoulli_`",
        "dropout on a CPU where no kernel hashes the mask",
        part_of=_KERNELS,
    ),
    "layer_calls": FastPath(
        "consecutive layers of BERT, RoBERTa, Llama, Mistral or Qwen in one call",
        "fused.layers",
        "the layers' modules",
        "an engine's pass of few tokens, with kernels",
        trains=False,
    ),
    "frozen_linear": FastPath(
        "a frozen linear layer, and each token's adapter, without packing the weight anew",
        "fused.frozen",
        "`torch.nn.functional.linear`",
        "few tokens without gradients, with kernels",
        part_of=("layer_calls",),
        trains=False,
    ),
    "cached_attention": FastPath(
        "attention of one query a row to its cached keys and values",
        "attention",
        "`attention.attend_plainly`",
        "an engine decodes without softcap or relative bias, with kernels",
        part_of=("layer_calls",),
        bases=(DECODER,),
        trains=False,
    ),
}

_off: ContextVar[frozenset[str]] = ContextVar("fast_paths_off", default=frozenset())


def enabled(name: str) -> bool:
    """Whether a path may be taken: always, except inside `without`."""
    return name not in _off.get()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Turn paths, and the larger paths that compute the same, off for the length of the block, in this thread.

    Raises KeyError for a name that is not in `FAST_PATHS`.
    """
    off = {each for name in names for each in (name, *FAST_PATHS[name].part_of)}
    token = _off.set(_off.get() | off)
    try:
        with ExitStack() as stack:
            if "kernels" in off:
                stack.enter_context(kernels.without())
            yield
    finally:
        _off.reset(token)
