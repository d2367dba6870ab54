"""Kernels in C for CPUs: the small operations of a transformer, LoRA, attention, and products of few tokens.

`library()` returns them, or None if this machine has none; every caller then computes in torch. `TURRET_KERNELS=off`
switches them off.
"""

from turret.ops.cpu.available import int8, library, rest, usable, why, without
from turret.ops.cpu.compiled import LONGEST_INT8, Library
from turret.ops.cpu.layers import DecoderLayer, EncoderLayer, LayerMatrix, LayerNorm, Layers
from turret.ops.cpu.operations import (
    LARGEST,
    NO_DROPOUT,
    AdapterSpans,
    AttentionRows,
    CachedKVArguments,
    DropoutArguments,
    Int8Matrix,
    Prefixes,
    Seeds,
)

__all__ = [
    "LARGEST",
    "LONGEST_INT8",
    "NO_DROPOUT",
    "AdapterSpans",
    "AttentionRows",
    "CachedKVArguments",
    "DecoderLayer",
    "DropoutArguments",
    "EncoderLayer",
    "Int8Matrix",
    "LayerMatrix",
    "LayerNorm",
    "Layers",
    "Library",
    "Prefixes",
    "Seeds",
    "int8",
    "library",
    "rest",
    "usable",
    "why",
    "without",
]
