"""Runs the programs of a GPU by Triton's interpreter and prints, as JSON, how far each is from torch.

TRITON_INTERPRET=1 python tests/ops/gpu/interpreted.py         Triton reads the variable when it is imported
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm, rope, swiglu
from triton.runtime.interpreter import TensorHandle

from turret.ops.gpu import ops as gpu_ops
from turret.ops.gpu import programs
from turret.ops.gpu.ops import DROPOUT, LIGER

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16}  # the interpreter has no bfloat16
KERNELS = {
    LIGER: [
        (rms_norm, "_rms_norm_forward_kernel"),
        (rms_norm, "_rms_norm_backward_kernel"),
        (rope, "_triton_rope"),
        (swiglu, "_swiglu_forward_kernel"),
        (swiglu, "_swiglu_backward_kernel"),
    ],
    DROPOUT: [(programs, "_dropout")],
}


def given(value: Any) -> Any:
    """An argument as a compiled program has it: the interpreter leaves numbers and None of Python as they are."""
    if value is None:
        return torch.zeros(1)  # that the program does not read
    if not isinstance(value, float):
        return value
    return tl.tensor(TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)


class Counted:
    """A program that counts how often it is launched."""

    def __init__(self, name: str, program: Any, launches: Counter[str]) -> None:
        self.name, self.program, self.launches = name, program, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches[self.name] += 1
        return lambda *args, **kwargs: self.program[grid](*map(given, args), **kwargs)


def main() -> None:
    found: dict[str, Any] = {}
    for feature, kernels in KERNELS.items():
        launches: Counter[str] = Counter()
        rsqrt = lambda x: 1.0 / tl.sqrt(x)  # CUDA's own has no form for the interpreter
        patches: list[Any] = [patch.object(rms_norm, "rsqrt", rsqrt)]
        patches += [patch.object(home, name, Counted(name, getattr(home, name), launches)) for home, name in kernels]
        for each in patches:
            each.start()
        ops = gpu_ops.ops_with(frozenset({feature}))
        far = {kind: gpu_ops.largest_difference(feature, ops, CPU, dtype) for kind, dtype in DTYPES.items()}
        for each in patches:
            each.stop()
        found[feature] = {"difference": far, "launches": dict(launches)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
