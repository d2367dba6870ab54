"""What the C library (glibc) does with memory that is free again: keep it for what comes next, or return it.

Elsewhere both do nothing.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # that mallopt takes on 64 bits


@contextmanager
def kept() -> Iterator[None]:
    """Have what a step or a pass frees kept for the next one.

    Large blocks, and whatever is free at the top, would go back, and the system clear those pages anew: 20000 a step of
    articles, 2000 a pass of 512 tokens. The peak stays the same.
    """
    option = _glibc("mallopt")
    if option is not None:
        option(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        option(_TRIM_THRESHOLD, 0x7FFFFFFF)
    try:
        yield
    finally:
        if option is not None:
            option(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)  # what it comes to by itself after large blocks


def give_back() -> None:
    """Return what is free to the system.

    A passage that held much for a short while (a load, a plan) would otherwise stay in the process as holes.
    """
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
