"""Which operations compute some tensors: the one place that asks for a device, and the table of all faster paths.

`of(x)` gives the operations for x's device and dtype. `PATHS` lists what is computed faster, each with a reference in
plain torch that gives the same numbers. `without` turns paths off by name for a test or a benchmark.
`benchmarks/fast_paths.py` measures how much faster each makes a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from turret.ops.core import REFERENCE, Ops, is_enabled, switched_off
from turret.ops.cpu import compiled as cpu
from turret.ops.cpu.compiled import end_idle_threads
from turret.ops.cpu.compiled import kernel_status as why_cpu_kernels
from turret.ops.gpu import ops as gpu
from turret.ops.gpu.ops import FEATURES as GPU_FEATURES
from turret.ops.gpu.ops import gpu_paths_on_meta
from turret.ops.gpu.ops import why_not as why_no_gpu_feature

__all__ = [
    "GPU_FEATURES",
    "PATHS",
    "end_idle_threads",
    "gpu_paths_on_meta",
    "narrows_last_layer",
    "ops_for",
    "why_cpu_kernels",
    "why_no_gpu_feature",
    "without",
]

ENCODER, DECODER = "encoder", "decoder"


def ops_for(*tensors: Tensor) -> Ops:
    """The operations for these tensors: of their device and dtype, or `REFERENCE` if nothing faster computes them."""
    first = tensors[0]
    for each in tensors:  # a loop, faster than any(): this runs hundreds of times a step
        if each.dtype != first.dtype:
            return REFERENCE
    if first.is_cpu:
        return cpu.library(first.dtype) or REFERENCE
    return gpu.ops_of(first)


def narrows_last_layer() -> bool:
    """Whether the last layer of a classifier computes the first token of each row alone."""
    return is_enabled("first_token")


@dataclass(frozen=True)
class Path:
    """One faster way to the same numbers.

    Args:
        computes: what it computes, in one operation or with less memory.
        module: where it is, under `turret`.
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
PATHS: dict[str, Path] = {
    "kernels": Path(
        "everything below that is written in C",
        "ops.cpu",
        "the same paths in torch's operations",
        "the processor's library loads and passes its check",
    ),
    "trained_layer": Path(
        "a layer of BERT, RoBERTa, Llama, Mistral or Qwen, forward and backward, as one operation of autograd",
        "ops.blocks",
        "the layer's modules",
        "one LoRA or prefix trains on unpadded rows, with kernels",
    ),
    "flash": Path(
        "attention of all rows of an unpadded batch; the probabilities are not saved",
        "ops.attention",
        "`adapters.attention._unpadded_plainly`",
        "an unpadded batch without softcap, with kernels",
        part_of=_LAYER,
    ),
    "lora_kernel": Path(
        "what LoRA adds to a frozen layer, and its gradients, in float32",
        "ops.lora",
        "`ops.lora.lora_delta`",
        "LoRA trains with widths that are multiples of 32, with kernels",
        part_of=_LAYER,
    ),
    "rms_norm": Path(
        "an RMS norm; its input is saved, and no float32 copy of it",
        "ops.blocks",
        "`ops.blocks.rms_norm`",
        "gradients pass through a frozen norm",
        part_of=_LAYER,
        bases=(DECODER,),
    ),
    "first_token": Path(
        "the last layer of a classifier, for the first token of each row alone",
        "adapters.packed",
        "the same layer for all tokens",
        "the classifier reads the first token only (BERT, RoBERTa), in training and in long passes of an engine",
        bases=(ENCODER,),
    ),
    "lora_gradient": Path(
        "a frozen layer with LoRA and its gradients, without masked copies of the input",
        "ops.lora",
        "`ops.lora.lora_delta`",
        "LoRA trains on a CPU and the kernels do not take it",
        part_of=_KERNELS,
    ),
    "attention_gradient": Path(
        "attention and its gradient; one matrix of probabilities is saved",
        "ops.attention",
        "`ops.attention.attend_plainly`",
        "training on a CPU where `flash` is not taken",
        part_of=_KERNELS,
    ),
    "blocks": Path(
        "attention over unpadded rows of similar length as one padded block",
        "ops.attention",
        "one block for each row",
        "an unpadded batch where `flash` is not taken",
        part_of=_KERNELS,
    ),
    "layer": Path(
        "such a layer in an engine's pass, for any mixture of adapters",
        "ops.blocks",
        "the layer's modules",
        "an engine's pass, with kernels",
        part_of=("layer_calls",),
        trains=False,
    ),
    "layer_calls": Path(
        "consecutive layers of BERT, RoBERTa, Llama, Mistral or Qwen in one call",
        "adapters.layers",
        "the layers one by one",
        "an engine's pass of few tokens, with kernels",
        trains=False,
    ),
    "frozen_linear": Path(
        "a frozen linear layer, and each token's adapter, without packing the weight anew",
        "ops.lora",
        "`torch.nn.functional.linear`",
        "few tokens without gradients, with kernels",
        part_of=("layer_calls",),
        trains=False,
    ),
    "cached_attention": Path(
        "attention of one query a row to its cached keys and values",
        "ops.attention",
        "`ops.attention.attend_plainly`",
        "an engine decodes without softcap or relative bias, with kernels",
        part_of=("layer_calls",),
        bases=(DECODER,),
        trains=False,
    ),
}


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Turn paths, and the larger paths that compute the same, off for the length of the block, in this thread.

    Raises KeyError for a name that is not in `PATHS`.
    """
    off = {each for name in names for each in (name, *PATHS[name].part_of)}
    token = switched_off.set(switched_off.get() | off)
    try:
        yield
    finally:
        switched_off.reset(token)
