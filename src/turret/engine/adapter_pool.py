"""The mounted adapters of one base, and the products of a pass with them.

`prepare` may take long and runs on any thread; it changes nothing that a pass reads. `mount` and `unmount` are one
write to a dictionary. In a pass the tokens of prefill rows are sorted by slot, so the rows of an adapter are a slice.
With kernels, each layer is one call for all rows (`AdapterSpans`); without them `sgmv` multiplies in torch.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from turret import quantized
from turret.adapters.adapter import Adapter, Parts, all_finite, check_head, head_paths, rename_paths, require_base
from turret.adapters.batch_context import BARE, AdaptedLinear, ReplacedModule
from turret.adapters.hooks import HookedModel, device_of, hook_model, routed_linear, routed_whole, target_paths
from turret.adapters.layers import is_of_class
from turret.adapters.lora import LayerChange, layer_sizes
from turret.adapters.tuners.tuner import all_parts
from turret.bases.meta_model import model_of
from turret.engine.cache import KVSlot
from turret.errors import AdapterError
from turret.families.family import Family, HeadKind, head_of
from turret.ops.core import real_gpu, upload_tensor
from turret.ops.lora import GpuRows, MixedRows, Pair, Stack, linear, mixed_rows, sgmv
from turret.ops.structs import AdapterSpans
from turret.ops.table import ops_for
from turret.tasks.task import Task
from turret.transformer import Model

# --- the tensors of one adapter ---------------------------------------------------------------------------------------
# All of them are in one flat buffer. Adapters of one shape share the places of their tensors in it, so with hundreds in
# memory each one adds little more than its numbers.


@dataclass(frozen=True)
class TensorLayout:
    """Named tensors one after another in a flat buffer."""

    shapes: tuple[tuple[str, torch.Size], ...]

    @functools.cached_property
    def count(self) -> int:
        """Elements of all tensors."""
        return sum(shape.numel() for _, shape in self.shapes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors in a flat buffer of `count` elements."""
        parts = torch.split(flat, [shape.numel() for _, shape in self.shapes])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes, strict=True)}


@dataclass(frozen=True)
class FactorLayout:
    """The factors of a LoRA, one layer after another: A (R, D_in), then B (R, D_out)."""

    rank: int
    layers: tuple[tuple[int, int, int], ...]  # (number, D_in, D_out) of each adapted layer
    offsets: Tensor  # (L, 2) int64: bytes from the start of the buffer to A and to B of each layer, -1 for none

    def pairs(self, flat: Tensor) -> dict[int, Pair]:
        """A (R, D_in) and the scaled B (R, D_out) by layer: views of the buffer."""
        R, pairs, start = self.rank, {}, 0
        for number, d_in, d_out in self.layers:
            middle, end = start + R * d_in, start + R * (d_in + d_out)
            pairs[number] = flat[start:middle].view(R, d_in), flat[middle:end].view(R, d_out)
            start = end
        return pairs


@dataclass(eq=False, slots=True)
class AdapterTensors:
    """The tensors of one adapter, in the base's precision: factors, then prefix, then head."""

    digest: str
    task: Task
    flat: Tensor
    layout: FactorLayout | None  # None without a LoRA
    prefix: Mapping[str, Tensor]  # by group: (L, 2, H, P, D), views of `flat`
    head_layout: TensorLayout  # of the end of `flat`, by names in the model
    scaled: Mapping[int, LayerChange] = field(default_factory=dict)  # by layer, of a method that does more than LoRA
    whole: Mapping[str, nn.Module] = field(default_factory=dict)  # by path, in place of the base's own

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.flat, *self.beside))

    @property
    def beside(self) -> list[Tensor]:
        """The tensors that are not in the buffer, each once."""
        scaled = [tensor for layer in self.scaled.values() for tensor in layer.tensors]
        every = [*scaled, *(each for module in self.whole.values() for each in module.parameters())]
        return list({id(tensor): tensor for tensor in every}.values())

    @property
    def rank(self) -> int:
        """The rank of its LoRA; 0 without one."""
        return 0 if self.layout is None else self.layout.rank

    @property
    def prefix_length(self) -> int:
        """P; 0 without a prefix."""
        return next((each.shape[3] for each in self.prefix.values()), 0)

    @property
    def head(self) -> dict[str, Tensor]:
        return self.head_layout.views(self.flat[self.flat.numel() - self.head_layout.count :])

    @property
    def address(self) -> int:
        return self.flat.data_ptr()

    @property
    def offsets(self) -> Tensor:
        """(L, 2) int64: bytes from `address` to A and to B of each layer, -1 for none."""
        assert self.layout is not None
        return self.layout.offsets

    def pairs(self) -> dict[int, Pair]:
        """A (R, D_in) and the scaled B (R, D_out) by layer."""
        return {} if self.layout is None else self.layout.pairs(self.flat)


