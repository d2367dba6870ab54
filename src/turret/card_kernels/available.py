"""Whether a card computes by the programs of this package: everything that they need, and a check against torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from turret.card_kernels import check

log = logging.getLogger("turret")
OLDEST = (8, 0)  # compute capability of the first cards with FlashAttention 2: Ampere
DTYPES = (torch.bfloat16, torch.float16)  # FlashAttention takes no others


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this card computes by the base's modules; None if it computes by the programs.

    The first call for a card and a dtype compiles every program and compares it with torch, which takes some seconds.
    """
    if device.type != "cuda":
        return f"{device} is no card of NVIDIA or AMD"
    if dtype not in DTYPES:
        return f"the programs take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no attention for rows of different lengths"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return "the card is older than Ampere"
    try:
        found = check.fault(device, dtype)
    except Exception as error:  # a compiler, a driver, a build of torch: whatever they raise, the modules still compute
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
    if found is not None:
        log.warning("the fast paths of %s are off: %s", device, found)
    return found


def usable(*tensors: Tensor) -> bool:
    """Whether the operations take these tensors: on a card, of one dtype, with programs that passed the check."""
    first = tensors[0]
    if first.is_cpu or any(each.dtype != first.dtype for each in tensors):
        return False
    if first.is_meta:
        return _planned.get() and first.dtype in DTYPES
    return first.device.type == "cuda" and why_not(first.device, first.dtype) is None


_planned: ContextVar[bool] = ContextVar("planned", default=False)


@contextmanager
def planned(programs: bool) -> Iterator[None]:
    """Let passes on the meta device take the paths of a card for the length of the block.

    programs: whether the card computes by the programs.
    """
    token = _planned.set(programs)
    try:
        yield
    finally:
        _planned.reset(token)
