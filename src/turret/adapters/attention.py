"""The second hook: one attention function, registered with transformers under the name "turret".

It computes every attention of an attached model: padded or unpadded rows, causal or not, cross-attention, grouped
queries, sliding windows, capped scores, T5's position bias, and each row's prefix before the keys. The prefix never
enters the key-value cache. An argument that is neither computed here nor in `HARMLESS` is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from turret.adapters.batch_context import BARE, BatchContext, CachedKV
from turret.errors import AdapterError
from turret.families.family import Family, Site
from turret.ops.attention import BlockLayout, BlockSide, attend, attend_rows
from turret.ops.core import to_device
from turret.ops.dropout import Masks
from turret.ops.structs import NO_DROPOUT, AttentionRows, DropoutArguments, Prefixes
from turret.ops.table import ops_for
from turret.transformer import Submodule

# --- attention --------------------------------------------------------------------------------------------------------


NAME = "turret"
KeysValues = Callable[[int, Site], tuple[Tensor, Tensor] | None]
HARMLESS = {  # arguments that models pass and that do not change attention's output, and why
    "deterministic": "a setting of the flash-attention library, which is not called",
    "labels": "the loss reads them; `generate` passes them to an encoder",
    "num_items_in_batch": "the loss is divided by it",
    "output_hidden_states": "transformers collects them from the layers",
    "position_ids": "queries and keys are rotated already, and the mask separates packed texts",
    "return_dict": "the form of the model's output",
    "token_type_ids": "a model with segments has embedded them",
    "use_cache": "keys and values are cached before the call",
}


@dataclass(frozen=True)
class Hooked:
    """What an attention module of an attached model carries.

    Args:
        site: the module's place in the model.
        context: of the model.
        prefix: (slot, site) -> keys and values (H, P, D), or None.
        family: of the model.
        bias_module: the owner of the stack's bias by relative position, if there is one.
        last: whether it is the model's last site, whose only queries are `BatchContext.read`.
    """

    site: Site
    context: BatchContext
    prefix: KeysValues
    family: Family
    bias_module: Submodule | None
    last: bool = False


class AttentionCall(NamedTuple):
    """The settings of one attention call."""

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
    **others: Any,  # whatever the architecture passes
) -> tuple[Tensor, None]:
    """The function that transformers calls.

    Args:
        module: the attention module that calls.
        query: (B, H, T, D).
        key: (B, H_kv, S, D).
        value: (B, H_kv, S, D).
        attention_mask: added to the scores; broadcasts to (B, H, T, S).
        scaling: of the scores; None for 1 / sqrt(D).
        dropout: rate, on the probabilities.
        position_bias: added to the scores (T5).
        sliding_window: |key - query| below it is visible.
        softcap: largest score.
        others: `HARMLESS` arguments.

    Returns:
        ((B, T, H, D), None).

    Raises:
        AdapterError: an unknown argument, or nothing is attached to the model.
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
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):  # rotary positions made q and k float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    context = hooked.context
    if context.capture is not None:
        context.capture[hooked.site.name] = (key, value)
    if context.cache is None and context.lengths is None:
        output = _attend_padded(hooked, query, key, value, _sum(attention_mask, position_bias), call)
        return output.transpose(1, 2).contiguous(), None  # (B, T, H, D)
    if position_bias is not None and hooked.bias_module is None and hooked.site.group != "cross":
        raise AdapterError(
            f"{hooked.site.name} adds a position_bias that turret cannot compute for unpadded rows: expected one from "
            "relative_attention_bias; use a base of another family"
        )
    return attend_in_pass(hooked, query, key, value, call).transpose(1, 2).contiguous(), None  # (B, T, H, D)


