"""The key-value cache: what was said so far, as every attention layer sees it. Knows lanes, lengths and tensors.

A sequence has a lane in a block: the same place in a tensor (lanes, H_kv, S, D) of keys and one of values a layer.
Blocks differ in S, a power of two, so a lane is at most twice as long as asked for. The lanes of a block that are in
use are its first ones, whatever comes and goes, so a step reads them as they lie and copies nothing. A prefix stands at
the beginning of its sequence's own lane; nothing is shared between lanes. A lane that is given back is zeroed.

Refuses to know adapters, tokens and who may have how much: `scheduler` counts by `capacity`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turret.adapters.batch_context import AdapterPoolProtocol, CachedKV
from turret.adapters.fused.blocks import rounded
from turret.families import Site
from turret.kernels import CachedKVArguments, usable

SHORTEST = 32  # tokens of the shortest lane
STEPS = ((256, 16), (1024, 64), (1 << 62, 256))  # how many of a block's tokens a step looks at, rounded up


def capacity(tokens: int) -> int:
    """Tokens that a lane for so many takes; none for none."""
    return 0 if tokens <= 0 else max(SHORTEST, 1 << (tokens - 1).bit_length())


@dataclass(eq=False)
class KVSlot:
    """One sequence's place, and how much of it is in use: tokens by group, its prefix included."""

    block: KVBlock
    index: int
    lengths: dict[str, int] = field(default_factory=dict)
    prefixes: dict[str, int] = field(default_factory=dict)


class KVBlock:
    """Lanes of equal length. sizes: S by group."""

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
        """Room for so many more lanes: opened one by one they would have everything copied at every doubling."""
        wanted = len(self.kv_slots) + count
        if wanted > self.room:
            self._resize(1 << (wanted - 1).bit_length())

    def open(self) -> KVSlot:
        self.reserve(1)
        kv_slot = KVSlot(self, len(self.kv_slots), dict.fromkeys(self.sizes, 0), dict.fromkeys(self.sizes, 0))
        self.kv_slots.append(kv_slot)
        return kv_slot

    def close(self, kv_slot: KVSlot) -> None:
        """Its place is taken by the last lane, and the last place is zeroed: a NaN would reach through any mask."""
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
        """Every lane becomes what its source was before: beams that go on from other beams."""
        moved = [(kv_slot, source) for kv_slot, source in zip(kv_slots, sources, strict=True) if kv_slot is not source]
        if not moved:
            return
        device = next(iter(self.stored.values()))[0].device
        to = torch.tensor([kv_slot.index for kv_slot, _ in moved], device=device)
        of = torch.tensor([source.index for _, source in moved], device=device)
        for group, layers in self.stored.items():
            used = max(source.lengths[group] for _, source in moved)
            for stored in layers:
                stored[:, to, :, :used] = stored[:, of, :, :used]
        for kv_slot, lengths, prefixes in [(kv_slot, dict(s.lengths), dict(s.prefixes)) for kv_slot, s in moved]:
            kv_slot.lengths, kv_slot.prefixes = lengths, prefixes

    def _resize(self, room: int) -> None:
        kept = min(room, len(self.kv_slots))
        for layers in self.stored.values():
            for number, stored in enumerate(layers):
                grown = stored.new_empty(2, room, *stored.shape[2:])
                grown[:, :kept] = stored[:, :kept]
                grown[:, kept:] = 0.0
                layers[number] = grown
        self.room = room


