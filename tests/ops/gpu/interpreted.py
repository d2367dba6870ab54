"""Runs every Triton program by Triton's interpreter and prints, as JSON, how far it is from its reference.

TRITON_INTERPRET=1 python tests/ops/gpu/interpreted.py         Triton reads the variable when it is imported
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch

from turret.ops.gpu import available, operations, programs

CPU = torch.device("cpu")
NATIVE = ("attention", "attention_backward")  # torch's own fused kernels, which have no form for the CPU
DTYPES = {"float32": torch.float32, "float16": torch.float16}  # the interpreter multiplies no bfloat16


class Counted:
    """A program that counts how often it is launched."""

    def __init__(self, name: str, program: Any, launches: Counter[str]) -> None:
        self.name, self.program, self.launches = name, program, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches[self.name] += 1
        return self.program[grid]


def main() -> None:
    found: dict[str, Any] = {}
    for name in operations.NAMES:
        if name in NATIVE:
            continue
        launches: Counter[str] = Counter()
        home = vars(programs)
        with patch.dict(home, {f"_{name}": Counted(f"_{name}", home[f"_{name}"], launches)}):
            far = {
                kind: available.largest_difference(name, getattr(programs, name), CPU, dtype)
                for kind, dtype in DTYPES.items()
            }
        found[name] = {"difference": far, "launches": dict(launches)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