def attend_in_pass(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Attention of the rows of an unpadded pass, and of rows that decode. q: (1, H, N, D); k, v: (1, H_kv, M, D)."""
    compute = (
        _attend_cached if hooked.context.cache is not None and hooked.site.group != "encoder" else _attend_unpadded
    )
    return compute(hooked, q, k, v, call)


def _require_known(site: Site, others: Mapping[str, Tensor | bool | float | str | None]) -> None:
    """Raise AdapterError for an argument that changes the output and is not computed here. None counts as not given."""
    for name, value in others.items():
        if name in HARMLESS or value is None or (name == "output_attentions" and not value):
            continue
        if name == "is_causal" and value == site.causal:
            continue
        raise AdapterError(
            f"attention of {site.name} was given {name}, which turret does not compute here: expected only scaling, "
            "dropout, position_bias, sliding_window and softcap; call the model without it, or detach first"
        )


def _attend_padded(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: AttentionCall) -> Tensor:
    context, site = hooked.context, hooked.site
    if bias is None and site.causal and q.shape[2] > 1:
        raise AdapterError(
            f"{site.name} is causal but was given no mask: pass attention_mask, or let transformers make the mask"
        )
    if bias is not None:
        bias = bias[..., : k.shape[2]].to(q.dtype)
    slot, masks = context.single(), context.masks or Masks()
    dropped = masks.arguments(call.dropout, lambda: masks.keys_of(q[:, 0]).view(q.shape[0], q.shape[2]))
    if slot is not None:
        return _one_slot(hooked, slot, q, k, v, bias, call, dropped)
    output = torch.empty_like(q)
    for slot, rows in context.rows_by_slot().items():
        index = to_device(torch.tensor(rows), q.device)
        rows_bias = bias[index] if bias is not None and bias.shape[0] > 1 else bias
        own = dropped if dropped.keys is None else replace(dropped, keys=dropped.keys[index], memo={})
        part = _one_slot(hooked, slot, q[index], k[index], v[index], rows_bias, call, own)
        output = output.index_copy(0, index, part)
    return output


def _one_slot(
    hooked: Hooked,
    slot: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    call: AttentionCall,
    dropped: DropoutArguments,
) -> Tensor:
    """Attention of rows with one slot to [prefix; keys], with a bias widened by the prefix's columns."""
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
    return attend(q, k, v, bias, call.scaling, dropped, call.softcap)


def _prefix_bias(hooked: Hooked, tokens: int, q: Tensor, past: int) -> Tensor:
    """Position bias of the prefix's columns: zero, or T5's own for positions -P … -1. (1, H or 1, T, P)"""
    if hooked.bias_module is None:
        return q.new_zeros(1, 1, q.shape[2], tokens)
    positions = torch.arange(q.shape[2], device=q.device)[:, None] + past
    relative = torch.arange(-tokens, 0, device=q.device)[None] - positions  # (T, P)
    return relative_bias(hooked, relative).to(q.dtype)


def relative_bias(hooked: Hooked, relative: Tensor) -> Tensor:
    """The bias of a site for relative positions key - query: (T, S) int64 -> (1, H, T, S)."""
    assert hooked.family.relative_bias is not None
    assert hooked.bias_module is not None
    return hooked.family.relative_bias.values(hooked.bias_module, relative)


def _attend_unpadded(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Each row of an unpadded batch attends to itself, or in cross-attention to its source. -> (1, H, N, D)"""
    ops, masks = ops_for(q, k, v), hooked.context.masks or Masks()
    stream = "encoder" if hooked.site.group == "encoder" else "decoder"
    dropped = masks.arguments(call.dropout, lambda: masks.tokens(stream, q.device))
    if call.softcap is None and ops.attends:
        rows, prefixes = rows_and_prefixes(hooked, call.scaling, call.window, k.dtype)
        if ops.takes_attention(rows, prefixes, q.shape[3], call.dropout):
            return attend_rows(ops, rows, q, k, v, prefixes, dropped)
    return _unpadded_plainly(hooked, q, k, v, call, dropped)


def rows_and_prefixes(
    hooked: Hooked, scaling: float, window: int | None, dtype: torch.dtype
) -> tuple[AttentionRows, Prefixes]:
    """The rows of an unpadded batch at one site, and their prefixes, as the kernels take them."""
    context, site = hooked.context, hooked.site
    assert context.lengths is not None
    read = context.read if hooked.last else None
    key: tuple[Hashable, ...] = ("rows", site.group, window, scaling, id(hooked.bias_module), read is None)
    known: tuple[AttentionRows, Prefixes] | None = context.memo.get(key)
    if known is not None:  # no row has a prefix, so all layers share this
        return known
    slots = [context.slot_of(row) for row in range(len(next(iter(context.lengths.values()))))]
    pairs = {slot: pair for slot in dict.fromkeys(slots) if slot != BARE and (pair := hooked.prefix(slot, site))}
    if (with_slots := (*key, tuple(pairs))) not in context.memo:
        longest = max((pair[0].shape[1] for pair in pairs.values()), default=0)
        context.memo[with_slots] = _rows(hooked, scaling, window, longest, read)
    order = {slot: index for index, slot in enumerate(pairs)}
    prefixes = Prefixes([(k.to(dtype), v.to(dtype)) for k, v in pairs.values()], [*map(order.get, slots)])
    found = context.memo[with_slots], prefixes
    if not pairs:
        context.memo[key] = found
    return found


def _rows(
    hooked: Hooked, scaling: float, window: int | None, longest_prefix: int, read: Tensor | None
) -> AttentionRows:
    """The place of each row and what it sees: once per batch for all layers of a group, and once for the last."""
    context, site = hooked.context, hooked.site
    queries = torch.tensor(context.spans("encoder" if site.group == "encoder" else "decoder"))  # (B, 2)
    cross = site.group == "cross"
    keys = torch.tensor(context.spans("encoder")) if cross else queries
    lengths = queries[:, 1] - queries[:, 0], keys[:, 1] - keys[:, 0]
    if read is not None:  # the first token of each row; the row that fills the batch up has none
        lengths = (torch.arange(len(queries)) < len(read)).long(), lengths[1]
    bias, zero = None, 0
    if hooked.bias_module is not None and not cross:
        zero = longest_prefix + int(lengths[0].max())
        with torch.no_grad():
            device = next(hooked.bias_module.parameters()).device
            relative = torch.arange(-zero, int(lengths[1].max()), device=device)
            bias = relative_bias(hooked, relative[None])[0, :, 0].float().contiguous()  # (H, W)
    return AttentionRows(
        queries[:, 0].contiguous(),
        lengths[0],
        keys[:, 0].contiguous(),
        lengths[1],
        scaling,
        causal=site.causal and not cross,
        window=0 if window is None or cross else window,
        bias=bias,
        zero=zero,
        all_asked=read is None,
    )


def _unpadded_plainly(
    hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, dropped: DropoutArguments = NO_DROPOUT
) -> Tensor:
    """The same block by block in torch's operations: the reference of the kernels, and the path without them."""
    layout = _layout(hooked, q.device)
    parts = []
    for block in layout.blocks:
        bias = _block_bias(hooked, block.queries, block.keys, call.window, q)
        queries, keys, values = block.queries.block(q), block.keys.block(k), block.keys.block(v)
        own = dropped
        if dropped.keys is not None:
            of_block = dropped.keys.index_select(0, block.queries.places).view(queries.shape[0], -1)
            own = replace(dropped, keys=of_block, memo={})
        output = _one_slot(hooked, block.kind, queries, keys, values, bias, call, own)
        parts.append(block.queries.unblock(output))
    return layout.join(parts)


def _attend_cached(hooked: Hooked, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Prefill rows as in `_attend_unpadded`, then one token of each decode row against its cached keys and values."""
    context, site = hooked.context, hooked.site
    cache, cross = context.cache, site.group == "cross"
    assert cache is not None
    prefill, keys = cache.fresh("decoder"), cache.fresh("encoder" if cross else "decoder")
    parts = []
    if prefill:
        own = k[:, :, :keys], v[:, :, :keys]
        cache.keep(site.group, site.layer, *own)
        parts.append(_attend_unpadded(hooked, q[:, :, :prefill], *own, call))
    if prefill < q.shape[2]:
        new = (None, None) if cross else (k[:, :, keys:], v[:, :, keys:])
        start = prefill
        for cached in cache.step(site.group, site.layer, *new):
            end = start + cached.keys.shape[0]
            parts.append(_step(hooked, q[:, :, start:end], cached, call))
            start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _step(hooked: Hooked, q: Tensor, cached: CachedKV, call: AttentionCall) -> Tensor:
    """One query for each row against the row's keys, its prefix among them. q: (1, H, B, D) -> (1, H, B, D)

    Queries that share a head of keys are the rows of one product, so no key is copied.
    """
    window, cross = call.window, hooked.site.group == "cross"
    if cached.kept is not None and hooked.bias_module is None and call.softcap is None:
        near = 0 if window is None or cross else window
        y = cached.kept.attend(q[0].transpose(0, 1), cached.keys, cached.values, call.scaling, near)  # (B, H, D)
        if y is not None:
            return y.transpose(0, 1)[None]
    B, heads = cached.keys.shape[:2]
    queries = q[0].transpose(0, 1).reshape(B, heads, -1, q.shape[3])  # (B, H_kv, G, D)
    memo, key = hooked.context.memo, ("cached", hooked.site.group, cached.number, window, id(hooked.bias_module))
    if key not in memo:
        memo[key] = _cached_bias(hooked, cached, window, q)
    output = attend(queries, cached.keys, cached.values, memo[key], call.scaling, softcap=call.softcap)
    return output.reshape(B, -1, q.shape[3]).transpose(0, 1)[None]


def _cached_bias(hooked: Hooked, cached: CachedKV, window: int | None, q: Tensor) -> Tensor | None:
    """Hides keys that are not valid or outside the window, and adds T5's bias: (B, H or 1, 1, S), or None."""
    cross = hooked.site.group == "cross"
    if cached.full and (cross or (window is None and hooked.bias_module is None)):
        return None
    column = torch.arange(cached.keys.shape[2], device=q.device)[None]  # (1, S)
    newest = cached.lengths[:, None] - 1  # (B, 1)
    hidden = column > newest
    if window is not None and not cross:
        hidden = hidden | ((newest - column >= window) & (column >= cached.prefixes[:, None]))
    bias = _hiding(hidden, q)[:, None, None]  # (B, 1, 1, S)
    if hooked.bias_module is not None:
        own = relative_bias(hooked, column - newest)  # (1, H, B, S): a row for each query
        bias = bias + own[0].transpose(0, 1)[:, :, None].to(q.dtype)
    return bias


def _hiding(hidden: Tensor, q: Tensor) -> Tensor:
    """The bias that hides keys: the lowest number of q's dtype where `hidden`, else 0."""
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, torch.finfo(q.dtype).min)


def _layout(hooked: Hooked, device: torch.device) -> BlockLayout:
    """The blocks of this batch's rows: once per batch for all layers of a group."""
    context, site = hooked.context, hooked.site
    key = ("layout", site.group)
    if key not in context.memo:
        assert context.lengths is not None
        rows = range(len(next(iter(context.lengths.values()))))
        # a prefix covers every layer of a group or none, so this layer stands for all
        kinds = [slot if hooked.prefix(slot := context.slot_of(row), site) is not None else BARE for row in rows]
        queries = context.spans("encoder" if site.group == "encoder" else "decoder")
        keys = context.spans("encoder") if site.group == "cross" else queries
        context.memo[key] = BlockLayout.of(queries, keys, kinds, device)
    return context.memo[key]


def _block_bias(hooked: Hooked, queries: BlockSide, keys: BlockSide, window: int | None, q: Tensor) -> Tensor | None:
    """The mask and position bias of one block: (B or 1, H or 1, T or 1, S), or None. Padding keys are hidden.

    A causal row needs no mask for its padding, which comes after every real token.
    """
    bias = _row_bias(hooked, queries.longest, keys.longest, window, q)
    if not keys.padded or (hooked.site.causal and hooked.site.group != "cross"):
        return bias
    memo, key = hooked.context.memo, ("padding", keys.lengths)
    if key not in memo:
        hidden = torch.arange(keys.longest, device=q.device) >= to_device(torch.tensor(keys.lengths), q.device)[:, None]
        memo[key] = _hiding(hidden, q)[:, None, None]  # (B, 1, 1, S)
    padding: Tensor = memo[key]
    return padding if bias is None else bias + padding


def _row_bias(hooked: Hooked, t: int, s: int, window: int | None, q: Tensor) -> Tensor | None:
    """The mask and position bias of rows of t queries and s keys: (1, H or 1, t, s), or None."""
    site, memo = hooked.site, hooked.context.memo
    if site.group == "cross" or (not site.causal and window is None and hooked.bias_module is None):
        return None
    key = (site.group, t, window, id(hooked.bias_module))
    if key not in memo:
        relative = torch.arange(s, device=q.device)[None] - torch.arange(t, device=q.device)[:, None]  # key - query
        hidden = torch.zeros_like(relative, dtype=torch.bool)
        if site.causal:
            hidden |= relative > 0
        if window is not None:
            hidden |= relative.abs() >= window
        bias = _hiding(hidden, q)[None, None]
        if hooked.bias_module is not None:
            bias = bias + relative_bias(hooked, relative).to(q.dtype)
        memo[key] = bias
    return memo[key]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a[..., : b.shape[-1]] + b


def register() -> None:
    """Register the function with transformers; `eager_mask` always makes a mask where one is needed."""
    AttentionInterface.register(NAME, routed_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
