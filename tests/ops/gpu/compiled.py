"""Compiles every Triton program for a GPU, which needs no GPU, and prints what each takes as JSON.

python tests/ops/gpu/compiled.py 80 90           the compute capabilities
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turret.ops.gpu import available, operations, programs

CPU = torch.device("cpu")
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def main(*capabilities: int) -> None:
    found: dict[str, dict[str, int]] = {}
    for name in operations.NAMES:
        home = vars(programs)
        if f"_{name}" not in home:
            continue  # torch's own
        for dtype in DTYPES:
            launched = Launched(home[f"_{name}"])
            with patch.dict(home, {f"_{name}": launched}):
                getattr(programs, name)(*available.Case(CPU, dtype).arguments(name))
            ((args, constants),) = launched.calls
            names = [each for each in launched.program.arg_names if each not in constants]
            signature = {each: type_of(value) for each, value in zip(names, args, strict=True)}
            signature |= dict.fromkeys(constants, "constexpr")
            signature = {each: signature[each] for each in launched.program.arg_names}
            for capability in capabilities:
                source = ASTSource(launched.program, signature, constants)
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                kind = f"{name} {str(dtype).removeprefix('torch.')} {capability}"
                found[kind] = {"bytes": len(made.asm["cubin"]), "shared": made.metadata.shared}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
