"""Call a kernel of the loaded library: argument types, and the addresses of tensors."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from turret.kernels.arguments import AdapterSpans

if TYPE_CHECKING:
    from ctypes import _NamedFuncPointer

Argument: TypeAlias = (
    "int | float | ctypes.c_void_p | ctypes.c_long | ctypes.c_int | ctypes.c_uint32 | ctypes.c_float | None"
)

NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_LORA = (*(_LONG,) * 4, *(_POINTER,) * 3, ctypes.c_float, *(ctypes.c_uint32,) * 3)
DECLARED = {  # for kernels that are called once a layer: declared arguments may be plain Python numbers
    "low_rank": (_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, ctypes.c_int),
    "lay_out": (_POINTER, _POINTER, _LONG, _LONG, ctypes.c_float, _POINTER),
    "linear": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, ctypes.c_int),
    "keep_step": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER),
    "attend_step": (
        *(_POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER),
        *(ctypes.c_float, _LONG, _POINTER, ctypes.c_int),
    ),
    "lora": (*_LORA, *(_POINTER,) * 3, ctypes.c_int),
    "lora_backward": (*_LORA, *(_POINTER,) * 7, ctypes.c_int),
    "round_int8": (*(_POINTER,) * 3, _LONG, _LONG, ctypes.c_int, ctypes.c_int),
    "linear_int8": (*(_POINTER,) * 5, _LONG, _LONG, _LONG, ctypes.c_int, _POINTER, ctypes.c_int),
    "encoder_layers": (_POINTER, _POINTER, _LONG, _LONG, *(_POINTER,) * 4, ctypes.c_int),
    "decoder_layers": (_POINTER, _LONG, _LONG, *(_POINTER,) * 4, _LONG, *(_POINTER,) * 3, ctypes.c_int),
}
RETURNED = dict.fromkeys(("linear_int8", "encoder_layers", "decoder_layers"), _LONG)


class Calls:
    """The loaded library. All tensors are on the CPU, of one dtype, and contiguous unless stated otherwise."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        self._tiles = bool(loaded.tiles())
        self.int8 = bool(loaded.int8())  # whether there is `linear_int8`
        self._functions: dict[tuple[str, torch.dtype], _NamedFuncPointer] = {}
        self._few = {dtype: int(getattr(loaded, f"linear_up_to_{name}")()) for dtype, name in NAMES.items()}

    def tiled(self, dtype: torch.dtype) -> bool:
        """Whether products use the processor's matrix tiles (AMX), which are about 8x faster."""
        return self._tiles and dtype == torch.bfloat16

    def _call(self, name: str, dtype: torch.dtype, *arguments: Argument) -> None:
        """Call a kernel."""
        self._function(name, dtype)(*arguments)

    def _workspace(self, name: str, dtype: torch.dtype, *arguments: Argument) -> int:
        """Call a kernel without a workspace: it computes nothing and returns the bytes that it needs."""
        return int(self._function(name, dtype)(*arguments))

    def _function(self, name: str, dtype: torch.dtype) -> _NamedFuncPointer:
        function = self._functions.get((name, dtype))
        if function is None:
            function = getattr(self._loaded, f"{name}_{NAMES[dtype]}")
            function.argtypes, function.restype = DECLARED.get(name), RETURNED.get(name)
            self._functions[name, dtype] = function
        return function


def p(x: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def n(x: Tensor) -> ctypes.c_long:
    """The number of elements of a tensor."""
    return ctypes.c_long(x.numel())


def at(spans: AdapterSpans | None) -> int | None:
    """The address of the spans."""
    return None if spans is None else spans.address


def threads() -> ctypes.c_int:
    """The number of threads that torch uses."""
    return ctypes.c_int(torch.get_num_threads())
