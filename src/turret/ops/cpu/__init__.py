"""Kernels in C for CPUs: the small operations of a transformer, LoRA, attention, and products of few tokens.

`library()` returns them, or None if this machine has none; every caller then computes in torch. `TURRET_KERNELS=off`
switches them off.
"""

from turret.ops.cpu.compiled import (
    CachedKVArguments,
    DecoderLayer,
    EncoderLayer,
    LayerMatrix,
    Layers,
    Library,
    library,
    rest,
    usable,
    why,
    without,
)

__all__ = [
    "CachedKVArguments",
    "DecoderLayer",
    "EncoderLayer",
    "LayerMatrix",
    "Layers",
    "Library",
    "library",
    "rest",
    "usable",
    "why",
    "without",
]
