"""Rotary positions as one operation, called by the base's own code instead of `apply_rotary_pos_emb`.

    y = x cos + rotate_half(x) sin,    dx = dy cos - rotate_half(dy sin)        (Su et al. 2021)

In torch's operations this is ten over queries and keys, and as many backward with gradients filled up with zeros. An
attention module keeps its own forward; while a model is attached, that forward runs with this function under the name
`apply_rotary_pos_emb`. No module of transformers is changed. A library's function is replaced only if it gives the same
numbers on a trial.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.autograd import Gradients, KernelContext, apply
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.ops.cpu import Library, usable

NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]  # (q, k, cos, sin, further settings) -> q and k, rotated


class _Rotate(torch.autograd.Function):
    """x: (1, H, N, D), any strides -> the same shape, tokens outermost in memory; cos, sin: (1, N, D)."""

    @staticmethod
    def forward(ctx: KernelContext, x: Tensor, cos: Tensor, sin: Tensor, library: Library) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.library = library
        return _rotated(x, cos, sin, 1.0, library)

    @staticmethod
    def backward(ctx: KernelContext, *gradients: Tensor) -> Gradients:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, sin, -1.0, ctx.library), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float, library: Library) -> Tensor:
    tokens = x[0].transpose(0, 1)  # (N, H, D)
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    return library.rotate(tokens, cos[0], sin[0], sign).transpose(0, 1)[None]


def fused_rotary(original: Rotary, context: BatchContext) -> Rotary:
    """`original`, in one operation for one unpadded row of tokens that trains or that an engine computes."""

    # further settings are the original's own; with any of them it computes itself
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        one_row = q.dim() == 4 and q.shape[0] == cos.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3])
        trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        wanted = one_row and (trains or context.serves) and enabled("rotary")
        library = usable(q, k, cos, sin) if wanted and not args and not kwargs else None
        if library is None:
            return original(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.contiguous(), sin.contiguous()
        if not trains:
            return _rotated(q, cos, sin, 1.0, library), _rotated(k, cos, sin, 1.0, library)
        return apply(_Rotate, q, cos, sin, library), apply(_Rotate, k, cos, sin, library)

    return rotary


def hook(module: nn.Module, context: BatchContext) -> Callable[[], None]:
    """Let one attention module rotate in one operation, if it rotates at all; returns a function that undoes it."""
    forward = inspect.unwrap(type(module).forward)
    original = forward.__globals__.get(NAME)
    own_forward = "forward" in vars(module)
    if NAME not in forward.__code__.co_names or original is None or own_forward or not _is_rotary(original):
        return lambda: None
    twin = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, NAME: fused_rotary(original, context)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(twin, module)
    return lambda: vars(module).__delitem__("forward")


def _is_rotary(function: Rotary) -> bool:
    """Whether a library's function is the formula above: on small numbers it must give the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, *shape, generator=generator) for shape in ((2, 3, 8), (1, 3, 8), (3, 8), (3, 8)))
    try:
        given = function(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    expected = [x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None] for x in (q, k)]
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in zip(given, expected, strict=True))
