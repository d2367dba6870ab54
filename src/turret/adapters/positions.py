"""Positions of tokens: of unpadded rows, and shifted by a causal prefix.

A causal prefix of P tokens takes the positions 0 … P-1, so the real tokens begin at P. Then a prefix that starts from
the keys and values of a text is exactly that text prepended. Encoders are not shifted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turret.adapters.batch_context import BatchContext
from turret.families.family import Family
from turret.ops.core import copied
from turret.transformer import Model

Length = Callable[[int], int]  # slot -> P
Args = tuple[Any, ...]  # the arguments of a module of transformers, of any type
Kwargs = dict[str, Any]
PreHook = Callable[[nn.Module, Args, Kwargs], tuple[Args, Kwargs] | None]  # None leaves the arguments as they are
P = ParamSpec("P")


class _Cache(Protocol):
    """A key-value cache of transformers."""

    def get_seq_length(self) -> int: ...


def hook(model: Model, family: Family, context: BatchContext, prefix_length: Length) -> list[RemovableHandle]:
    """Register the hooks that a family needs; returns the handles that remove them."""
    if family.decoder_only:
        body = model.base_model
        names = list(inspect.signature(type(body).forward).parameters)[1:]
        shift = _decoder_hook(names, family.position_offset(model.config), context, prefix_length)
        return [body.register_forward_pre_hook(shift, with_kwargs=True)]
    handles = []
    if family.position_module is not None:
        for stack, (stream, *_) in family.stacks(model):
            table = stack.get_submodule(family.position_module)
            before = _table_hook(stream, context, prefix_length)
            handles.append(table.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(table.register_forward_hook(lambda module, args, out: out[0] if out.dim() == 4 else out))
    return handles


def hook_bias(modules: Iterable[nn.Module], family: Family, context: BatchContext) -> Callable[[], None]:
    """Keep a base from computing an (N, N) bias for N unpadded tokens; `attention` computes the bias of each row."""
    modules, name = list(modules), "" if family.relative_bias is None else family.relative_bias.method
    for module in modules:
        setattr(module, name, _bias_of_padded(module, getattr(module, name), context))  # on this instance only

    def undo() -> None:
        for module in modules:
            delattr(module, name)

    return undo


def _bias_of_padded(module: nn.Module, original: Callable[P, Tensor], context: BatchContext) -> Callable[P, Tensor]:
    """The method that computes the bias; for unpadded tokens it gives zeros (1, 1, 1, 1)."""

    def compute(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if context.lengths is None:
            return original(*args, **kwargs)
        return next(module.parameters()).new_zeros(1, 1, 1, 1)

    return compute


def row_positions(lengths: Iterable[int], offset: int, device: torch.device) -> Tensor:
    """Positions of unpadded rows, each counted from `offset`: (N,) int64."""
    return copied(torch.cat([torch.arange(offset, offset + length) for length in lengths]), device)


def _shift(context: BatchContext, prefix_length: Length, rows: int, stream: str, device: torch.device) -> Tensor | None:
    """P of every row, (B, 1), or of every unpadded token, (1, N); None if no row has a causal prefix."""
    slot = context.single()
    if slot is not None:
        P = prefix_length(slot)
        return torch.full((1, 1), P, device=device) if P else None
    assert context.slots is not None
    lengths = copied(torch.tensor([prefix_length(each) for each in context.slots]), device)
    if not lengths.any():
        return None
    if context.lengths is None:
        return lengths[:rows, None]
    return lengths.repeat_interleave(copied(torch.tensor(context.lengths[stream]), device))[None]


def _decoder_hook(names: list[str], offset: int, context: BatchContext, prefix_length: Length) -> PreHook:
    def shift_positions(body: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if context.capture is not None or context.positions is not None:
            return None
        call = dict(zip(names, args, strict=False)) | kwargs
        tokens = call.get("input_ids")
        tokens = call["inputs_embeds"][..., 0] if tokens is None else tokens
        shift = _shift(context, prefix_length, tokens.shape[0], "decoder", tokens.device)
        if shift is None:
            return None
        if call.get("position_ids") is None:
            call["position_ids"] = _positions(tokens, call.get("attention_mask"), call.get("cache")) + offset
        call["position_ids"] = call["position_ids"] + shift
        return (), call

    return shift_positions


def _positions(tokens: Tensor, mask: Tensor | None, cache: _Cache | None) -> Tensor:
    """Positions of padded rows, (B, T), if the caller gave none: padding on either side does not count."""
    length = tokens.shape[1]
    if mask is not None and mask.dim() == 2:
        counted: Tensor = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return counted
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past, past + length, device=tokens.device)[None]


def _table_hook(stream: str, context: BatchContext, prefix_length: Length) -> PreHook:
    def give_positions(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if context.capture is not None:
            return None
        if context.positions is not None:
            return args, kwargs | {"position_ids": context.positions[stream]}
        first = args[0] if args else kwargs["input_ids"]
        shape = first if isinstance(first, tuple) else first.shape  # Pegasus hands over the shape alone
        device, shift = next(module.parameters()).device, None
        if stream == "decoder":
            shift = _shift(context, prefix_length, shape[0], stream, device)
        if context.lengths is not None:
            where = row_positions(context.lengths[stream], 0, device)[None]  # (1, N)
        elif shift is None:
            return None
        else:
            past = args[1] if len(args) > 1 else kwargs.get("cache_length", 0)
            where = torch.arange(past, past + shape[1], device=device)[None]
        where = where if shift is None else where + shift  # (B or 1, T)
        return args, kwargs | {"position_ids": where}

    return give_positions
