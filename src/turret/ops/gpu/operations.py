"""The operations of a GPU, as operations of torch: `torch.ops.turret.swiglu` and so on.

On a GPU each is one program of Triton, or one of torch's own fused kernels, so it is one launch. On any other device
it is its reference in plain torch, so that tests compute it without a GPU. The reference's type hints are its schema.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TypeVar

import torch

from turret.ops import formulas as reference
from turret.ops.gpu import shapes

R = TypeVar("R")
CHANGED: dict[str, tuple[str, ...]] = {  # operation -> the arguments that it changes in place
    "rms_norm": (),
    "rms_norm_backward": (),
    "rotate": ("q", "k"),
    "swiglu": (),
    "swiglu_backward": (),
    "add_lora": ("y",),
    "lora_input_gradient": ("dx",),
    "lora_factor_gradients": ("dA", "dB"),
    "add_mixed_lora": ("y",),
    "attention": (),
    "attention_backward": (),
    "attend_step": ("keys", "values"),
}
NAMES = tuple(CHANGED)
_library = torch.library.Library("turret", "DEF")  # the operations live as long as this object


def _program(name: str) -> Callable[..., R]:
    """What runs on a GPU. Triton is imported at the first call, so a machine without a GPU never loads it."""

    def run(*arguments: R) -> R:
        programs = importlib.import_module("turret.ops.gpu.programs")
        found: R = getattr(programs, name)(*arguments)
        return found

    return functools.update_wrapper(run, getattr(reference, name))


for name, changed in CHANGED.items():
    _library.define(torch.library.infer_schema(getattr(reference, name), mutates_args=changed, op_name=name))
    _library.impl(name, getattr(reference, name), "CPU")
    _library.impl(name, _program(name), "CUDA")
    if hasattr(shapes, name):
        _library.impl(name, getattr(shapes, name), "Meta")
