"""Small operations between two matrix products, compiled for this machine where it has a compiler.

`library()` gives them or None; every caller keeps its plain path beside. `TURRET_KERNELS=off` takes the plain path.
"""

from turret.kernels.arguments import KEPT, LARGEST, Dropped, Kept, Prefixes, Rounded, Rows, Seeds, Spans
from turret.kernels.available import int8, library, rest, usable, wake, why, without
from turret.kernels.compiled import Library
from turret.kernels.layers import DecoderLayer, EncoderLayer, LayerNorm, Layers, Matrix
from turret.kernels.products import LONGEST_INT8

__all__ = [
    "KEPT",
    "LARGEST",
    "LONGEST_INT8",
    "DecoderLayer",
    "Dropped",
    "EncoderLayer",
    "Kept",
    "LayerNorm",
    "Layers",
    "Library",
    "Matrix",
    "Prefixes",
    "Rounded",
    "Rows",
    "Seeds",
    "Spans",
    "int8",
    "library",
    "rest",
    "usable",
    "wake",
    "why",
    "without",
]
