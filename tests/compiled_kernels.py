"""What the tests of the kernels share: the kernels themselves, numbers to give them, how close is close enough."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch import Tensor

from turret.ops.cpu import compiled as kernels
from turret.ops.cpu.compiled import CpuOps
from turret.ops.structs import AdapterSpans

TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2}}
BOTH = pytest.mark.parametrize("dtype", list(TOLERANCES))
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None) if sys.platform == "linux" else None
needed = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")


def compiled(dtype: torch.dtype = torch.float32) -> CpuOps:
    found = kernels.library(dtype)
    assert found is not None, (
        kernels.kernel_status()
    )  # a machine with a compiler has kernels; this is no reason to skip
    return found


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), **TOLERANCES[dtype])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def spans_of(edges: list[tuple[int, int]], factors: list[tuple[Tensor, Tensor] | None], tokens: int) -> AdapterSpans:
    """A middle layer of three; the others have no factors."""
    there = [(0, 0) if each is None else (each[0].data_ptr(), each[1].data_ptr()) for each in factors]
    addresses = torch.tensor([[(0, 0), pair, (0, 0)] for pair in there])
    starts, ends = (torch.tensor(side) for side in zip(*edges, strict=True))
    ranks = torch.tensor([1 if each is None else len(each[0]) for each in factors])
    return AdapterSpans(starts, ends, ranks, addresses, tokens)


def adapted(edges: list[tuple[int, int]], factors: list[tuple[Tensor, Tensor] | None], x: Tensor, y: Tensor) -> Tensor:
    """The plain loop."""
    wide = y.double()
    for (start, end), pair in zip(edges, factors, strict=True):
        if pair is not None:
            wide[start:end] += x[start:end].double() @ pair[0].double().mT @ pair[1].double()
    return wide
