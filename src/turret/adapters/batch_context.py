"""Which rows of the batch under way carry which adapter: the small object that both hooks read.

A route belongs to one attached model, not to the process. It knows numbers of slots and lengths, and refuses to know
what a slot holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from turret.adapters.fused.dropout import Masks
from turret.kernels import AdapterSpans, CachedKVArguments, Int8Matrix, Library

BARE = 0  # the slot of the bare base: no adapter at all


class RoundedMatrix(NamedTuple):
    """A frozen matrix in 8 bits, of which version of its numbers; the matrix too, so that its address stays its own."""

    matrix: Tensor
    version: int
    rounded: Int8Matrix


@dataclass(frozen=True)
class CachedKV:
    """What a cache holds of some rows at one attention site, their newest token included, and which rows they are.

    keys, values: (B, H_kv, S, D), of which the first `lengths` of each row count, `prefixes` of them its prefix.
    number: tells these rows from others of the same pass, for what is computed once for all layers of a group.
    """

    number: int
    keys: Tensor
    values: Tensor
    lengths: Tensor  # (B,) int64
    prefixes: Tensor  # (B,) int64
    full: bool  # every row has S tokens
    kept: CachedKVArguments | None = None  # the same for the kernels, where there are some


class KVCacheProtocol(Protocol):
    """The keys and values of earlier passes, where somebody other than transformers keeps them.

    The tokens of a pass are first those of prefill rows, as `BatchContext.lengths` says, then one token of each row
    that the cache knows already.
    """

    def fresh(self, stream: str) -> int:
        """How many tokens of a stream belong to fresh rows."""
        ...

    def keep(self, group: str, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take the fresh rows' keys and values, (1, H_kv, N, D)."""
        ...

    def step(self, group: str, layer: int, keys: Tensor | None, values: Tensor | None) -> Sequence[CachedKV]:
        """Take the new token of every known row, (1, H_kv, B, D), and give all that is held of these rows, in order."""
        ...


class AdapterPoolProtocol(Protocol):
    """Where the adapters of a pass are, if they are not in the slots of the modules.

    library: the kernels that compute the pass under way, or None.
    """

    library: Library | None

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """A routed linear layer of the base on x, and delta(x) of every row's adapter."""
        ...

    def number(self, layer: Any) -> int:
        """What a routed linear layer is called in `spans`."""
        ...

    def spans(self, stream: str) -> AdapterSpans | None:
        """The adapters of the pass under way as the kernels read them; None where no token has one."""
        ...

    def keys_values(self, slot: int, group: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """A slot's prefix at one site: (key, value), each (H_kv, P, D)."""
        ...

    def prefix_length(self, slot: int) -> int: ...


@dataclass
class BatchContext:
    """Where each row goes.

    slots: one slot a row, or None when every row takes `active`.
    lengths: tokens a row, by stream ("encoder", "decoder"); None for a padded batch (B, T, D). With lengths the batch
        is unpadded: the rows lie one behind another in one row of tokens (1, N, D), N = sum(lengths).
    capture: when a dictionary, the attention hook leaves each site's keys and values in it.
    in_body: an unpadded pass through the body is under way, so a pooler sees all tokens as one row.
    """

    active: int = BARE
    slots: tuple[int, ...] | None = None
    lengths: Mapping[str, tuple[int, ...]] | None = None
    capture: dict[str, tuple[Tensor, Tensor]] | None = None
    in_body: bool = False
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict)  # layouts and biases of this batch's lengths
    masks: Masks | None = None  # of the unpadded pass under way
    adapter_pool: AdapterPoolProtocol | None = None  # has the adapters instead of the modules' slots
    cache: KVCacheProtocol | None = None  # has the keys and values of earlier passes
    read: Tensor | None = None  # the only tokens whose last hidden states anybody reads, (B,) int64; None for all
    int8: bool = False  # frozen layers multiply in 8 bits where a gradient is wanted
    rounded: dict[tuple[int, bool], RoundedMatrix] | None = None  # of a small base: (address, turned) -> in 8 bits
    positions: Mapping[str, Tensor] | None = None  # of every unpadded token, ready made: (N,) int64 a stream

    @property
    def serves(self) -> bool:
        """Whether an engine answers by this model: then kernels compute what they can, for the bare base as well."""
        return self.adapter_pool is not None

    def slot_of(self, row: int) -> int:
        return self.active if self.slots is None else self.slots[row]

    def single(self) -> int | None:
        """The one slot that all rows take, or None for a mixed batch."""
        if self.slots is None:
            return self.active
        return self.slots[0] if len(set(self.slots)) == 1 else None

    def rows_by_slot(self) -> dict[int, list[int]]:
        """Rows of a mixed batch, grouped by slot in order of appearance."""
        assert self.slots is not None
        groups: dict[int, list[int]] = {}
        for row, slot in enumerate(self.slots):
            groups.setdefault(slot, []).append(row)
        return groups

    def spans(self, stream: str) -> list[tuple[int, int]]:
        """(start, end) of each row among the unpadded tokens of a stream."""
        assert self.lengths is not None
        lengths = self.lengths[stream]
        return [(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]

    def tokens_by_slot(self, stream: str, device: torch.device) -> dict[int, Tensor]:
        """Indices of the unpadded tokens of a stream, grouped by slot."""
        spans = self.spans(stream)
        return {
            slot: torch.cat([torch.arange(*spans[row], device=device) for row in rows])
            for slot, rows in self.rows_by_slot().items()
        }


@contextmanager
def set_context(
    context: BatchContext,
    slots: Sequence[int] | None,
    lengths: Mapping[str, Sequence[int]] | None,
    in_body: bool = False,
    read: Tensor | None = None,
) -> Iterator[None]:
    """Point `route` at another batch for the length of the block."""
    before = context.slots, context.lengths, context.in_body, context.memo, context.masks, context.read
    context.slots = None if slots is None else tuple(slots)
    context.lengths = None if lengths is None else {name: tuple(each) for name, each in lengths.items()}
    context.in_body, context.memo, context.read = in_body, {}, read
    context.masks = None if lengths is None else Masks()
    try:
        yield
    finally:
        context.slots, context.lengths, context.in_body, context.memo, context.masks, context.read = before