def tensor_layout(tensors: Mapping[str, Tensor]) -> TensorLayout:
    """The layout of these tensors, sorted by name: the order in a file may be any."""
    return _shared_layout(tuple((name, each.shape) for name, each in sorted(tensors.items())))


_shared_layout = functools.lru_cache(256)(TensorLayout)


@functools.lru_cache(256)
def factor_layout(rank: int, layers: tuple[tuple[int, int, int], ...], total: int, dtype: torch.dtype) -> FactorLayout:
    """The layout of a LoRA's factors.

    Args:
        rank: R of every layer.
        layers: (number, D_in, D_out) of each adapted layer, in the order of the buffer.
        total: Linear layers of the base.
        dtype: Of the buffer.
    """
    offsets, start = torch.full((total, 2), -1), 0
    for number, d_in, d_out in layers:
        offsets[number] = torch.tensor([start, start + rank * d_in]) * dtype.itemsize
        start += rank * (d_in + d_out)
    return FactorLayout(rank, layers, offsets)


# --- heads ------------------------------------------------------------------------------------------------------------
# Classification heads: one set of modules for all adapters, called with the tensors of each adapter, in float32.


HeadRows = tuple[Mapping[str, Tensor], int]  # the tensors of an adapter's head, and the number of its rows
# Calls a module of the body on rows of some adapters: (module, rows (B, ...), numbers of their heads)
Shared = Callable[[Callable[[Tensor], Tensor], Tensor, Sequence[int]], Tensor]


