"""The second hook: one attention function, registered with transformers under the name "turret".

It computes every attention of an attached model: padded or unpadded rows, causal or not, cross-attention, grouped
queries, sliding windows, capped scores, T5's position bias, and in front of the keys each row's prefix. The prefix
never enters the key-value cache. An argument that is neither computed here nor in `HARMLESS` is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from turret.adapters.attention_math import attend
from turret.adapters.batch_context import BARE, BatchContext, CachedKV
from turret.adapters.fused import enabled
from turret.adapters.fused.blocks import BlockLayout, BlockSide
from turret.adapters.fused.dropout import Masks
from turret.adapters.fused.flash import flash
from turret.errors import AdapterError
from turret.families import Family, Site
from turret.kernels import NO_DROPOUT, AttentionRows, Library, Prefixes, usable

NAME = "turret"
KeysValues = Callable[[int, Site], tuple[Tensor, Tensor] | None]
HARMLESS = {  # arguments that models hand over and that change no output of attention, and why
    "deterministic": "a setting of the flash-attention library, which is not called",
    "labels": "the loss reads them; `generate` hands them on to an encoder",
    "num_items_in_batch": "the loss is divided by it",
    "output_hidden_states": "transformers collects them from the layers",
    "position_ids": "queries and keys are rotated already, and the mask keeps packed texts apart",
    "return_dict": "the form of the model's output",
    "token_type_ids": "a model that knows segments has embedded them",
    "use_cache": "keys and values have been cached before the call",
}


@dataclass(frozen=True)
class Hooked:
    """What an attention module of an attached model carries: its site, the route, and how to reach a slot's prefix."""

    site: Site
    context: BatchContext
    prefix: KeysValues  # (slot, site) -> keys and values (H, P, D), or None
    family: Family
    bias_module: Any | None  # what owns the stack's bias by relative position
    last: bool = False  # of the model: here `BatchContext.read` are the only queries


class AttentionCall(NamedTuple):
    """What a module asks of one attention call beside its tensors."""

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None


def routed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls. query: (B, H, T, D); key, value: (B, H_kv, S, D) -> ((B, T, H, D), None).

    Raises AdapterError for an argument that is not known.
    """
    hooked: Hooked | None = getattr(module, "turret_hook", None)
    if hooked is None:
        raise AdapterError(
            f"{type(module).__name__} asked for turret's attention, but nothing is attached to its model: "
            "call turret.attach(model, …) or load the model with another attn_implementation"
        )
    _require_known(hooked.site, others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(scaling, dropout, sliding_window, softcap)
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    context = hooked.context
    if context.capture is not None:
        context.capture[hooked.site.name] = (key, value)
    if context.cache is None and context.lengths is None:
        output = _padded(hooked, query, key, value, _sum(attention_mask, position_bias), call)
        return output.transpose(1, 2).contiguous(), None  # (B, T, H, D)
    if position_bias is not None and hooked.bias_module is None and hooked.site.group != "cross":
        raise AdapterError(
            f"{hooked.site.name} adds a position_bias that turret cannot make for rows without padding: expected one "
            "from relative_attention_bias; use a base of another family"
        )
    compute = _cached if context.cache is not None and hooked.site.group != "encoder" else _unpadded
    return compute(hooked, query, key, value, call).transpose(1, 2).contiguous(), None  # (B, T, H, D)


def _require_known(site: Site, others: dict[str, Any]) -> None:
    """Raise AdapterError for an argument that would change the output and is not computed here; None says nothing."""
    for name, value in others.items():
        if name in HARMLESS or value is None or (name == "output_attentions" and not value):
            continue
        if name == "is_causal" and value == site.causal:
            continue
        raise AdapterError(
            f"attention of {site.name} was given {name}, which turret does not compute here: expected only scaling, "
            "dropout, position_bias, sliding_window and softcap; call the model without it, or detach and ask the base"
        )


def _padded(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: AttentionCall) -> Tensor:
    context, site = hooked.context, hooked.site
    if bias is None and site.causal and q.shape[2] > 1:
        raise AdapterError(
            f"{site.name} is causal but was given no mask: pass attention_mask, or none but let it be made"
        )
    if bias is not None:
        bias = bias[..., : k.shape[2]].to(q.dtype)
    slot = context.single()
    if slot is not None:
        return _one_slot(hooked, slot, q, k, v, bias, call)
    output = torch.empty_like(q)
    for slot, rows in context.rows_by_slot().items():
        index = torch.tensor(rows, device=q.device)
        rows_bias = bias[index] if bias is not None and bias.shape[0] > 1 else bias
        part = _one_slot(hooked, slot, q[index], k[index], v[index], rows_bias, call)
        output = output.index_copy(0, index, part)
    return output


def _one_slot(
    hooked: Hooked, slot: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: AttentionCall
) -> Tensor:
    """Attention of rows that all take one slot: [prefix; keys], and a bias widened by the prefix's columns."""
    prefix = hooked.prefix(slot, hooked.site) if slot != BARE else None
    if prefix is not None:
        rows, tokens = q.shape[0], prefix[0].shape[1]
        past = k.shape[2] - q.shape[2] if hooked.site.causal else 0
        if bias is not None or hooked.bias_module is not None:
            columns = _prefix_bias(hooked, tokens, q, past)  # (1, H or 1, T, P)
            if bias is None:
                bias = q.new_zeros(1, 1, q.shape[2], k.shape[2])
            shape = (max(bias.shape[0], 1), max(bias.shape[1], columns.shape[1]), q.shape[2])
            bias = torch.cat([columns.expand(*shape, -1), bias.expand(*shape, -1)], dim=-1)  # (., ., T, P + S)
        k = torch.cat([prefix[0].to(k.dtype).expand(rows, -1, -1, -1), k], dim=2)  # (B, H_kv, P + S, D)
        v = torch.cat([prefix[1].to(v.dtype).expand(rows, -1, -1, -1), v], dim=2)
    return attend(q, k, v, bias, call.scaling, call.dropout, hooked.context.masks, call.softcap)


