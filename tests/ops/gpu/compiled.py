"""Compiles the programs of a GPU at real sizes, which needs no GPU, and prints what each takes as JSON.

python tests/ops/gpu/compiled.py 80 89 90           the compute capabilities
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import triton
from liger_kernel.ops import rms_norm, rope, swiglu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turret.ops.gpu import liger, programs

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
# hidden size, inner size of the MLP, heads, heads of keys, size of a head: bases of 0.5B to 70B
BASES = {
    "0.5B": (896, 4864, 14, 2, 64),
    "8B": (4096, 14336, 32, 8, 128),
    "70B": (8192, 28672, 64, 8, 128),
    "heads of 256": (2048, 8192, 8, 1, 256),
}


class Launched:
    """A program that keeps its arguments instead of running."""

    def __init__(self, program: Any) -> None:
        self.program, self.calls = program, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def calls(base: str, dtype: torch.dtype) -> Iterator[tuple[Any, str, Callable[[], object]]]:
    """The kernel's module and name, and a call that launches it."""
    D, F, H, K, size = BASES[base]
    x, w, r = torch.zeros(4, D, dtype=dtype), torch.zeros(D, dtype=dtype), torch.zeros(4)
    inner, angle = torch.zeros(4, F, dtype=dtype), torch.zeros(4, size, dtype=dtype)
    q, k = torch.zeros(4, H, size, dtype=dtype), torch.zeros(4, K, size, dtype=dtype)
    yield rms_norm, "_rms_norm_forward_kernel", lambda: liger.rms_norm(x, w, 1e-5)
    yield rms_norm, "_rms_norm_backward_kernel", lambda: liger.rms_norm_backward(x, w, r, x)
    yield rope, "_triton_rope", lambda: liger.rotate(q, k, angle, angle, 1.0)
    yield swiglu, "_swiglu_forward_kernel", lambda: liger.swiglu(inner, inner)
    yield swiglu, "_swiglu_backward_kernel", lambda: liger.swiglu_backward(inner, inner, inner)
    yield programs, "_dropout", lambda: programs.dropout(inner, torch.zeros(4, dtype=torch.int64), 5, 6000, 1.1)


def main(*capabilities: int) -> None:
    found: dict[str, dict[str, int]] = {}
    for base in BASES:
        for home, name, call in calls(base, torch.bfloat16):
            launched = Launched(getattr(home, name))
            with patch.object(home, name, launched):
                call()
            ((args, given),) = launched.calls
            program = launched.program
            options = {each: given[each] for each in ("num_warps",) if each in given}
            bound: dict[str, Any] = dict.fromkeys(program.arg_names) | dict(zip(program.arg_names, args, strict=False))
            bound |= {each: value for each, value in given.items() if each not in options}
            fixed = {p.name for p in program.params if p.is_constexpr}
            fixed |= {each for each, value in bound.items() if value is None}
            signature = {each: "constexpr" if each in fixed else type_of(bound[each]) for each in program.arg_names}
            source = ASTSource(program, signature, {each: bound[each] for each in fixed})
            for capability in capabilities:
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                found[f"{name} {base} {capability}"] = {"bytes": len(made.asm["cubin"]), "shared": made.metadata.shared}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