class Heads:
    """The modules of one kind of head by path, without weights, on the meta device.

    They are copies of the model's own. A model without such a head gets those of the classifier of its configuration,
    so a base that was loaded to generate classifies too.
    """

    def __init__(self, model: Model, family: Family, kind: HeadKind) -> None:
        tags = kind == "tag"
        self._family, self._body = family, model.base_model
        self._names = family.tag_modules if tags else family.head_modules
        self._compute = family.tag if tags else family.classify
        owner = model
        if head_of(model) != kind and (tags or not all(hasattr(model, name) for name in self._names)):
            owner = model_of(model.config, kind)
        paths = [name for name in self._names if hasattr(owner, name)]
        inside = [
            name for name in family.body_excludes if not tags and getattr(owner.base_model, name, None) is not None
        ]
        self._inside = {name: f"{owner.base_model_prefix}.{name}" for name in inside}
        paths += self._inside.values()
        self._modules = {path: copy.deepcopy(owner.get_submodule(path)).to("meta").eval() for path in paths}

    def check_head(self, adapter: Adapter, outputs: int | None) -> dict[str, Tensor]:
        """The adapter's head by names in the model. Raises AdapterError if it is incomplete or does not fit.

        Args:
            outputs: of the head that the task needs; None: it needs none.
        """
        if outputs is None:
            if adapter.head:
                raise AdapterError(f"an adapter that generates has no head, given {next(iter(adapter.head))}")
            return {}
        paths = head_paths(self._family, adapter.head)
        for path in paths:
            if path not in self._modules:
                raise AdapterError(f"the base has no {path!r}: the adapter belongs to another architecture")
            check_head(self._modules[path], path, _tensors_below(path, adapter.head))
        if missing := [name for name in self._names if name in self._modules and name not in paths]:
            raise AdapterError(f"the adapter has no head {', '.join(missing)}: a classifier needs one; retrain")
        return dict(adapter.head)

    def logits(self, heads: Sequence[HeadRows], pooled: Tensor, shared: Shared) -> list[Tensor]:
        """The outputs of the heads.

        Args:
            heads: The head and the number of rows of each adapter, in the order of the rows.
            pooled: (B, D), vectors of texts or of tokens.
            shared: Calls a module of the body for adapters that store no weights of their own for it.

        Returns:
            (rows, C) float32 on the CPU for each adapter; C may differ.
        """

        def call(path: str, module: nn.Module | None, x: Tensor) -> Tensor | list[Tensor]:
            """A module of the head on rows (B, ...). Adapters without weights for it use the body's module."""
            inputs = torch.split(x, [count for _, count in heads])
            weights = [_tensors_below(path, head) for head, _ in heads]
            without = [number for number, own in enumerate(weights) if not own]
            outputs: dict[int, Tensor] = {}
            if without:
                assert module is not None
                joint = torch.cat([inputs[number] for number in without]) if len(without) < len(heads) else x
                rows = shared(module, joint.to(next(module.parameters()).dtype), without).float()
                outputs = dict(zip(without, torch.split(rows, [heads[number][1] for number in without]), strict=True))
            for number, own in enumerate(weights):
                if own:
                    wide = {name: value.float() for name, value in own.items()}
                    outputs[number] = functional_call(self._modules[path], wide, (inputs[number].float(),))
            return _join_outputs([outputs[number] for number in range(len(heads))])

        dropouts = ("dropout", "drop", *self._family.head_dropouts)
        parts: dict[str, Callable[[Tensor], Any]] = dict.fromkeys(dropouts, _same)
        parts |= {name: functools.partial(call, name, None) for name in self._names}
        modules = {name: getattr(self._body, name, None) for name in self._inside}  # now: LoRA may have replaced one
        parts |= {name: functools.partial(call, path, modules[name]) for name, path in self._inside.items()}
        logits: Any = self._compute(parts.__getitem__, pooled)  # a list where heads differ in classes
        if isinstance(logits, list):
            return [rows.cpu() for rows in logits]
        return list(torch.split(logits.cpu(), [count for _, count in heads]))


