"""The loaded kernels and how one is called: what each takes as plain numbers, and tensors as addresses."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from turret.kernels.arguments import AdapterSpans

NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_LORA = (*(_LONG,) * 4, *(_POINTER,) * 3, ctypes.c_float, *(ctypes.c_uint32,) * 3)
DECLARED = {  # arguments as plain numbers, where a kernel is called once a layer
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
    """Tensors are on the CPU, contiguous where nothing else is said, and of one dtype."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        self._tiles = bool(loaded.tiles())
        self.int8 = bool(loaded.int8())  # whether the processor has products of whole numbers: `linear_int8`
        self._int8_rooms: dict[tuple[object, ...], int] = {}
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        self._few = {dtype: int(getattr(loaded, f"linear_up_to_{name}")()) for dtype, name in NAMES.items()}

    def tiled(self, dtype: torch.dtype) -> bool:
        """Whether the processor multiplies with matrix tiles, some eight times as quickly as without."""
        return self._tiles and dtype == torch.bfloat16

    def _call(self, name: str, dtype: torch.dtype, *arguments: Any) -> Any:
        function = self._functions.get((name, dtype))
        if function is None:
            function = getattr(self._loaded, f"{name}_{NAMES[dtype]}")
            function.argtypes, function.restype = DECLARED.get(name), RETURNED.get(name)
            self._functions[name, dtype] = function
        return function(*arguments)


def p(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def n(x: Tensor) -> ctypes.c_long:
    return ctypes.c_long(x.numel())


def at(spans: AdapterSpans | None) -> int | None:
    return None if spans is None else spans.address


def threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())
