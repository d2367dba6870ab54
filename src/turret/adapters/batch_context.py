"""Which adapter each row of the current batch takes: the small object that both hooks read.

A context belongs to one attached model, not to the process.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turret.ops.core import KVStep, to_device
from turret.ops.dropout import Draws, HashedDraws, Masks
from turret.ops.structs import AdapterSpans

BARE = 0  # the slot of the bare base, without an adapter
ATTACHED = 1  # the slot of the adapter that `attach` makes
REFERENCE = 2  # the slot of the adapter that a training compares its own with, if that is not the bare base


@dataclass(frozen=True)
class CachedKV:
    """The cached keys and values of some rows at one attention site, with their newest token.

    Args:
        number: tells these rows from others of the same pass; a key for what all layers of a group share.
        keys: (B, H_kv, S, D); the first `lengths` of each row are valid, and the first `prefixes` are its prefix.
        values: the same.
        lengths: (B,) int64.
        prefixes: (B,) int64.
        full: whether every row has S tokens.
        kept: the same for the kernels, if there are any.
    """

    number: int
    keys: Tensor
    values: Tensor
    lengths: Tensor
    prefixes: Tensor
    full: bool
    kept: KVStep | None = None


class KVCacheProtocol(Protocol):
    """The keys and values of earlier passes, if an engine keeps them instead of transformers.

    The tokens of a pass are first those of prefill rows (`BatchContext.lengths`), then one token of each decode row.
    """

    def fresh(self, stream: str) -> int:
        """How many tokens of a stream belong to prefill rows."""
        ...

    def keep(self, group: str, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of the prefill rows, each (1, H_kv, N, D)."""
        ...

    def step(self, group: str, layer: int, keys: Tensor | None, values: Tensor | None) -> Sequence[CachedKV]:
        """Store the new token of every decode row, (1, H_kv, B, D), and return all cached rows in order."""
        ...


class AdaptedLinear(Protocol):
    """A linear layer of the base that adapters change (`layers.RoutedLinear`)."""

    base_layer: nn.Module
    stream: str


class ReplacedModule(Protocol):
    """A module of the base that adapters replace whole (`layers.RoutedWhole`)."""

    base_module: nn.Module
    path: str
    stream: str