def _prefix_bias(hooked: Hooked, tokens: int, q: Tensor, past: int) -> Tensor:
    """Position bias of the prefix's columns: zero, or T5's own for positions -P … -1. (1, H or 1, T, P)"""
    if hooked.bias_module is None:
        return q.new_zeros(1, 1, q.shape[2], tokens)
    positions = torch.arange(q.shape[2], device=q.device)[:, None] + past
    relative = torch.arange(-tokens, 0, device=q.device)[None] - positions  # (T, P)
    return relative_bias(hooked, relative).to(q.dtype)


def relative_bias(hooked: Hooked, relative: Tensor) -> Tensor:
    """The bias for relative positions key - query, of a site that has one: (T, S) int64 -> (1, H, T, S)."""
    assert hooked.family.relative_bias is not None
    bias: Tensor = hooked.family.relative_bias.values(hooked.bias_module, relative)
    return bias


def _unpadded(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Each row of the one long row attends to itself (or, crossing, to its source). q: (1, H, N, D) -> (1, H, N, D)"""
    library = usable(q, k, v) if call.softcap is None and enabled("flash") else None
    if library is not None:
        return _flash(library, hooked, q, k, v, call)
    return _unpadded_plainly(hooked, q, k, v, call)


def _flash(library: Library, hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """`_unpadded_plainly` by a kernel, with little kept for the backward pass."""
    rows, prefixes = rows_and_prefixes(hooked, call.scaling, call.window, k.dtype)
    dropped = (hooked.context.masks or Masks()).dropped(call.dropout) if call.dropout > 0.0 else NO_DROPOUT
    return flash(library, rows, q, k, v, prefixes, dropped)


def rows_and_prefixes(
    hooked: Hooked, scaling: float, window: int | None, dtype: torch.dtype
) -> tuple[AttentionRows, Prefixes]:
    """What a kernel is told of the rows of an unpadded batch at one site."""
    context, site = hooked.context, hooked.site
    assert context.lengths is not None
    asked = context.read if hooked.last else None
    place = ("rows", site.group, window, scaling, id(hooked.bias_module), asked is None)
    known: tuple[AttentionRows, Prefixes] | None = context.memo.get(place)
    if known is not None:  # nobody has a prefix: all layers are told the same
        return known
    slots = [context.slot_of(row) for row in range(len(next(iter(context.lengths.values()))))]
    pairs = {slot: pair for slot in dict.fromkeys(slots) if slot != BARE and (pair := hooked.prefix(slot, site))}
    if (prefixed := (*place, tuple(pairs))) not in context.memo:
        longest = max((pair[0].shape[1] for pair in pairs.values()), default=0)
        context.memo[prefixed] = _rows(hooked, scaling, window, longest, asked)
    order = {slot: index for index, slot in enumerate(pairs)}
    prefixes = Prefixes([(key.to(dtype), value.to(dtype)) for key, value in pairs.values()], [*map(order.get, slots)])
    told = context.memo[prefixed], prefixes
    if not pairs:
        context.memo[place] = told
    return told


def _rows(
    hooked: Hooked, scaling: float, window: int | None, longest_prefix: int, asked: Tensor | None
) -> AttentionRows:
    """Where this batch's rows lie and what they see: once a batch for all layers of a group, and once for the last."""
    context, site = hooked.context, hooked.site
    queries = torch.tensor(context.spans("encoder" if site.group == "encoder" else "decoder"))  # (B, 2)
    cross = site.group == "cross"
    keys = torch.tensor(context.spans("encoder")) if cross else queries
    lengths = queries[:, 1] - queries[:, 0], keys[:, 1] - keys[:, 0]
    if asked is not None:  # the first token of every row but the one that fills the batch up, which has none
        lengths = (torch.arange(len(queries)) < len(asked)).long(), lengths[1]
    bias, zero = None, 0
    if hooked.bias_module is not None and not cross:
        zero = longest_prefix + int(lengths[0].max())
        with torch.no_grad():
            device = next(hooked.bias_module.parameters()).device
            relative = torch.arange(-zero, int(lengths[1].max()), device=device)
            bias = relative_bias(hooked, relative[None])[0, :, 0].float().contiguous()  # (H, W)
    return AttentionRows(
        queries[:, 0].contiguous(), lengths[0], keys[:, 0].contiguous(), lengths[1], scaling,
        causal=site.causal and not cross, window=0 if window is None or cross else window, bias=bias, zero=zero,
        all_asked=asked is None,
    )  # fmt: skip


def _unpadded_plainly(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """The same block by block in torch's own operations: the reference of the kernels, and the way without them."""
    layout = _layout(hooked, q.device)
    parts = []
    for block in layout.blocks:
        bias = _block_bias(hooked, block.queries, block.keys, call.window, q)
        queries, keys, values = block.queries.block(q), block.keys.block(k), block.keys.block(v)
        output = _one_slot(hooked, block.kind, queries, keys, values, bias, call)
        parts.append(block.queries.unblock(output))
    return layout.join(parts)


def _cached(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Fresh rows as `_unpadded` has them, behind them one token a row against what the cache holds of it."""
    context, site = hooked.context, hooked.site
    cache, crossing = context.cache, site.group == "cross"
    assert cache is not None
    fresh, keys = cache.fresh("decoder"), cache.fresh("encoder" if crossing else "decoder")
    parts = []
    if fresh:
        own = k[:, :, :keys], v[:, :, :keys]
        cache.keep(site.group, site.layer, *own)
        parts.append(_unpadded(hooked, q[:, :, :fresh], *own, call))
    if fresh < q.shape[2]:
        new = (None, None) if crossing else (k[:, :, keys:], v[:, :, keys:])
        start = fresh
        for held in cache.step(site.group, site.layer, *new):
            end = start + held.keys.shape[0]
            parts.append(_step(hooked, q[:, :, start:end], held, call))
            start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _step(hooked: Hooked, q: Tensor, held: CachedKV, call: AttentionCall) -> Tensor:
    """One query a row against its keys, its prefix among them. q: (1, H, B, D) -> (1, H, B, D)

    Queries that share a head of keys are the rows of one product, so no key is copied.
    """
    by_kernel = held.kept is not None and hooked.bias_module is None and call.softcap is None
    by_kernel = by_kernel and enabled("cached_attention")
    library, window = usable(q, held.keys, held.values) if by_kernel else None, call.window
    if library is not None and held.kept is not None and q.stride(3) == 1:
        near = 0 if window is None or hooked.site.group == "cross" else window
        rows = q[0].transpose(0, 1)  # (B, H, D)
        return library.attend_step(held.kept, rows, held.keys, held.values, call.scaling, near).transpose(0, 1)[None]
    B, heads = held.keys.shape[:2]
    queries = q[0].transpose(0, 1).reshape(B, heads, -1, q.shape[3])  # (B, H_kv, G, D)
    place = ("held", hooked.site.group, held.number, window, id(hooked.bias_module))
    memo = hooked.context.memo
    if place not in memo:
        memo[place] = _held_bias(hooked, held, window, q)
    output = attend(queries, held.keys, held.values, memo[place], call.scaling, softcap=call.softcap)
    return output.reshape(B, -1, q.shape[3]).transpose(0, 1)[None]


def _held_bias(hooked: Hooked, held: CachedKV, window: int | None, q: Tensor) -> Tensor | None:
    """What hides the keys that are not there or out of the window, and T5's bias: (B, H or 1, 1, S), or None."""
    crossing = hooked.site.group == "cross"
    if held.full and (crossing or (window is None and hooked.bias_module is None)):
        return None
    column = torch.arange(held.keys.shape[2], device=q.device)[None]  # (1, S)
    newest = held.lengths[:, None] - 1  # (B, 1)
    hidden = column > newest
    if window is not None and not crossing:
        hidden = hidden | ((newest - column >= window) & (column >= held.prefixes[:, None]))
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, torch.finfo(q.dtype).min)
    bias = bias[:, None, None]  # (B, 1, 1, S)
    if hooked.bias_module is not None:
        own = relative_bias(hooked, column - newest)  # (1, H, B, S): a row for each query
        bias = bias + own[0].transpose(0, 1)[:, :, None].to(q.dtype)
    return bias


def _layout(hooked: Hooked, device: torch.device) -> BlockLayout:
    """The blocks of this batch's rows: once a batch for all layers of a group."""
    context, site = hooked.context, hooked.site
    place = ("layout", site.group)
    if place not in context.memo:
        assert context.lengths is not None
        rows = range(len(next(iter(context.lengths.values()))))
        # a prefix has every layer of a group or none, so this layer speaks for all
        kinds = [slot if hooked.prefix(slot := context.slot_of(row), site) is not None else BARE for row in rows]
        queries = context.spans("encoder" if site.group == "encoder" else "decoder")
        keys = context.spans("encoder") if site.group == "cross" else queries
        context.memo[place] = BlockLayout.of(queries, keys, kinds, device)
    layout: BlockLayout = context.memo[place]
    return layout


def _block_bias(hooked: Hooked, queries: BlockSide, keys: BlockSide, window: int | None, q: Tensor) -> Tensor | None:
    """The mask and position bias of one block: (B or 1, H or 1, T or 1, S), or None. Padding keys are hidden.

    A causal row needs no mask for its padding: it lies behind every real token.
    """
    bias = _row_bias(hooked, queries.longest, keys.longest, window, q)
    if not keys.padded or (hooked.site.causal and hooked.site.group != "cross"):
        return bias
    memo, place = hooked.context.memo, ("padding", keys.lengths)
    if place not in memo:
        column = torch.arange(keys.longest, device=q.device)
        hidden = column >= torch.tensor(keys.lengths, device=q.device)[:, None]  # (B, S)
        nothing = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        memo[place] = nothing.masked_fill(hidden, torch.finfo(q.dtype).min)[:, None, None]
    padding: Tensor = memo[place]
    return padding if bias is None else bias + padding


def _row_bias(hooked: Hooked, t: int, s: int, window: int | None, q: Tensor) -> Tensor | None:
    """The mask and position bias of rows of t queries and s keys: (1, H or 1, t, s), or None."""
    site, memo = hooked.site, hooked.context.memo
    if site.group == "cross" or (not site.causal and window is None and hooked.bias_module is None):
        return None
    place = (site.group, t, window, id(hooked.bias_module))
    if place not in memo:
        relative = torch.arange(s, device=q.device)[None] - torch.arange(t, device=q.device)[:, None]  # key - query
        hidden = torch.zeros_like(relative, dtype=torch.bool)
        if site.causal:
            hidden |= relative > 0
        if window is not None:
            hidden |= relative.abs() >= window
        bias = torch.zeros(t, s, dtype=q.dtype, device=q.device).masked_fill(hidden, torch.finfo(q.dtype).min)[
            None, None
        ]
        if hooked.bias_module is not None:
            bias = bias + relative_bias(hooked, relative).to(q.dtype)
        memo[place] = bias
    found: Tensor = memo[place]
    return found


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a[..., : b.shape[-1]] + b


def register() -> None:
    """Make the function known to transformers by name; `eager_mask` always hands over a mask where one is needed."""
    AttentionInterface.register(NAME, routed_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