def _tensors_below(path: str, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module, by names inside it."""
    return {name[len(path) + 1 :]: value for name, value in head.items() if name.startswith(path + ".")}


def _join_outputs(rows: list[Tensor]) -> Tensor | list[Tensor]:
    """One tensor, or a list if the heads differ in the number of classes."""
    return torch.cat(rows) if len({each.shape[1:] for each in rows}) == 1 else rows


def _same(x: Tensor) -> Tensor:
    return x


# --- adapter spans ----------------------------------------------------------------------------------------------------


Span = tuple[int, int, AdapterTensors]  # first token, one past the last, and their adapter


def spans_of(rows: Iterable[tuple[AdapterTensors | None, int]]) -> list[Span]:
    """The spans of tokens that have a LoRA; neighbouring rows of one adapter are one span.

    Args:
        rows: The adapter and the number of tokens of each row, in order.
    """
    spans: list[Span] = []
    start = 0
    for adapter, tokens in rows:
        end = start + tokens
        if adapter is not None and adapter.layout is not None and tokens:
            if spans and spans[-1][2] is adapter and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end, adapter)
            else:
                spans.append((start, end, adapter))
        start = end
    return spans


# --- adapter pool -----------------------------------------------------------------------------------------------------


PIECE = 2**15  # elements that torch sums on one thread


class AdapterPool:
    """Every mounted adapter of one hooked model, and the layout of the current pass (`AdapterPoolProtocol`)."""

    def __init__(self, model: Model, family: Family, fingerprint: str | None) -> None:
        self.family, self.fingerprint = family, fingerprint
        self._model = model
        self._heads: dict[HeadKind, Heads] = {}
        self._head("classify")
        self.attached: HookedModel = hook_model(model)
        linears = [routed_linear(model, self.attached, path) for path in target_paths(model, "all-linear")]
        self._number = {id(linear): number for number, linear in enumerate(linears)}
        self._paths = {path: self._number[id(linear)] for path, linear in self.attached.linears.items()}
        poolers = set(family.body_excludes)
        self._poolers = {number for path, number in self._paths.items() if poolers & set(path.split("."))}
        self.sizes = [layer_sizes(linear.base_layer) for linear in linears]
        self.dtype: torch.dtype = quantized.computes_in(linears[0].base_layer, model)
        self.device = device_of(model)
        plain = [linear.weight for linear in linears if not quantized.is_packed(linear.base_layer)]
        self._weights = [torch.empty(0, dtype=self.dtype, device=self.device), *plain]
        self.attached.context.adapter_pool = self
        fast = family.fast  # only where a layer gets nothing but the output of the one before it
        self.layers = [
            each for each in model.modules() if fast.layout == "post-norm" and is_of_class(each, fast.layers)
        ]
        numbers = (
            (layer, self._number.get(id(each))) for layer, own in enumerate(self.layers) for each in own.modules()
        )
        self._layer_of = {number: layer for layer, number in numbers if number is not None}
        self._slots: dict[int, AdapterTensors] = {}
        self._rows: dict[str, MixedRows] = {}  # of the current pass, by stream
        self._latest: tuple[Sequence[AdapterTensors | None], Sequence[Stack] | None] = (), None  # of the decode rows
        self._head_rows: list[tuple[int, int]] = []  # while heads are computed: (slot, rows)
        self._scaled: dict[str, list[Span]] = {}  # the adapters of the current pass that scale, by stream
        self._begun: Mapping[int, KVSlot] = {}  # see `begin`
        self._alone: AdapterTensors | None = None  # of the only row, if rows pass one by one

    # --- loading ------------------------------------------------------------------------------------------------------

    def prepare(self, adapter: Adapter, digest: str, task: Task) -> AdapterTensors:
        """Check that the adapter fits this base and is used whole, and copy it into one buffer. Raises AdapterError."""
        for each in (adapter, *adapter.others):
            require_base(each, self.fingerprint)
        others = tuple(map(self._with_own_names, adapter.others))
        adapter = replace(self._with_own_names(adapter), others=others)
        parts = all_parts(self._model, adapter)
        head = self._head("tag" if task.reads_tokens else "classify").check_head(adapter, task.num_labels(task.labels))
        factors, prefix, ends = self._by_layer(parts, head), tensor_layout(parts.prefix), tensor_layout(head)
        count = sum(part.numel() for pair in factors.values() for part in pair)
        room = prefix.count + ends.count
        host = torch.empty(count + room, dtype=self.dtype, pin_memory=real_gpu(self.device))
        layout = self._lay_out(factors, parts.scaling, host[:count]) if factors else None
        _fill(prefix.views(host[count : count + prefix.count]), parts.prefix)
        _fill(ends.views(host[count + prefix.count :]), head)
        for path in parts.whole:  # computes the same as before for the adapters that are mounted
            routed_whole(self._model, self.attached, path)
        scaled, finite = self._scaled_layers(parts), all(map(all_finite, torch.split(host, PIECE)))
        flat = upload_tensor(host, self.device)
        prefixes = prefix.views(flat[count : count + prefix.count])
        loaded = AdapterTensors(digest, task, flat, layout, prefixes, ends, scaled, parts.whole)
        if not finite or not all(map(all_finite, loaded.beside)):
            raise AdapterError(f"the adapter holds numbers that are not finite in {self.dtype}: train it again")
        return loaded

    def _with_own_names(self, adapter: Adapter) -> Adapter:
        """The adapter with this model's layer names: T5's classifier has its body one level deeper."""
        model = self._model
        if hasattr(model, model.base_model_prefix):
            return adapter
        return replace(adapter, tensors=rename_paths(adapter.tensors, f"{model.base_model_prefix}.", ""))

    def _by_layer(self, parts: Parts, head: Mapping[str, Tensor]) -> dict[str, Pair]:
        """A and B by path, in the order of the base's layers; the order in a file may be any."""
        if other := next((path for path in parts.factors if path not in self._paths), None):
            raise AdapterError(
                f"LoRA adapts {other}, which is no linear layer inside the base: remove it from target_modules"
            )
        if both := next((path for path in parts.factors if f"{path}.weight" in head), None):
            raise AdapterError(f"{both} is both trained whole and adapted by LoRA: train one of them")
        return dict(sorted(parts.factors.items(), key=lambda each: self._paths[each[0]]))

    def _scaled_layers(self, parts: Parts) -> dict[int, LayerChange]:
        """What a method that does more than add low-rank factors does, by number of the layer."""
        if other := next((path for path in parts.layers if path not in self._paths), None):
            raise AdapterError(
                f"{other} is outside the base, and the engine adapts only layers inside: remove it from target_modules"
            )
        return {self._paths[path]: layer.to(self.device) for path, layer in parts.layers.items()}

    def _lay_out(self, factors: Mapping[str, Pair], scaling: float, flat: Tensor) -> FactorLayout:
        """Fill the buffer with A and the scaled B^T of each layer. factors: A (R, D_in), B (D_out, R)."""
        parts = [part for pair in factors.values() for part in pair]
        layers = tuple((self._paths[path], A.shape[1], B.shape[0]) for path, (A, B) in factors.items())
        layout = factor_layout(len(parts[0]), layers, len(self.sizes), self.dtype)
        ops_for(flat).lay_out(list(factors.values()), scaling, flat)
        return layout

    # --- slots --------------------------------------------------------------------------------------------------------

    def mount(self, slot: int, loaded: AdapterTensors) -> None:
        """Put a prepared adapter into a slot."""
        self._slots[slot] = loaded

    def unmount(self, slot: int) -> None:
        """Take the adapter out of a slot."""
        self._slots.pop(slot, None)

    def at(self, slot: int) -> AdapterTensors | None:
        """The adapter in a slot; None for the bare base."""
        return None if slot == BARE else self._slots[slot]

    def is_bare(self, slot: int) -> bool:
        """Whether the body computes for a slot what the bare base does: its adapter has only a head."""
        own = self.at(slot)
        return own is None or (own.layout is None and not (own.prefix or own.scaled or own.whole))

    def first_layer(self, slot: int) -> int:
        """The number of the first of `layers` that an adapter changes; `len(layers)` if it changes none."""
        own = self.at(slot)
        if own is None or self.is_bare(slot):
            return len(self.layers)
        if own.layout is None or own.prefix or own.scaled or own.whole:
            return 0
        return min(self._layer_of.get(number, 0) for number, _, _ in own.layout.layers)

    # --- a pass -------------------------------------------------------------------------------------------------------

    def begin(
        self,
        slots: Sequence[int],
        lengths: Mapping[str, Sequence[int]],
        steps: Sequence[int],
        begun: Mapping[int, KVSlot] | None = None,
    ) -> None:
        """Lay out a pass.

        Args:
            slots: The slot of each prefill row, sorted.
            lengths: Tokens of each prefill row, by stream ("encoder", "decoder").
            steps: The slot of each decode row; their tokens follow those of the prefill rows.
            begun: KV slots of prompts whose earlier tokens were read, by a number below 0: `keys_values` of that number
                are those of the earlier tokens, so the attention sees them as it sees a prefix.
        """
        self._begun = begun or {}
        rows_of = {stream: list(zip(slots, counts, strict=True)) for stream, counts in lengths.items()}
        if "decoder" in rows_of:
            rows_of["decoder"] += [(slot, 1) for slot in steps]
        scaled = {stream: self._scaled_spans(rows) for stream, rows in rows_of.items()}
        self._scaled = {stream: own for stream, own in scaled.items() if own}
        self._alone = self.at(slots[0]) if self.family.rows_alone else None
        if self.family.rows_alone:
            return
        for stream, counts in lengths.items():
            spans = self._spans_of(list(zip(slots, counts, strict=True)))
            adapters = [self.at(slot) for slot in steps] if stream == "decoder" else []
            own = [None if each is None or each.layout is None else each for each in adapters]
            latest = self._latest[1] if own and own == self._latest[0] else None
            self._rows[stream] = rows = mixed_rows(self._weights, spans, sum(counts), own, latest)
            if own and isinstance(rows, GpuRows):
                self._latest = own, rows.stacks

    @property
    def scales(self) -> bool:
        """Whether an adapter of the current pass scales outputs or inputs of layers, or replaces modules."""
        return bool(self._scaled)

    @property
    def replaces(self) -> bool:
        """Whether an adapter of the current pass replaces modules."""
        return any(own.whole for spans in self._scaled.values() for _, _, own in spans)

    def _scaled_spans(self, rows: Sequence[tuple[int, int]]) -> list[Span]:
        """The tokens of the adapters that scale or replace modules. rows: (slot, tokens)."""
        ends = accumulate(tokens for _, tokens in rows)
        found = [(end - tokens, end, self.at(slot)) for (slot, tokens), end in zip(rows, ends, strict=True)]
        return [(start, end, own) for start, end, own in found if own is not None and (own.scaled or own.whole)]

    def _spans_of(self, rows: Sequence[tuple[int, int]]) -> list[Span]:
        """rows: (slot, tokens)."""
        return spans_of((self.at(slot), tokens) for slot, tokens in rows)

    def number(self, layer: AdaptedLinear) -> int:
        """The number of a linear layer among all of the base."""
        return self._number[id(layer)]

    def rows(self, stream: str) -> MixedRows | None:
        """The LoRA of every token of the current pass."""
        return self._rows.get(stream)

    def spans(self, stream: str) -> AdapterSpans | None:
        """The same for the kernels of a CPU; None if no token has a LoRA."""
        return self._rows[stream].spans if stream in self._rows else None

    def linear(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        """W x + bias + (x A^T) B, with the adapter of each row. x: (1, N, D_in) -> (1, N, D_out)."""
        number = self.number(layer)
        if self._head_rows:
            return self._head_linear(layer.base_layer, number, x)
        if x.dim() == 2:  # (N, D_in), as OPT and mixtures of experts pass tokens
            if number in self._poolers:  # it takes all tokens for one row; its output is not used
                return x.new_zeros(len(x), self.sizes[number][1])
            return self.linear(layer, x[None])[0]
        if self.family.rows_alone:
            return self._row_alone(layer.base_layer, number, x)
        return self.products([layer], x[0])[0][None]

    def products(self, layers: Sequence[AdaptedLinear], x: Tensor, plus: Tensor | None = None) -> list[Tensor]:
        """The same for layers with one input, plus a tensor that is added to each result. x: (N, D_in)."""
        numbers, stream = [self.number(each) for each in layers], layers[0].stream
        scaled = self._scaled.get(stream, ())
        products = self._rows[stream].products(
            [each.base_layer for each in layers], numbers, x, None if scaled else plus
        )
        for layer, number, y in zip(layers, numbers, products, strict=True):
            for start, end, own in scaled:
                if (change := own.scaled.get(number)) is not None:
                    y[start:end] = change(functools.partial(linear, layer.base_layer), x[start:end])
        return products if plus is None or not scaled else [each.add_(plus) for each in products]

    def _row_alone(self, layer: nn.Module, number: int, x: Tensor) -> Tensor:
        """One row passes: all of x is its own, such as DeBERTa's table of positions. x: (1, M, D_in)."""
        own = self._alone
        if own is not None and (scaled := own.scaled.get(number)) is not None:
            return scaled(functools.partial(linear, layer), x)
        y = linear(layer, x)
        if own is not None:
            sgmv(y[0], x[0], [(0, x.shape[1], own.pairs())], number)
        return y

    def whole(self, module: ReplacedModule, x: Tensor) -> Tensor:
        """A module on x, each row by its own adapter's. x: (1, N, ...); the output layer's (N, D), a slot for each."""
        context = self.attached.context
        if self.family.rows_alone and context.lengths is not None:
            own = None if self._alone is None else self._alone.whole.get(module.path)
            return linear(module.base_module if own is None else own, x)
        y = linear(module.base_module, x)
        if context.lengths is None:
            for slot, rows in ({} if context.slots is None else context.rows_by_slot()).items():
                if (own := self._whole_at(slot, module.path)) is not None:
                    y[rows] = own(x[rows])
            return y
        if x.dim() == 2 and x.is_floating_point():  # hidden states (N, D); ids are (1, N)
            return self.whole(module, x[None])[0]
        for start, end, adapter in self._scaled.get(module.stream, ()):
            if (own := adapter.whole.get(module.path)) is not None:
                y[:, start:end] = own(x[:, start:end])
        return y

    def _whole_at(self, slot: int, path: str) -> nn.Module | None:
        """An adapter's own module at a path, if it has one."""
        loaded = self.at(slot)
        return None if loaded is None else loaded.whole.get(path)

    def _head_linear(self, layer: nn.Module, number: int, x: Tensor) -> Tensor:
        """The same for a layer that heads share with the body, such as a pooler. x: (B, D_in) -> (B, D_out)."""
        rows = mixed_rows([x, *layer.parameters()], self._spans_of(self._head_rows), len(x))
        (y,) = rows.products([layer], [number], x, helped=False)
        for start, end, own in self._scaled_spans(self._head_rows):
            if (scaled := own.scaled.get(number)) is not None:
                y[start:end] = scaled(functools.partial(linear, layer, helped=False), x[start:end])
        return y

    def finish(self) -> None:
        """Forget the layout of the pass."""
        self._rows, self._scaled, self._begun = {}, {}, {}

    def free_decoding(self) -> None:
        """Free what is kept from one pass to the next for rows that decode."""
        self._latest = (), None

    def logits(self, kind: HeadKind, slots: Sequence[int], counts: Sequence[int], read: Tensor) -> list[Tensor]:
        """The outputs of the heads of one kind.

        Args:
            slots: The slot of each row, sorted.
            counts: How many vectors of each row its head reads.
            read: (sum of counts, D), these vectors.

        Returns:
            (count, C) float32 on the CPU for each row; C may differ.
        """
        own = [list(each) for _, each in groupby(zip(slots, counts, strict=True), key=operator.itemgetter(0))]
        rows = [(each[0][0], sum(count for _, count in each)) for each in own]

        def shared(module: Callable[[Tensor], Tensor], x: Tensor, heads: Sequence[int]) -> Tensor:
            self._head_rows = [rows[each] for each in heads]
            try:
                return module(x)
            finally:
                self._head_rows = []

        found = self._head(kind).logits([(self._slots[slot].head, count) for slot, count in rows], read, shared)
        split = [torch.split(part, [count for _, count in each]) for part, each in zip(found, own, strict=True)]
        return [logits for each in split for logits in each]

    def _head(self, kind: HeadKind) -> Heads:
        """The modules of one kind of head."""
        if kind not in self._heads:
            self._heads[kind] = Heads(self._model, self.family, kind)
        return self._heads[kind]

    def keys_values(self, slot: int, group: str, layer: int) -> Pair | None:
        """What a slot's rows see before their own tokens in one attention layer: see `begin`.

        Returns:
            Keys and values, each (H_kv, P, D); None without a prefix.
        """
        if slot < 0:
            kv_slot = self._begun[slot]
            keys, values = kv_slot.block.stored[group][layer][:, kv_slot.index, :, : kv_slot.lengths[group]]
            return keys, values
        loaded = self.at(slot)
        if loaded is None or group not in loaded.prefix:
            return None
        both = loaded.prefix[group][layer]  # (2, H, P, D)
        return both[0], both[1]

    def prefix_length(self, slot: int) -> int:
        """P of a slot's prefix; 0 without one."""
        loaded = self.at(slot)
        return 0 if loaded is None else loaded.prefix_length


def _fill(views: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        views[name].copy_(value)
