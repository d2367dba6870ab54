"""The kernels of this process: loaded or compiled, checked against torch, and switched off on request."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from turret.kernels import check
from turret.kernels.build import NotBuilt, load
from turret.kernels.calls import NAMES
from turret.kernels.compiled import Library


@functools.cache
def _found() -> tuple[Library | None, str]:
    try:
        loaded, origin = load()
        library = Library(loaded)
        check.require(library)
    except (NotBuilt, AttributeError) as error:  # AttributeError: the library lacks a kernel
        return None, str(error)
    return library, origin


_off: ContextVar[bool] = ContextVar("off", default=False)


def library() -> Library | None:
    """The kernels, compiled if needed and checked at the first call; None if there are none."""
    return None if _off.get() else _found()[0]


@contextmanager
def without() -> Iterator[None]:
    """Compute in torch for the length of the block, in this thread: the reference for the kernels."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def int8() -> bool:
    """Whether the processor has instructions for products of 8-bit integers."""
    found = library()
    return found is not None and found.int8


def why() -> str:
    """Where the kernels come from, or why there are none; for messages."""
    return _found()[1]


def rest() -> None:
    """End the idle OpenMP helper threads of the calling thread.

    If several threads of a process have helpers, GNU's OpenMP puts all of them to sleep between two operations, and a
    pass over 16 tokens takes up to 2x longer (two cores). The next parallel region creates new helpers.
    """
    if (found := _found()[0]) is not None:
        found.rest()


def usable(*tensors: Tensor) -> Library | None:
    """The kernels, if they support these tensors: on the CPU, all float32 or all bfloat16. Else None."""
    dtype = tensors[0].dtype
    if not tensors[0].is_cpu or dtype not in NAMES:
        return None
    for each in tensors:  # a loop, faster than any(): this runs hundreds of times per step
        if each.dtype != dtype:
            return None
    return library()
