"""Kernels in C for CPUs: the small operations of a transformer, LoRA, attention, and products of few tokens.

`library()` returns them, or None if this machine has none; every caller then computes in torch. `TURRET_KERNELS=off`
switches them off.
"""

from turret.ops.cpu.compiled import (
    LONGEST_INT8,
    AdapterSpans,
    CachedKVArguments,
    DecoderLayer,
    EncoderLayer,
    Int8Matrix,
    LayerMatrix,
    Layers,
    Library,
    int8,
    library,
    rest,
    usable,
    why,
    without,
)

__all__ = [
    "LONGEST_INT8",
    "AdapterSpans",
    "CachedKVArguments",
    "DecoderLayer",
    "EncoderLayer",
    "Int8Matrix",
    "LayerMatrix",
    "Layers",
    "Library",
    "int8",
    "library",
    "rest",
    "usable",
    "why",
    "without",
]
