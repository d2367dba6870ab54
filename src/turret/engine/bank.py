"""The adapters' numbers where passes multiply them: one contiguous run a LoRA or prefix, in the base's own precision.

Knows tensors, layers and slots. Refuses to know who asks, who loads and what is put out. `prepare` may take its time on
any thread and touches nothing that a pass reads; `mount` and `unmount` are one write in a dictionary, whatever else is
mounted. B carries the scaling. Heads stay in float32.

In a pass the tokens of fresh rows lie sorted by slot, so a segment is a slice. Where there are kernels, one call a
layer multiplies all rows of a pass (`spans`). Elsewhere `segments` multiplies a few segments together, and rows that
take one token each are multiplied by the `Stack`: both are torch's own products, on every device.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from turret.adapters import Adapter, require_base
from turret.adapters.adapter import LORA_PREFIX, checked_factors, checked_prefix, filled_head, head_paths
from turret.adapters.attach import Attachment, device_of, hook_model, routed_linear, target_paths
from turret.adapters.bundle import all_finite
from turret.adapters.frozen import linear
from turret.adapters.lora import sizes
from turret.adapters.route import BARE
from turret.engine.segments import Chunk, Segment, chunks
from turret.engine.spans import laid_out
from turret.engine.stack import Stack
from turret.errors import AdapterError
from turret.families import Family
from turret.kernels import Library, Spans, usable
from turret.methods import Full, LoRA, Peft, Prefix

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

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer's factors are in the run: A (R, D_in), behind it B (R, D_out)."""

    layer: int
    start: int
    d_in: int
    d_out: int


@dataclass(eq=False)
class Loaded:
    """One adapter's numbers. `run` is everything but the head."""

    digest: str
    task: Any  # that encodes its texts and makes its answers
    kind: str
    run: Tensor
    rank: int
    layout: tuple[_Place, ...]  # of a LoRA
    factors: Tensor  # (L, 2) int64 addresses in the run, by layer (`spans.Numbers`)
    prefix: Mapping[str, Tensor]  # by group: (L, 2, H, P, D), views of the run
    length: int  # P
    head: Callable[[Tensor], Tensor] | None  # pooled (B, D) -> logits (B, C)
    bytes: int

    def pairs(self) -> dict[int, Pair]:
        """A^T (D_in, R) and the scaled B (R, D_out) by layer: views of the run."""
        R, pairs = self.rank, {}
        for place in self.layout:
            middle = place.start + R * place.d_in
            A = self.run[place.start : middle].view(R, place.d_in)
            pairs[place.layer] = A.mT, self.run[middle : middle + R * place.d_out].view(R, place.d_out)
        return pairs