class AdapterPoolProtocol(Protocol):
    """The adapters of a pass, if an engine keeps them instead of the modules' slots."""

    def begin(self, slots: Sequence[int], lengths: Mapping[str, Sequence[int]], steps: Sequence[int]) -> None:
        """Lay out a pass, or what is left of it: see `engine.adapter_pool`."""
        ...

    @property
    def scales(self) -> bool:
        """Whether an adapter of the current pass scales outputs or inputs of layers, or replaces modules."""
        ...

    @property
    def replaces(self) -> bool:
        """Whether an adapter of the current pass replaces modules."""
        ...

    def linear(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        """A linear layer of the base on x, plus delta(x) of every row's adapter."""
        ...

    def products(self, layers: Sequence[AdaptedLinear], x: Tensor, plus: Tensor | None = None) -> list[Tensor]:
        """The same for layers with one input (N, D_in), plus a tensor that is added to each result."""
        ...

    def whole(self, module: ReplacedModule, x: Tensor) -> Tensor:
        """A module that some adapters replace on x, each row by its own adapter's."""
        ...

    def number(self, layer: AdaptedLinear) -> int:
        """The index of a linear layer among all that are adapted."""
        ...

    def spans(self, stream: str) -> AdapterSpans | None:
        """The adapters of the current pass as the kernels of a CPU read them; None if no token has one."""
        ...

    def keys_values(self, slot: int, group: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """A slot's prefix at one site: (key, value), each (H_kv, P, D)."""
        ...

    def prefix_length(self, slot: int) -> int: ...


@dataclass
class BatchContext:
    """The adapter and the place of each row of the current batch.

    Args:
        active: the slot of every row while `slots` is None.
        slots: a slot for each row.
        lengths: tokens of each row, by stream ("encoder", "decoder"); None for a padded batch (B, T, D). With lengths
            the batch is unpadded: the rows follow one another in one row of tokens (1, N, D), N = sum(lengths).
        capture: if a dictionary, the attention hook puts each site's keys and values into it.
        in_body: an unpadded pass through the body runs, so that a pooler sees all tokens as one row.
        memo: layouts and biases of this batch, shared by its layers.
        masks: dropout masks of the current pass.
        draws: of the training step that runs, and the numbers of the pass's examples in it; None outside of a step.
        draws_alone: whether modules draw random numbers that no hook replaced; see `HashedDraws`.
        adapter_pool: the adapters, if an engine keeps them instead of the modules' slots.
        cache: the keys and values of earlier passes, if an engine keeps them.
        read: (B,) int64, the only tokens whose last hidden states are read; None for all.
        positions: of every unpadded token, (N,) int64 for each stream, if an engine computed them.
    """

    active: int = BARE
    slots: tuple[int, ...] | None = None
    lengths: Mapping[str, tuple[int, ...]] | None = None
    capture: dict[str, tuple[Tensor, Tensor]] | None = None
    in_body: bool = False
    memo: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)  # values of several types, each by its own key
    masks: Masks | None = None
    draws: tuple[Draws, Sequence[int]] | None = None
    draws_alone: bool = True
    adapter_pool: AdapterPoolProtocol | None = None
    cache: KVCacheProtocol | None = None
    read: Tensor | None = None
    positions: Mapping[str, Tensor] | None = None

    @property
    def serves(self) -> bool:
        """Whether an engine uses this model: then kernels compute what they can, for the bare base too."""
        return self.adapter_pool is not None

    def narrow(self) -> None:
        """From here to its end the pass has one token of each row, those of `read`: tell an engine's adapters."""
        if self.adapter_pool is not None and self.read is not None and self.lengths is not None:
            assert self.slots is not None
            ones = {stream: [1] * len(self.read) for stream in self.lengths}
            self.adapter_pool.begin(self.slots, ones, ())

    def slot_of(self, row: int) -> int:
        return self.active if self.slots is None else self.slots[row]

    def single(self) -> int | None:
        """The slot that all rows take, or None for a mixed batch."""
        if self.slots is None:
            return self.active
        return self.slots[0] if len(set(self.slots)) == 1 else None

    def rows_by_slot(self) -> dict[int, list[int]]:
        """The rows of a mixed batch by slot, in order of appearance."""
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
        """Indices of the unpadded tokens of a stream, by slot."""
        spans = self.spans(stream)
        return {
            slot: torch.cat([torch.arange(*spans[row], device=device) for row in rows])
            for slot, rows in self.rows_by_slot().items()
        }

    def places_by_slot(self, stream: str, device: torch.device) -> tuple[int, dict[int, Tensor]]:
        """Where each slot's part of an input is: the dimension (0: rows, 1: unpadded tokens), and the indices there."""
        if self.lengths is not None:
            return 1, self.tokens_by_slot(stream, device)
        return 0, {slot: to_device(torch.tensor(rows), device) for slot, rows in self.rows_by_slot().items()}


def drawing_alone(context: BatchContext) -> AbstractContextManager[HashedDraws | None]:
    """Inside, modules that draw by themselves draw what the pass's masks say, if a training step runs."""
    if context.draws is None or context.masks is None or not context.draws_alone:
        return nullcontext()
    return HashedDraws(context.masks)


@contextmanager
def set_context(
    context: BatchContext,
    slots: Sequence[int] | None,
    lengths: Mapping[str, Sequence[int]] | None,
    in_body: bool = False,
    read: Tensor | None = None,
    *,
    masked: Mapping[str, Sequence[int]] | None = None,
    examples: Sequence[int] | None = None,
) -> Iterator[None]:
    """Describe another batch for the length of the block.

    Args:
        context: is changed; the next four arguments are its fields.
        masked: tokens of each row, for the dropout masks of a pass without `lengths`.
        examples: which examples of `context.draws` the rows are; None: all, in order.
    """
    before = context.slots, context.lengths, context.in_body, context.memo, context.masks, context.read
    context.slots = None if slots is None else tuple(slots)
    context.lengths = None if lengths is None else {name: tuple(each) for name, each in lengths.items()}
    context.in_body, context.memo, context.read = in_body, {}, read
    context.masks = None
    if not context.serves and (rows := masked or lengths) is not None:
        own = range(len(next(iter(rows.values())))) if examples is None else examples
        if context.draws is None:
            context.masks = Masks(None, own, rows, read)
        else:
            draws, numbers = context.draws
            context.masks = Masks(draws.key, [numbers[each] for each in own if each < len(numbers)], rows, read)
    try:
        with drawing_alone(context):
            yield
    finally:
        context.slots, context.lengths, context.in_body, context.memo, context.masks, context.read = before
