"""Which kernels this process computes with: built or found, checked against torch, and switched off where asked.

`library()` is None where there are none; every caller then takes its plain path.
"""

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
    except (NotBuilt, AttributeError) as error:  # AttributeError: a kernel that the library lacks
        return None, str(error)
    return library, origin


_off: ContextVar[bool] = ContextVar("off", default=False)


def library() -> Library | None:
    """The kernels of this machine, built and checked at the first call; None where there are none."""
    return None if _off.get() else _found()[0]


@contextmanager
def without() -> Iterator[None]:
    """The plain path for the length of the block: what the kernels are compared with."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def int8() -> bool:
    """Whether there are kernels here that multiply in 8 bits."""
    found = library()
    return found is not None and found.int8


def why() -> str:
    """How `library` ended, for people."""
    return _found()[1]


def rest() -> None:
    """End the idle helper threads of the calling thread, which another thread's work would wait for.

    Where several threads of a process keep helpers, a pass over 16 tokens takes up to twice as long (GNU's OpenMP on
    two cores). One who goes on after it makes them anew: see `wake`.
    """
    if (found := _found()[0]) is not None:
        found.rest()


def wake() -> None:
    """Have the helper threads of the calling thread awake, each on a processor of its own, before work that is short.

    A first region would wait 5 to 10 ms for helpers that are new, and some for those that slept; this takes 3 and 0.3.
    """
    if (found := _found()[0]) is not None:
        found.wake()


def usable(*tensors: Tensor) -> Library | None:
    """The kernels, if they can take these tensors: on the CPU and all of one dtype that they know."""
    dtype = tensors[0].dtype
    if not tensors[0].is_cpu or dtype not in NAMES:
        return None
    for each in tensors:  # a loop in place of any(): this is asked some hundred times a step
        if each.dtype != dtype:
            return None
    return library()