class KeyValueCache:
    """All lanes, by the lengths they have."""

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
    def bytes(self) -> int:
        """Of all tensors, in use or not."""
        every = [each for block in self._blocks.values() for layers in block.stored.values() for each in layers]
        return sum(each.numel() * each.element_size() for each in every)

    def reserve(self, kv_slots: Sequence[Mapping[str, int]]) -> None:
        """Room for lanes of so many tokens each that will be opened now."""
        counts = Counter(map(self._sizes, kv_slots))
        if not counts.keys() <= self._blocks.keys():
            self._blocks = {sizes: block for sizes, block in self._blocks.items() if block.kv_slots or sizes in counts}
        for sizes, count in counts.items():
            if sizes not in self._blocks:
                named = dict(zip(self._sites, sizes, strict=True))
                self._blocks[sizes] = KVBlock(self._sites, named, self._like)
            self._blocks[sizes].reserve(count)

    def open(self, tokens: Mapping[str, int]) -> KVSlot:
        """A lane for at most so many tokens of each group, empty."""
        sizes = self._sizes(tokens)
        if sizes not in self._blocks:
            self.reserve([tokens])
        return self._blocks[sizes].open()

    def _sizes(self, tokens: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(capacity(tokens[group]) for group in self._sites)

    def close(self, kv_slot: KVSlot) -> None:
        kv_slot.block.close(kv_slot)


class PassCache:
    """What the attention function asks of the cache in one pass (`route.Cache`).

    fresh: a lane (or None: nothing is kept) a fresh row, its slot, and its (start, end) among the tokens of each
    stream. steps: the lanes of the rows that go on, those of a block together and in the order of its lanes.
    """

    def __init__(
        self,
        adapter_pool: AdapterPoolProtocol,
        fresh: Sequence[tuple[KVSlot | None, int, Mapping[str, tuple[int, int]]]],
        tokens: Mapping[str, int],
        steps: Sequence[KVSlot],
        device: torch.device,
    ) -> None:
        self._bank, self._fresh, self._tokens, self._device = adapter_pool, fresh, tokens, device
        self._parts: list[list[KVSlot]] = []
        for kv_slot in steps:
            if not self._parts or self._parts[-1][0].block is not kv_slot.block:
                self._parts.append([])
            assert kv_slot.index == len(self._parts[-1]), (
                "lanes that take a step are the first of their block, in order"
            )
            self._parts[-1].append(kv_slot)
        self._known: dict[str, list[_Known]] = {}

    def fresh(self, stream: str) -> int:
        return self._tokens[stream]

    def keep(self, group: str, layer: int, keys: Tensor, values: Tensor) -> None:
        stream = "encoder" if group == "cross" else "decoder"
        for kv_slot, slot, spans in self._fresh:
            if kv_slot is None:
                continue
            stored, (start, end), at = kv_slot.block.stored[group][layer], spans[stream], 0
            prefix = self._bank.keys_values(slot, group, layer)
            if prefix is not None:
                at = prefix[0].shape[1]
                stored[0, kv_slot.index, :, :at], stored[1, kv_slot.index, :, :at] = prefix
            stored[0, kv_slot.index, :, at : at + end - start] = keys[0, :, start:end]
            stored[1, kv_slot.index, :, at : at + end - start] = values[0, :, start:end]

    def step(self, group: str, layer: int, keys: Tensor | None, values: Tensor | None) -> list[CachedKV]:
        if group not in self._known:
            self._known[group] = [self._lengths(group, part) for part in self._parts]
        held, start = [], 0
        for number, (part, known) in enumerate(zip(self._parts, self._known[group], strict=True)):
            stored, count = part[0].block.stored[group][layer], len(part)
            both = stored[:, :count, :, : known.longest]
            if keys is not None and values is not None:
                new = (each[0, :, start : start + count].transpose(0, 1) for each in (keys, values))  # (B, H_kv, D)
                known.keep(both[0], both[1], *new)
            held.append(CachedKV(number, both[0], both[1], known.lengths, known.prefixes, known.full, known.kept))
            start += count
        return held

    def _lengths(self, group: str, part: Sequence[KVSlot]) -> _Known:
        new = 0 if group == "cross" else 1
        lengths = [kv_slot.lengths[group] + new for kv_slot in part]
        longest = min(rounded(max(lengths), STEPS), part[0].block.sizes[group])
        prefixes = torch.tensor([kv_slot.prefixes[group] for kv_slot in part], device=self._device)
        numbers = torch.tensor(lengths, device=self._device)
        like = part[0].block.stored[group][0][0, : len(part), :, :longest]
        kept = CachedKVArguments(numbers, prefixes, like) if usable(like) is not None else None
        return _Known(numbers, prefixes, longest, min(lengths) == longest, kept)


@dataclass(frozen=True)
class _Known:
    """What all layers of a group have in common in one pass, of the lanes of one block.

    lengths: tokens a row with its new one, prefixes: those of its prefix, (B,) int64; longest: tokens to look at.
    """

    lengths: Tensor
    prefixes: Tensor
    longest: int
    full: bool  # no row has fewer
    kept: CachedKVArguments | None

    def keep(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """The newest token of every row. keys, values: (B, H_kv, S, D), new ones: (B, H_kv, D)."""
        library = usable(keys, new_keys, new_values)
        alike = new_keys.stride() == new_values.stride() and new_keys.stride(-1) == 1
        if library is not None and self.kept is not None and alike:
            library.keep_step(self.kept, keys, values, new_keys, new_values)
            return
        rows, newest = torch.arange(len(self.lengths), device=keys.device), self.lengths - 1
        keys[rows, :, newest], values[rows, :, newest] = new_keys, new_values
