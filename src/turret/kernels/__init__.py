"""Small operations between two matrix products, compiled for this machine where it has a compiler.

`library()` gives them or None; every caller keeps its plain path beside. `TURRET_KERNELS=off` takes the plain path.
"""

from turret.kernels.arguments import (
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
from turret.kernels.available import int8, library, rest, usable, wake, why, without
from turret.kernels.compiled import Library
from turret.kernels.layers import DecoderLayer, EncoderLayer, LayerMatrix, LayerNorm, Layers
from turret.kernels.products import LONGEST_INT8

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
    "wake",
    "why",
    "without",
]
