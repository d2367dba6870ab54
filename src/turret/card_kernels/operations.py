"""The operations of a card, as operations of torch: `torch.ops.turret.swiglu` and so on.

On a card each is one program of Triton, or one of torch's own fused kernels, so it is one launch. On any other device
it is its reference in plain torch, so that tests compute it without a card.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TypeVar

import torch

from turret.card_kernels import reference, shapes

R = TypeVar("R")
SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "rms_norm_backward(Tensor x, Tensor weight, float eps, Tensor dy, Tensor? plus) -> Tensor",
    "rotate(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, float sign) -> ()",
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward(Tensor gate, Tensor up, Tensor dy) -> (Tensor, Tensor, Tensor)",
    "add_lora(Tensor(a!)[] y, Tensor x, Tensor[] A, Tensor[] B, Tensor? plus, float scaling, float dropout, int seed)"
    " -> Tensor",
    "lora_input_gradient(Tensor(a!) dx, Tensor[] dy, Tensor[] A, Tensor[] B, float scaling, float dropout, int seed)"
    " -> Tensor",
    "lora_factor_gradients(Tensor(a!)[] dA, Tensor(b!)[] dB, Tensor x, Tensor h, Tensor dh, Tensor[] dy, float scaling,"
    " float dropout, int seed) -> ()",
    "add_mixed_lora(Tensor(a!)[] y, Tensor x, Tensor[] flats, Tensor adapters, Tensor places, Tensor addresses,"
    " Tensor ranks, int[] layers, int most, Tensor? plus) -> ()",
    "attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor key_starts, int most, int most_keys, bool causal,"
    " int window, float scaling) -> (Tensor, Tensor)",
    "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor log_sum, Tensor starts,"
    " Tensor key_starts, int most, int most_keys, bool causal, int window, float scaling) -> (Tensor, Tensor, Tensor)",
    "attend_step(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor lengths, Tensor prefixes, int window, float scaling) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
_library = torch.library.Library("turret", "DEF")  # the operations live as long as this object


def _program(name: str) -> Callable[..., R]:
    """What runs on a card. Triton is imported at the first call, so a machine without a card never loads it."""

    def run(*arguments: R) -> R:
        programs = importlib.import_module("turret.card_kernels.programs")
        found: R = getattr(programs, name)(*arguments)
        return found

    return functools.update_wrapper(run, getattr(reference, name))


for schema, name in zip(SCHEMAS, NAMES, strict=True):
    _library.define(schema)
    _library.impl(name, getattr(reference, name), "CPU")
    _library.impl(name, _program(name), "CUDA")
    if hasattr(shapes, name):
        _library.impl(name, getattr(shapes, name), "Meta")
