"""Control whether glibc keeps freed memory for the next allocation or returns it to the system.

On other C libraries both functions do nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # options of mallopt, from malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the largest value that mallopt accepts on 64 bits


@contextmanager
def keep_freed() -> Iterator[None]:
    """Keep the memory that one step frees for the next step, instead of returning it to the system.

    Otherwise glibc returns large blocks and the free top of the heap, and the system clears these pages again: 20,000
    page faults per training step on articles, 2,000 per pass of 512 tokens. Peak memory does not change.
    """
    option = _glibc("mallopt")
    if option is not None:
        option(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        option(_TRIM_THRESHOLD, 0x7FFFFFFF)
    try:
        yield
    finally:
        if option is not None:
            option(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)  # glibc's own value after large blocks were freed


def release() -> None:
    """Return free memory to the system, after work that used much memory for a short time (a load, a plan)."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def share() -> None:
    """Let all threads from now on allocate from one heap.

    Otherwise each of a server's threads gets one of up to eight per processor, and `malloc_trim` returns nothing from
    the top of any but the first.
    """
    option = _glibc("mallopt")
    if option is not None:
        option(_ARENA_MAX, 1)


class Trim:
    """Returns free memory to the system as long as the process is larger than it once was by `step` bytes.

    `keep_freed` holds for all threads: after requests with large bodies the heap would stay as large as it ever was.
    """

    def __init__(self, step: int = 64 << 20) -> None:
        self._step, self._least = step, _resident()

    def __call__(self) -> None:
        size, trim = _resident(), _glibc("malloc_trim")
        self._least = min(self._least, size)
        if trim is not None and size > self._least + self._step:
            trim(0)


def _resident() -> int:
    """Bytes of this process in memory; 0 if the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as read:
            return int(read.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