class Bank:
    """Every mounted adapter of one hooked model, and the layout of the pass under way (`route.Bank`)."""

    def __init__(self, model: Any, family: Family, fingerprint: str | None) -> None:
        self.family, self.fingerprint = family, fingerprint
        self._model = model
        self._heads = _templates(model, family)
        self.attached: Attachment = hook_model(model)
        linears = [routed_linear(model, self.attached, path) for path in target_paths(model, "all-linear")]
        self._number = {id(linear): number for number, linear in enumerate(linears)}
        self._paths = {path: self._number[id(linear)] for path, linear in self.attached.linears.items()}
        self.sizes = [sizes(linear.base_layer) for linear in linears]
        self.dtype: torch.dtype = linears[0].weight.dtype
        self.device = device_of(model)
        self._weights = [linear.weight for linear in linears]
        self.attached.route.bank = self
        self._slots: dict[int, Loaded] = {}
        self._viewed: OrderedDict[int, dict[int, Pair]] = OrderedDict()
        self._siblings = _siblings(self._paths)
        self._chunks: dict[str, list[Chunk]] = {}
        self.library: Library | None = None  # of the pass under way, and what it reads
        self._spans: dict[str, Spans] = {}
        self._held: list[Loaded] = []  # whatever is put out meanwhile
        self._fresh = self._steps = 0
        self._alone: dict[int, Pair] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self.stack = Stack(self.sizes, self._siblings, torch.zeros((), dtype=self.dtype, device=self.device))

    # --- loading ------------------------------------------------------------------------------------------------------

    def prepare(self, adapter: Adapter, digest: str, task: Any) -> Loaded:
        """Check that the adapter fits this base and is used whole, and lay its numbers out. Raises AdapterError."""
        require_base(adapter, self.fingerprint)
        adapter = self._at_home(adapter)
        method = adapter.method
        if isinstance(method, Full):
            raise AdapterError(
                "a full fine-tuning replaces every weight and cannot share a base with others: "
                "export it merged and serve it as a base of its own"
            )
        if isinstance(method, Peft):
            raise AdapterError(
                f"{method.peft_type} is computed by PEFT, one adapter at a time, and cannot share a base with others: "
                "export it merged and serve it as a base of its own, where PEFT merges it"
            )
        layout: tuple[_Place, ...] = ()
        views: dict[str, Tensor] = {}
        if isinstance(method, LoRA):
            run, layout = self._factors(adapter, method)
        elif isinstance(method, Prefix):
            run, views = self._prefix(adapter)
        elif adapter.tensors:
            raise AdapterError(f"a head holds no other tensors, given {', '.join(sorted(adapter.tensors)[:3])}")
        else:
            run = self._empty(0)
        if not all(all_finite(part) for part in torch.split(run, PIECE)):
            raise AdapterError(f"the adapter holds numbers that are not finite in {self.dtype}: train it again")
        head, head_bytes = self._head(adapter, task.kind, {place.layer for place in layout})
        rank = method.r if isinstance(method, LoRA) else 0
        length = next((each.shape[3] for each in views.values()), 0)
        size = run.numel() * run.element_size() + head_bytes
        factors = _addresses(run, rank, layout, len(self.sizes))
        return Loaded(digest, task, task.kind, run, rank, layout, factors, views, length, head, size)

    def _at_home(self, adapter: Adapter) -> Adapter:
        """The adapter with its layers called as here: T5's classifier holds its body one level deeper."""
        prefix = f"{self._model.base_model_prefix}."
        if hasattr(self._model, self._model.base_model_prefix):
            return adapter
        deeper = LORA_PREFIX + prefix
        tensors = {LORA_PREFIX + name.removeprefix(deeper) if name.startswith(deeper) else name: tensor
                   for name, tensor in adapter.tensors.items()}  # fmt: skip
        return replace(adapter, tensors=tensors)

    def _factors(self, adapter: Adapter, method: LoRA) -> tuple[Tensor, tuple[_Place, ...]]:
        """A and the scaled B of every layer, one behind the other."""
        checked = checked_factors(self._model, adapter, method)
        if other := next((path for path in checked if path not in self._paths), None):
            raise AdapterError(f"LoRA of {other}: the engine adapts linear layers inside the base; drop this target")
        parts = [part for A, B in checked.values() for part in (A, B)]
        run = self._empty(sum(part.numel() for part in parts))
        layout = _layout(
            method.r, tuple((self._paths[path], A.shape[1], B.shape[0]) for path, (A, B) in checked.items())
        )
        if (kernels := usable(run)) is not None and all(p.dtype == torch.float32 and p.is_contiguous() for p in parts):
            kernels.lay_out(list(checked.values()), method.scaling, run)
            return run, layout
        places = iter(torch.split(run, [part.numel() for part in parts]))  # each is small: no second thread is woken
        for A, B in checked.values():
            next(places).view(A.shape).copy_(A)
            torch.mul(B.float().mT, method.scaling, out=next(places).view(B.shape[::-1]))
        return run, layout

    def _prefix(self, adapter: Adapter) -> tuple[Tensor, dict[str, Tensor]]:
        """Keys and values of every group, one behind the other, and the view of each."""
        groups = checked_prefix(self.attached, adapter)
        run = self._empty(sum(each.numel() for each in groups.values()))
        places = torch.split(run, [each.numel() for each in groups.values()])
        views = {group: place.view(each.shape) for place, (group, each) in zip(places, groups.items(), strict=True)}
        for group, each in groups.items():
            views[group].copy_(each)
        return run, views

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=self.dtype, device=self.device)

    def _head(self, adapter: Adapter, kind: str, adapted: set[int]) -> tuple[Callable[[Tensor], Tensor] | None, int]:
        """The head as a function of pooled vectors, with the adapter's own modules in place of the base's."""
        if kind != "classify":
            if adapter.head:
                raise AdapterError(f"an adapter that generates has no head, given {next(iter(adapter.head))}")
            return None, 0
        own: dict[str, nn.Module] = {}
        for path in head_paths(self.family, adapter.head):
            values = {key[len(path) + 1 :]: v for key, v in adapter.head.items() if key.startswith(path + ".")}
            if path not in self._heads:
                raise AdapterError(f"the base has no {path!r}: the adapter belongs to another architecture")
            if any(each.startswith(path + ".") and number in adapted for each, number in self._paths.items()):
                raise AdapterError(f"{path} is both trained whole and adapted by LoRA: train one of them")
            own[path] = filled_head(self._heads[path], path, values, self.device)
        if missing := [name for name in self.family.head_modules if name in self._heads and name not in own]:
            raise AdapterError(f"the adapter has no head {', '.join(missing)}: a classifier needs one; retrain")
        parts = {name: _cast(own[name]) for name in self.family.head_modules if name in own}
        body = {
            name: _cast(next((own[path] for path in own if path.endswith("." + name)), getattr(self._body, name, None)))
            for name in self.family.body_excludes
        }
        stand_in = SimpleNamespace(**parts, base_model=SimpleNamespace(**body), dropout=_same, drop=_same)
        size = sum(
            each.numel() * each.element_size() for module in own.values() for each in module.state_dict().values()
        )
        return lambda pooled: self.family.classify(stand_in, pooled), size

    @property
    def _body(self) -> Any:
        return self._model.base_model

    # --- slots --------------------------------------------------------------------------------------------------------

    def mount(self, slot: int, loaded: Loaded) -> None:
        self._slots[slot] = loaded

    def unmount(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._viewed.pop(slot, None)

    def at(self, slot: int) -> Loaded | None:
        return None if slot == BARE else self._slots[slot]

    def _pairs(self, slot: int) -> dict[int, Pair]:
        loaded = self.at(slot)
        if loaded is None or not loaded.layout:
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
        if any(loaded is not None and loaded.layout for loaded in map(self.at, steps)):
            self.stack.arrange([None if (own := self.at(s)) is None or not own.layout else own for s in steps])
        else:
            self._steps = 0

    def _begin_spans(self, slots: Sequence[int], lengths: Mapping[str, Sequence[int]], steps: Sequence[int]) -> None:
        """The same for the kernel: rows and single tokens are spans like any other."""
        self._chunks, self._steps = {}, 0
        for stream, counts in lengths.items():
            ends = list(accumulate(counts))
            rows = [*zip(slots, counts, ends, strict=True)]
            if stream == "decoder":
                tokens = ends[-1] if ends else 0
                rows += [(slot, 1, tokens + place) for place, slot in enumerate(steps, 1)]
            own = [(end - count, end, x) for slot, count, end in rows if (x := self.at(slot)) is not None and x.layout]
            self._held += [each for _, _, each in own]
            if (spans := laid_out(own, rows[-1][2] if rows else 0)) is not None:
                self._spans[stream] = spans

    def number(self, layer: Any) -> int:
        return self._number[id(layer)]

    def spans(self, stream: str) -> Spans | None:
        return self._spans.get(stream)

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        number = self._number[id(layer)]
        if self._alone is None and x.dim() != 2 and self.library is not None:
            return linear(layer.base_layer, x, self._spans.get(layer.stream), number)
        y = linear(layer.base_layer, x)
        if self._alone is not None:
            pair = self._alone.get(number)
            return y if pair is None else y + (x @ pair[0]) @ pair[1]
        if x.dim() == 2:
            return y  # a pooler inside the body took unpadded tokens for one row; its output is never used
        rows = self._rows(x)
        out, siblings = y[0], self._siblings[number]
        for chunk in self._chunks.get(layer.stream, ()):
            chunk.add(number, siblings, out, rows)
        if self._steps and layer.stream == "decoder":
            self.stack.add(number, out, rows, self._fresh)
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

    def logits(self, slot: int, pooled: Tensor) -> Tensor:
        """A classifier's head on the pooled vectors of its rows: (B, D) -> (B, C)."""
        loaded = self._slots[slot]
        assert loaded.head is not None
        with self._only(slot):
            return loaded.head(pooled)

    @contextmanager
    def _only(self, slot: int) -> Iterator[None]:
        """All rows take one adapter: for layers that a head shares with the body, such as a pooler."""
        self._alone = self._pairs(slot)
        try:
            yield
        finally:
            self._alone = None

    def keys_values(self, slot: int, group: str, layer: int) -> Pair | None:
        loaded = self.at(slot)
        if loaded is None or group not in loaded.prefix:
            return None
        both = loaded.prefix[group][layer]  # (2, H, P, D)
        return both[0], both[1]

    def prefix_length(self, slot: int) -> int:
        loaded = self.at(slot)
        return 0 if loaded is None else loaded.length


def _templates(model: Any, family: Family) -> dict[str, nn.Module]:
    """The shapes of the head's modules by path: this model's, or those of the classifier of the same configuration."""
    owner = model
    if not all(hasattr(model, name) for name in family.head_modules):
        with torch.device("meta"):
            owner = AutoModelForSequenceClassification.from_config(model.config)
    paths = [name for name in family.head_modules if hasattr(owner, name)]
    prefix = f"{owner.base_model_prefix}."
    paths += [prefix + name for name in family.body_excludes if getattr(owner.base_model, name, None) is not None]
    return {path: copy.deepcopy(owner.get_submodule(path)).to("meta").eval() for path in paths}


@functools.lru_cache(256)
def _layout(rank: int, layers: tuple[tuple[int, int, int], ...]) -> tuple[_Place, ...]:
    """(number, D_in, D_out) of layers that lie one behind the other; adapters of one kind share it."""
    ends = accumulate(rank * (d_in + d_out) for _, d_in, d_out in layers)
    return tuple(
        _Place(number, start, d_in, d_out) for start, (number, d_in, d_out) in zip((0, *ends), layers, strict=False)
    )


def _addresses(run: Tensor, rank: int, layout: Sequence[_Place], layers: int) -> Tensor:
    """(layers, 2): where A and the scaled B of each layer begin, 0 where the adapter has none."""
    found = [(0, 0)] * layers
    size = run.element_size()
    for place in layout:
        begin = run.data_ptr() + place.start * size
        found[place.layer] = begin, begin + rank * place.d_in * size
    return torch.tensor(found, dtype=torch.int64)


def _siblings(paths: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """By layer: those that may read the same input, itself among them."""
    by_parent: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for path, number in paths.items():
        parent, _, name = path.rpartition(".")
        names = next((each for each in SHARING if name in each), (name,))
        by_parent.setdefault((parent, names), []).append(number)
    return {number: tuple(group) for group in by_parent.values() for number in group}


def _cast(module: nn.Module | None) -> Callable[..., Any] | None:
    """The module on inputs of whatever precision."""
    if module is None:
        return None
    dtype = next(module.parameters()).dtype
    return lambda x, *rest: module(x.to(dtype), *rest)


def _same(x: Tensor) -> Tensor:
    return x
