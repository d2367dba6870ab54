"""The KV cache: keys and values of earlier tokens, for every attention layer.

A sequence has one KV slot in a block. A block has, for each layer, one tensor (2, slots, H_kv, S, D) of keys and
values. S is a power of two, so a slot is at most twice as long as needed. The slots in use are always the first of
their block, so a decode step reads them in place. The prefix of an adapter is copied to the start of the slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turret.adapters.batch_context import AdapterPoolProtocol, CachedKV
from turret.families.family import Site
from turret.ops.attention import rounded_size
from turret.ops.core import KVStep, to_device
from turret.ops.table import ops_for

SHORTEST = 32  # tokens of the shortest slot
STEPS = ((256, 16), (1024, 64), (1 << 62, 256))  # a step reads S rounded up: to 256 tokens by 16, and so on


def capacity(tokens: int) -> int:
    """Tokens of the slot that holds so many: a power of two, or 0."""
    return 0 if tokens <= 0 else max(SHORTEST, 1 << (tokens - 1).bit_length())


@dataclass(eq=False)
class KVSlot:
    """The place of one sequence in a block.

    lengths: tokens in use by group ("decoder", "cross"), including the prefix. prefixes: tokens of the prefix by group.
    """

    block: KVBlock
    index: int
    lengths: dict[str, int] = field(default_factory=dict)
    prefixes: dict[str, int] = field(default_factory=dict)

    def follow(self, source: KVSlot) -> None:
        """Begin with all that another slot has now. This slot has room for it."""
        for group, layers in self.block.stored.items():
            used = source.lengths[group]
            for own, theirs in zip(layers, source.block.stored[group], strict=True):
                own[:, self.index, :, :used] = theirs[:, source.index, :, :used]
        self.lengths, self.prefixes = dict(source.lengths), dict(source.prefixes)


class KVBlock:
    """KV slots of equal length. sizes: S by group."""

    def __init__(self, sites: Mapping[str, Sequence[Site]], sizes: Mapping[str, int], like: Tensor) -> None:
        self.sizes = dict(sizes)
        self.kv_slots: list[KVSlot] = []
        self.room = 1
        self.stored = {
            group: [
                like.new_zeros(2, self.room, site.kv_heads, self.sizes[group], site.head_dim) for site in sites[group]
            ]
            for group in self.sizes
        }

    def reserve(self, count: int) -> None:
        """Make room for that many more slots at once: each growth copies the whole block."""
        needed = len(self.kv_slots) + count
        if needed > self.room:
            self._resize(1 << (needed - 1).bit_length())

    def open(self) -> KVSlot:
        """A new, empty slot."""
        self.reserve(1)
        kv_slot = KVSlot(self, len(self.kv_slots), dict.fromkeys(self.sizes, 0), dict.fromkeys(self.sizes, 0))
        self.kv_slots.append(kv_slot)
        return kv_slot

    def close(self, kv_slot: KVSlot) -> None:
        """Free a slot: the last slot moves to its place, and the last place is zeroed.

        A NaN left behind would pass any mask, because 0 * NaN is NaN.
        """
        last = self.kv_slots.pop()
        for layers in self.stored.values():
            for stored in layers:
                if last is not kv_slot:
                    stored[:, kv_slot.index] = stored[:, last.index]
                stored[:, last.index] = 0.0
        if last is not kv_slot:
            self.kv_slots[kv_slot.index], last.index = last, kv_slot.index
        if self.room > 4 and 4 * len(self.kv_slots) <= self.room:
            self._resize(self.room // 2)

    def copy(self, kv_slots: Sequence[KVSlot], sources: Sequence[KVSlot]) -> None:
        """Copy to each slot the contents that its source had before the call: beams continue other beams."""
        moved = [(kv_slot, source) for kv_slot, source in zip(kv_slots, sources, strict=True) if kv_slot is not source]
        if not moved:
            return
        device = next(iter(self.stored.values()))[0].device
        to, of = (to_device(torch.tensor([each.index for each in own]), device) for own in zip(*moved, strict=True))
        for group, layers in self.stored.items():
            used = max(source.lengths[group] for _, source in moved)
            for stored in layers:
                stored[:, to, :, :used] = stored[:, of, :, :used]
        for kv_slot, lengths, prefixes in [(kv_slot, dict(s.lengths), dict(s.prefixes)) for kv_slot, s in moved]:
            kv_slot.lengths, kv_slot.prefixes = lengths, prefixes

    def _resize(self, room: int) -> None:
        used = min(room, len(self.kv_slots))
        for layers in self.stored.values():
            for number, stored in enumerate(layers):
                grown = stored.new_empty(2, room, *stored.shape[2:])
                grown[:, :used] = stored[:, :used]
                grown[:, used:] = 0.0
                layers[number] = grown
        self.room = room


class KeyValueCache:
    """All KV slots, in blocks by length."""

    def __init__(self, sites: Sequence[Site], like: Tensor) -> None:
        self._sites: dict[str, list[Site]] = {}
        for site in sites:
            if site.group != "encoder":
                self._sites.setdefault(site.group, []).append(site)
        self._like = like
        self._blocks: dict[tuple[int, ...], KVBlock] = {}

    def __len__(self) -> int:
        return sum(len(block.kv_slots) for block in self._blocks.values())

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token in all layers."""
        every = [site for sites in self._sites.values() for site in sites]
        return sum(2 * site.kv_heads * site.head_dim for site in every) * self._like.element_size()

    def reserve(self, needs: Sequence[Mapping[str, int]]) -> None:
        """Make room for slots that will be opened next. needs: tokens by group of each."""
        counts = Counter(map(self._sizes, needs))
        if not counts.keys() <= self._blocks.keys():
            self._blocks = {sizes: block for sizes, block in self._blocks.items() if block.kv_slots or sizes in counts}
        for sizes, count in counts.items():
            if sizes not in self._blocks:
                named = dict(zip(self._sites, sizes, strict=True))
                self._blocks[sizes] = KVBlock(self._sites, named, self._like)
            self._blocks[sizes].reserve(count)

    def free_empty(self) -> None:
        """Free the blocks without a slot in use."""
        self._blocks = {sizes: block for sizes, block in self._blocks.items() if block.kv_slots}

    def open(self, tokens: Mapping[str, int]) -> KVSlot:
        """A new, empty slot for at most so many tokens of each group."""
        sizes = self._sizes(tokens)
        if sizes not in self._blocks:
            self.reserve([tokens])
        return self._blocks[sizes].open()

    def _sizes(self, tokens: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(capacity(tokens[group]) for group in self._sites)

    def close(self, kv_slot: KVSlot) -> None:
        """Free a slot."""
        kv_slot.block.close(kv_slot)


class PassCache:
    """The cache as the attention function uses it in one pass (`KVCacheProtocol`).

    Args:
        adapter_pool: Has the prefixes.
        prefill: For each prefill row its KV slot (None to keep nothing), its adapter's slot, and the (start, end) of
            its tokens in each stream.
        tokens: Tokens of all prefill rows by stream.
        steps: The KV slots of the decode rows: those of a block together, in the order of the block.
        device: Of the model.
    """

    def __init__(
        self,
        adapter_pool: AdapterPoolProtocol,
        prefill: Sequence[tuple[KVSlot | None, int, Mapping[str, tuple[int, int]]]],
        tokens: Mapping[str, int],
        steps: Sequence[KVSlot],
        device: torch.device,
    ) -> None:
        self._pool, self._prefill, self._tokens, self._device = adapter_pool, prefill, tokens, device
        self._parts: list[list[KVSlot]] = []
        for kv_slot in steps:
            if not self._parts or self._parts[-1][0].block is not kv_slot.block:
                self._parts.append([])
            assert kv_slot.index == len(self._parts[-1]), "the slots that decode are the first of their block, in order"
            self._parts[-1].append(kv_slot)
        self._lengths: dict[str, list[_Lengths]] = {}  # by group, of each part

    def fresh(self, stream: str) -> int:
        return self._tokens[stream]

    def keep(self, group: str, layer: int, keys: Tensor, values: Tensor) -> None:
        stream = "encoder" if group == "cross" else "decoder"
        for kv_slot, slot, spans in self._prefill:
            if kv_slot is None:
                continue
            stored, (start, end), at = kv_slot.block.stored[group][layer], spans[stream], 0
            if slot < 0:  # the earlier part of the prompt is here
                at = kv_slot.lengths[group]
            elif (prefix := self._pool.keys_values(slot, group, layer)) is not None:
                at = prefix[0].shape[1]
                stored[0, kv_slot.index, :, :at], stored[1, kv_slot.index, :, :at] = prefix
            stored[0, kv_slot.index, :, at : at + end - start] = keys[0, :, start:end]
            stored[1, kv_slot.index, :, at : at + end - start] = values[0, :, start:end]

    def _measure(self, group: str) -> None:
        if group not in self._lengths:
            self._lengths[group] = [self._lengths_of(group, part) for part in self._parts]

    def step(self, group: str, layer: int, keys: Tensor | None, values: Tensor | None) -> list[CachedKV]:
        self._measure(group)
        cached, start = [], 0
        for number, (part, own) in enumerate(zip(self._parts, self._lengths[group], strict=True)):
            stored, count = part[0].block.stored[group][layer], len(part)
            both = stored[:, :count, :, : own.longest]
            if keys is not None and values is not None:
                new = (each[0, :, start : start + count].transpose(0, 1) for each in (keys, values))  # (B, H_kv, D)
                own.keep(both[0], both[1], *new)
            cached.append(CachedKV(number, both[0], both[1], own.lengths, own.prefixes, own.full, own.kept))
            start += count
        return cached

    def _lengths_of(self, group: str, part: Sequence[KVSlot]) -> _Lengths:
        new = 0 if group == "cross" else 1
        lengths = [kv_slot.lengths[group] + new for kv_slot in part]
        longest = min(rounded_size(max(lengths), STEPS), part[0].block.sizes[group])
        prefixes = to_device(torch.tensor([kv_slot.prefixes[group] for kv_slot in part]), self._device)
        numbers = to_device(torch.tensor(lengths), self._device)
        like = part[0].block.stored[group][0][0, : len(part), :, :longest]
        kept = ops_for(like).kv_step(numbers, prefixes, like)
        return _Lengths(numbers, prefixes, longest, min(lengths) == longest, kept)


@dataclass(frozen=True)
class _Lengths:
    """Lengths of the decode rows of one block in one pass; the same for all layers of a group.

    lengths: (B,) int64, tokens of each row including its new one. prefixes: (B,) int64, tokens of each prefix.
    longest: tokens to read. full: whether every row has that many. kept: the same for the kernels.
    """

    lengths: Tensor
    prefixes: Tensor
    longest: int
    full: bool
    kept: KVStep | None

    def keep(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Write the newest token of each row. keys, values: (B, H_kv, S, D); new ones: (B, H_kv, D)."""
        if self.kept is not None and self.kept.keep(keys, values, new_keys, new_values):
            return
        rows, newest = torch.arange(len(self.lengths), device=keys.device), self.lengths - 1
        keys[rows, :, newest], values[rows, :, newest] = new_keys, new_values
