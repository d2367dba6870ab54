"""The adapters' numbers where passes multiply them: one contiguous run a LoRA or prefix, in the base's own precision.

Knows tensors, layers and slots. Refuses to know who asks, who loads and what is put out. `prepare` may take its time on
any thread and touches nothing that a pass reads; `mount` and `unmount` are one write in a dictionary, whatever else is
mounted. B carries the scaling.

In a pass the tokens of fresh rows lie sorted by slot, so a segment is a slice. Where there are kernels, one call a
layer multiplies all rows of a pass (`spans`). Elsewhere `segments` multiplies a few segments together, and rows that
take one token each are multiplied by the `Stack`: both are torch's own products, on every device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from turret.adapters import require_base
from turret.adapters.adapter import LORA_PREFIX, Adapter, Parts
from turret.adapters.attached import Attachment, device_of, hook_model, routed_linear, target_paths
from turret.adapters.batch_context import BARE
from turret.adapters.fused.frozen import linear
from turret.adapters.lora import sizes
from turret.bundles.tensors import all_finite
from turret.engine.adapter_spans import laid_out
from turret.engine.adapter_tensors import AdapterTensors, FactorLayout, Pair, layout_of, shapes_of
from turret.engine.heads import Heads
from turret.engine.segments import Chunk, Segment, chunks
from turret.engine.stacked_factors import StackedFactors
from turret.errors import AdapterError
from turret.families import Family
from turret.kernels import AdapterSpans, Library, usable
from turret.methods.lookup import numbers_of

PIECE = 2**15  # numbers that one thread adds up by itself
VIEWED = 128  # adapters whose views are kept; making them anew takes some microseconds a layer

# Linear layers of one parent that read the same x. Cross-attention's query reads another, which is seen in the pass.
SHARING = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)


class AdapterPool:
    """Every mounted adapter of one hooked model, and the layout of the pass under way (`route.Bank`)."""

    def __init__(self, model: Any, family: Family, fingerprint: str | None) -> None:
        self.family, self.fingerprint = family, fingerprint
        self._model = model
        self._heads = Heads(model, family)
        self.attached: Attachment = hook_model(model)
        linears = [routed_linear(model, self.attached, path) for path in target_paths(model, "all-linear")]
        self._number = {id(linear): number for number, linear in enumerate(linears)}
        self._paths = {path: self._number[id(linear)] for path, linear in self.attached.linears.items()}
        self.sizes = [sizes(linear.base_layer) for linear in linears]
        self.dtype: torch.dtype = linears[0].weight.dtype
        self.device = device_of(model)
        self._weights = [linear.weight for linear in linears]
        self.attached.context.adapter_pool = self
        self._slots: dict[int, AdapterTensors] = {}
        self._viewed: OrderedDict[int, dict[int, Pair]] = OrderedDict()
        self._siblings = _siblings(self._paths)
        self._chunks: dict[str, list[Chunk]] = {}
        self.library: Library | None = None  # of the pass under way, and what it reads
        self._spans: dict[str, AdapterSpans] = {}
        self._held: list[AdapterTensors] = []  # whatever is put out meanwhile
        self._fresh = self._steps = 0
        self._sharing: list[tuple[int, int]] = []  # slots whose heads are computed, and how many rows each has
        self._last: tuple[Tensor, Tensor] | None = None
        self.stack = StackedFactors(self.sizes, self._siblings, torch.zeros((), dtype=self.dtype, device=self.device))

    # --- loading ------------------------------------------------------------------------------------------------------

    def prepare(self, adapter: Adapter, digest: str, task: Any) -> AdapterTensors:
        """Check that the adapter fits this base and is used whole, and lay its numbers out. Raises AdapterError."""
        require_base(adapter, self.fingerprint)
        adapter = self._at_home(adapter)
        parts = numbers_of(adapter.method).parts(self._model, adapter)
        head = self._heads.checked(adapter, task.generates)
        factors, groups, ends = self._by_layer(parts, head), shapes_of(parts.prefix), shapes_of(head)
        behind = sum(part.numel() for pair in factors.values() for part in pair)
        run = torch.empty(behind + groups.count + ends.count, dtype=self.dtype, device=self.device)
        layout = self._lay_out(factors, parts.scaling, run[:behind]) if factors else None
        loaded = AdapterTensors(digest, task, run, layout, groups.views(run[behind : behind + groups.count]), ends)
        _fill(loaded.prefix, parts.prefix)
        _fill(loaded.head, head)
        if not all(all_finite(part) for part in torch.split(run, PIECE)):
            raise AdapterError(f"the adapter holds numbers that are not finite in {self.dtype}: train it again")
        return loaded

    def _at_home(self, adapter: Adapter) -> Adapter:
        """The adapter with its layers called as here: T5's classifier holds its body one level deeper."""
        prefix = f"{self._model.base_model_prefix}."
        if hasattr(self._model, self._model.base_model_prefix):
            return adapter
        deeper = LORA_PREFIX + prefix
        tensors = {LORA_PREFIX + name.removeprefix(deeper) if name.startswith(deeper) else name: tensor
                   for name, tensor in adapter.tensors.items()}  # fmt: skip
        return replace(adapter, tensors=tensors)

    def _by_layer(self, parts: Parts, head: Mapping[str, Tensor]) -> dict[str, Pair]:
        """A and B of every layer in the base's order: a file's have any."""
        if other := next((path for path in parts.factors if path not in self._paths), None):
            raise AdapterError(f"LoRA of {other}: the engine adapts linear layers inside the base; drop this target")
        if both := next((path for path in parts.factors if f"{path}.weight" in head), None):
            raise AdapterError(f"{both} is both trained whole and adapted by LoRA: train one of them")
        return dict(sorted(parts.factors.items(), key=lambda each: self._paths[each[0]]))

    def _lay_out(self, factors: Mapping[str, Pair], scaling: float, run: Tensor) -> FactorLayout:
        """Fill the run with A and the scaled B of every layer, one behind the other."""
        parts = [part for pair in factors.values() for part in pair]
        layers = tuple((self._paths[path], A.shape[1], B.shape[0]) for path, (A, B) in factors.items())
        layout = layout_of(len(parts[0]), layers, len(self.sizes), self.dtype)
        if (kernels := usable(run)) is not None and all(p.dtype == torch.float32 and p.is_contiguous() for p in parts):
            kernels.lay_out(list(factors.values()), scaling, run)
            return layout
        places = iter(torch.split(run, [part.numel() for part in parts]))  # each is small: no second thread is woken
        for A, B in factors.values():
            next(places).view(A.shape).copy_(A)
            torch.mul(B.float().mT, scaling, out=next(places).view(B.shape[::-1]))
        return layout

    # --- slots --------------------------------------------------------------------------------------------------------

    def mount(self, slot: int, loaded: AdapterTensors) -> None:
        self._slots[slot] = loaded

    def unmount(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._viewed.pop(slot, None)

    def at(self, slot: int) -> AdapterTensors | None:
        return None if slot == BARE else self._slots[slot]

    def _pairs(self, slot: int) -> dict[int, Pair]:
        loaded = self.at(slot)
        if loaded is None or loaded.layout is None:
            return {}
        if slot not in self._viewed:
            self._viewed[slot] = loaded.pairs()
            if len(self._viewed) > VIEWED:
                self._viewed.popitem(last=False)
        self._viewed.move_to_end(slot)
        return self._viewed[slot]

    # --- a pass -------------------------------------------------------------------------------------------------------

    def begin(self, slots: Sequence[int], lengths: Mapping[str, Sequence[int]], steps: Sequence[int]) -> None:
        """Lay out a pass: fresh rows sorted by slot with their tokens by stream, then one token of each of `steps`."""
        self.library = usable(*self._weights)
        if self.library is not None:
            self._begin_spans(slots, lengths, steps)
            return
        self._chunks = {}
        joint = self.dtype != torch.float32 or self.device.type != "cpu"  # where a call costs more than arithmetic
        for stream, counts in lengths.items():
            segments: list[tuple[int, int, int]] = []
            start = 0
            for slot, count in zip(slots, counts, strict=True):
                if segments and segments[-1][2] == slot:
                    segments[-1] = (segments[-1][0], start + count, slot)
                else:
                    segments.append((start, start + count, slot))
                start += count
            adapted = [Segment(a, b, self._slots[slot].rank, p) for a, b, slot in segments if (p := self._pairs(slot))]
            self._chunks[stream] = chunks(adapted, joint)
        self._fresh = sum(lengths.get("decoder", ()))
        self._steps = len(steps)
        if any(loaded is not None and loaded.layout is not None for loaded in map(self.at, steps)):
            self.stack.arrange([None if (own := self.at(s)) is None or own.layout is None else own for s in steps])
        else:
            self._steps = 0

    def _begin_spans(self, slots: Sequence[int], lengths: Mapping[str, Sequence[int]], steps: Sequence[int]) -> None:
        """The same for the kernel: rows and single tokens are spans like any other."""
        self._chunks, self._steps = {}, 0
        for stream, counts in lengths.items():
            going = steps if stream == "decoder" else ()
            tokens = [*counts, *(1 for _ in going)]
            own = [(start, end, self._slots[slot]) for start, end, slot in self._adapted([*slots, *going], tokens)]
            self._held += [each for _, _, each in own]
            if (spans := laid_out(own, sum(tokens))) is not None:
                self._spans[stream] = spans

    def _adapted(self, slots: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int, int]]:
        """(start, end, slot) of those stretches, one behind the other, whose slot has a LoRA."""
        ends = accumulate(counts)
        stretches = [(end - count, end, slot) for slot, count, end in zip(slots, counts, ends, strict=True)]
        return [each for each in stretches if (own := self.at(each[2])) is not None and own.layout is not None]

    def number(self, layer: Any) -> int:
        return self._number[id(layer)]

    def spans(self, stream: str) -> AdapterSpans | None:
        return self._spans.get(stream)

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        number = self._number[id(layer)]
        if self._sharing:
            return self._shared(layer.base_layer, number, x)
        if x.dim() == 2:  # a pooler inside the body took unpadded tokens for one row; nobody reads what it gives
            return x.new_zeros(len(x), self.sizes[number][1])
        if self.library is not None:
            return linear(layer.base_layer, x, self._spans.get(layer.stream), number)
        y = linear(layer.base_layer, x)
        rows = self._rows(x)
        out, siblings = y[0], self._siblings[number]
        for chunk in self._chunks.get(layer.stream, ()):
            chunk.add(number, siblings, out, rows)
        if self._steps and layer.stream == "decoder":
            self.stack.add(number, out, rows, self._fresh)
        return y

    def _shared(self, layer: Any, number: int, x: Tensor) -> Tensor:
        """A layer that heads share with the body, such as a pooler, on rows (B, D_in) of some adapters."""
        spans = self._adapted(*zip(*self._sharing, strict=True))
        if usable(x, layer.weight) is not None:
            own = [(start, end, self._slots[slot]) for start, end, slot in spans]
            return linear(layer, x, laid_out(own, len(x)), number, helped=False)
        y = linear(layer, x)
        for start, end, slot in spans:
            if (pair := self._pairs(slot).get(number)) is not None:
                y[start:end] += (x[start:end] @ pair[0]) @ pair[1]
        return y

    def _rows(self, x: Tensor) -> Tensor:
        """x[0]: the same object for as long as x is, so that layers that read one x know it."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, x[0])
        return self._last[1]

    def finish(self) -> None:
        """The pass is over: nothing of it is kept."""
        self._chunks, self._last = {}, None
        self.library, self._spans, self._held = None, {}, []
        self.stack.forget()

    def logits(self, slots: Sequence[int], pooled: Tensor) -> list[Tensor]:
        """Classifiers' heads on the pooled vectors (B, D) of rows sorted by slot: (C,) float32 on the CPU each."""
        rows = [(slot, len(list(own))) for slot, own in groupby(slots)]

        def shared(module: Callable[[Tensor], Tensor], x: Tensor, whose: Sequence[int]) -> Tensor:
            self._sharing = [rows[each] for each in whose]
            try:
                return module(x)
            finally:
                self._sharing = []

        return self._heads.logits([(self._slots[slot].head, count) for slot, count in rows], pooled, shared)

    def keys_values(self, slot: int, group: str, layer: int) -> Pair | None:
        loaded = self.at(slot)
        if loaded is None or group not in loaded.prefix:
            return None
        both = loaded.prefix[group][layer]  # (2, H, P, D)
        return both[0], both[1]

    def prefix_length(self, slot: int) -> int:
        loaded = self.at(slot)
        return 0 if loaded is None else loaded.length


def _fill(views: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        views[name].copy_(value)


def _siblings(paths: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """By layer: those that may read the same input, itself among them."""
    by_parent: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for path, number in paths.items():
        parent, _, name = path.rpartition(".")
        names = next((each for each in SHARING if name in each), (name,))
        by_parent.setdefault((parent, names), []).append(number)
    return {number: tuple(group) for group in by_parent.values() for number in group}
