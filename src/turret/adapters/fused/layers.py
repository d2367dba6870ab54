"""Whole layers in one call, where an engine's pass has few tokens: a short text, or the next token of some rows.

    BERT, RoBERTa:         h = norm(W_o attention(W_q x, W_k x, W_v x) + x),    y = norm(W_down gelu(W_up h) + h)
    Llama, Mistral, Qwen:  h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
                           y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)

For so few tokens the dozen modules of a layer take longer than its arithmetic. One call does the same in the same order
with the same rounding, so the numbers are the same. If a layer contains anything else, its modules compute it. The call
of a layer also computes the layers after it, up to the first hook between them; those layers return their input.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from turret.adapters.attention import rows_and_prefixes
from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import AdapterPoolProtocol, BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.activations import FrozenGated, FrozenGELU
from turret.adapters.fused.flash import pairs_of, prefix_gradients
from turret.adapters.fused.frozen import plain
from turret.adapters.fused.gpu_decoder import GpuDecoder
from turret.adapters.fused.residual import (
    FrozenNorm,
    FrozenOutput,
    PostNormLayer,
    PreNormLayer,
    RecomputedLayerNorm,
    RecomputedNorm,
    restored,
    to_save,
    with_input,
)
from turret.adapters.fused.trained_decoder import TrainedDecoder
from turret.adapters.fused.trained_layer import (
    Back,
    LayerArguments,
    Matrices,
    has_hooks,
    linears_of,
    trains_one_adapter,
)
from turret.adapters.lora import RoutedLinear
from turret.adapters.modules_to_save import unrouted
from turret.families import FastPaths, Layout
from turret.ops.cpu import (
    LARGEST,
    AttentionRows,
    DecoderLayer,
    DropoutArguments,
    EncoderLayer,
    LayerMatrix,
    LayerNorm,
    Layers,
    Library,
    usable,
)
from turret.ops.cpu.layers import Layer

# --- trained encoder --------------------------------------------------------------------------------------------------
# A whole layer of BERT or RoBERTa as one operation of autograd while an adapter trains (`trained_layer`).
#
#     h = norm(dropout(W_o attention(W_q x, W_k x, W_v x)) + x),    y = norm(dropout(W_down gelu(W_up h)) + h)
#
# If a layer contains anything else, its modules compute it.


Q, K, V, OUT, UP, DOWN = range(6)  # the order of the matrices


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float
    dropped: DropoutArguments  # of the branch that is added before the norm


class _Pass(NamedTuple):
    """The arguments of one pass through a layer that are not tensors of autograd."""

    library: Library
    matrices: Matrices
    norms: tuple[_Norm, _Norm]  # after attention, and after the MLP
    dim: int  # of a head
    rows: AttentionRows
    of_row: tuple[int | None, ...]  # the index of each row's prefix
    dropped: DropoutArguments  # of attention's probabilities
    read: Tensor | None  # (B,) the only tokens that go on after attention, or all


class _Context(FunctionContext, Protocol):
    call: _Pass
    norm: RecomputedNorm | None
    inner: int


class _EncoderLayer(torch.autograd.Function):
    """x: (1, N, D) -> (y (1, N or B, D), the input of its last norm, that norm's stats).

    tensors: A (R, D_in) and B (D_out, R) of every adapted matrix, then key and value (H, P, D) of every prefix.
    """

    @staticmethod
    def forward(ctx: _Context, call: _Pass, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        library, matrices, rows = call.library, call.matrices, x.view(-1, x.shape[-1])  # (N, D)
        inner: list[Tensor] = []

        def product(i: int, x: Tensor) -> Tensor:
            return matrices.forward(i, x, tensors, inner)

        def normed(a: Tensor, x: Tensor, norm: _Norm) -> tuple[Tensor, Tensor, Tensor]:
            return library.added_norm(a, x, norm.weight, norm.bias, norm.eps, norm.dropped)

        q, k, v = (product(i, rows).view(len(rows), -1, call.dim) for i in (Q, K, V))
        pairs = pairs_of(tensors[matrices.factors :], call.of_row)
        a, log_sum = library.attention(call.rows, q, k, v, pairs, call.dropped)
        a, branch_input = a.view(len(rows), -1), rows
        if call.read is not None:
            a, branch_input = (each.index_select(0, call.read) for each in (a, branch_input))
        h, s, stats = normed(product(OUT, a), branch_input, call.norms[0])
        up = product(UP, h)
        y, t, last_stats = normed(product(DOWN, library.gelu(up)), h, call.norms[1])

        adapted = [each.adapted for each in matrices.each]
        saved_x, ctx.norm = to_save(x) if any(adapted[:OUT]) else (None, None)
        saved_a = a if adapted[OUT] else None
        ctx.call, ctx.inner = call, len(inner)
        ctx.save_for_backward(saved_x, saved_a, q, k, v, log_sum, s, stats, up, t, last_stats, *inner, *tensors)
        ctx.mark_non_differentiable(t, last_stats)
        ctx.set_materialize_grads(False)
        return y[None], t, last_stats

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> Gradients:
        call = ctx.call
        library, matrices, (first, last) = call.library, call.matrices, call.norms
        x, a, q, k, v, log_sum, s, stats, up, t, last_stats, *others = ctx.saved_tensors
        inner, tensors = others[: ctx.inner], others[ctx.inner :]
        back = Back(tensors, inner, [None] * len(tensors))

        dy = gradients[0].contiguous().view(t.shape)
        dy, dh = library.added_norm_backward(t, last.weight, last_stats, last.dropped, dy)
        dy = library.gelu_backward(up, matrices.input_gradient(DOWN, dy, lambda: library.gelu(up), back))
        norm = RecomputedLayerNorm(first.weight, first.bias, stats, library)
        dh.add_(matrices.input_gradient(UP, dy, lambda: norm.of(s), back))
        dy, dr = library.added_norm_backward(s, first.weight, stats, first.dropped, dh)
        da = matrices.input_gradient(OUT, dy, lambda: a, back)
        if call.read is not None:
            da, dr = (each.new_zeros(len(q), each.shape[1]).index_add_(0, call.read, each) for each in (da, dr))
        prefixes = tensors[matrices.factors :]
        *parts, all_rows = library.attention_backward(
            call.rows, q, k, v, pairs_of(prefixes, call.of_row), call.dropped, da.view(q.shape), log_sum
        )
        back.gradients[matrices.factors :] = prefix_gradients(all_rows, prefixes, call.of_row)
        rows = functools.cache(lambda: restored(x, ctx.norm).view(len(q), -1))
        for i in (V, K, Q):  # the order in which autograd would add them
            dy = parts[i].view(len(q), -1)
            if ctx.needs_input_grad[1]:
                dr = dr.add_(matrices.input_gradient(i, dy, rows, back))
            else:
                matrices.factor_gradients(i, dy, rows, back)
        return None, dr[None] if ctx.needs_input_grad[1] else None, *back.gradients


class TrainedEncoder:
    """One layer as one operation."""

    def __init__(self, module: PostNormLayer, context: BatchContext) -> None:
        self._module, self._context = module, context

    def __call__(self, x: Tensor) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D), or (1, B, D) if the last layer computes only `BatchContext.read`.

        None if the layer's modules must compute it.
        """
        context, module = self._context, self._module
        slot, attention, outputs = context.single(), module.attention.self, self._outputs()
        if slot is None or outputs is None or not trains_one_adapter(context):
            return None
        projections = attention.query, attention.key, attention.value
        linears = linears_of((*projections, outputs[0].dense, module.intermediate.dense, outputs[1].dense), slot)
        if linears is None:
            return None
        norms = [each.LayerNorm for each in outputs]
        modules: list[nn.Linear | nn.LayerNorm] = [*(layer for layer, _ in linears), *norms]
        frozen = [each for one in modules for each in (one.weight, one.bias) if each is not None]
        library = usable(x, *frozen)
        if library is None or x.numel() >= LARGEST or any(each.requires_grad for each in frozen):
            return None
        rows, prefixes = rows_and_prefixes(attention.turret_hook, attention.scaling, None, x.dtype)
        if not x.requires_grad and not any(factors for _, factors in linears) and not prefixes.pairs:
            return None  # nothing trains in this layer or below it

        arguments = LayerArguments(library, context)

        def norm(i: int) -> _Norm:
            own, dropout = norms[i], outputs[i].dropout
            return _Norm(own.weight, own.bias, own.eps, arguments.dropped(dropout.p if dropout.training else 0.0))

        matrices = [arguments.matrix(*linears[i]) for i in (Q, K, V)]
        dropped = arguments.dropped(attention.dropout.p if attention.training else 0.0)
        matrices.append(arguments.matrix(*linears[OUT]))
        first = norm(0)
        matrices += [arguments.matrix(*linears[i]) for i in (UP, DOWN)]
        call = _Pass(
            library,
            Matrices(context, matrices),
            (first, norm(1)),
            attention.attention_head_size,
            rows,
            tuple(prefixes.of_row),
            dropped,
            context.read if outputs[0].narrows else None,
        )
        tensors = *arguments.tensors, *(each for pair in prefixes.pairs for each in pair)
        y, t, stats = apply(_EncoderLayer, call, x.contiguous(), *tensors)
        return with_input(y, t[None], RecomputedLayerNorm(norms[1].weight, norms[1].bias, stats, library))

    def _outputs(self) -> tuple[FrozenOutput, FrozenOutput] | None:
        """The ends of both halves of the layer, or None if modules between its linear layers are anything else."""
        module = self._module
        first, last = module.attention.output, module.output
        if type(first) is not FrozenOutput or type(last) is not FrozenOutput or module.is_decoder:
            return None
        if any(map(has_hooks, (module.attention, module.attention.self, first, module.intermediate, last))):
            return None
        for norm in (first.LayerNorm, last.LayerNorm):
            if type(norm) is not nn.LayerNorm or norm.bias is None:
                return None
        return (first, last) if isinstance(module.intermediate.intermediate_act_fn, FrozenGELU) else None


# --- layers -----------------------------------------------------------------------------------------------------------


DONE = ("through",)  # key of a context's memo: the output of the latest call, and the index of the layer after it
CosSin = tuple[Tensor, Tensor]  # of the rotary positions, each (1, N, head size)
M = TypeVar("M", bound=nn.Module)


class OneCall(ABC, Generic[M]):
    """A layer and those after it in one call. Calling it gives None if the modules must compute.

    order: all layers of the model.
    """

    def __init__(self, module: M, context: BatchContext, order: list[OneCall[M]]) -> None:
        self._module, self._context = module, context
        self._original: Callable[..., Tensor] = module.forward
        self._order, self._index = order, len(order)
        self._weights: tuple[AdapterPoolProtocol, Layer | None] | None = None  # as `weights` found them in this pool
        self._runs: dict[int, Layers] = {}  # by the number of layers
        order.append(self)

    def __call__(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D)."""
        done: tuple[Tensor, int] | None = self._context.memo.get(DONE)
        if done is not None and done[0] is x and self._index < done[1]:
            return x
        pool = self._context.adapter_pool
        library = None if pool is None else pool.library
        if pool is None or library is None or pool.scales or torch.is_grad_enabled() or self._module.training:
            return None
        if usable(x) is None or not 0 < x.shape[1] <= library.few(x.dtype) or not enabled("layer_calls"):
            return None
        run = self._run(pool, x.dtype)
        if not run:
            return None
        if len(run) not in self._runs:
            self._runs[len(run)] = Layers([own for each in run if (own := each.weights(pool)) is not None])
        modules = [each._module for each in run]
        y = self._computed(library, self._runs[len(run)], modules, pool, x.contiguous(), cos_sin)
        if y is not None:
            self._context.memo[DONE] = y, self._index + len(run)
        return y

    # transformers' arguments pass through; bound to this object, so that a copy of the model uses the copy's weights
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces the module's own forward."""
        y = self(hidden_states, kwargs.get("position_embeddings"))
        return self._original(hidden_states, *args, **kwargs) if y is None else y

    def weights(self, pool: AdapterPoolProtocol) -> Layer | None:
        """The layer's weights, or None if it contains anything that the kernel does not compute."""
        if self._weights is None or self._weights[0] is not pool:
            self._weights, self._runs = (pool, self._layer(pool)), {}
        return self._weights[1]

    def _run(self, pool: AdapterPoolProtocol, dtype: torch.dtype) -> list[OneCall[M]]:
        """This layer and those after it that one call computes; empty if the modules must compute."""
        run: list[OneCall[M]] = []
        first = self.weights(pool)
        for each in self._order[self._index : self._layer_count]:
            own = each.weights(pool)
            if own is None or first is None or own.alike != first.alike or own.dtype != dtype:
                break
            if run and each._module._forward_pre_hooks:
                break
            run.append(each)
            if each._module._forward_hooks:
                break
        return run

    @property
    @abstractmethod
    def _layer_count(self) -> int:
        """How many layers the model computes."""

    @abstractmethod
    def _layer(self, pool: AdapterPoolProtocol) -> Layer | None:
        """See `weights`."""

    @abstractmethod
    def _computed(
        self,
        library: Library,
        layers: Layers,
        modules: Sequence[M],
        pool: AdapterPoolProtocol,
        x: Tensor,
        cos_sin: CosSin | None,
    ) -> Tensor | None:
        """The layers on x, or None if this pass is of another kind."""


class Encoder(OneCall[PostNormLayer]):
    """Every token of a pass; while an adapter trains, one operation of autograd."""

    def __init__(self, module: PostNormLayer, context: BatchContext, order: list[OneCall[PostNormLayer]]) -> None:
        super().__init__(module, context, order)
        self._trained = TrainedEncoder(module, context)

    def __call__(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        return self._trained(x) if torch.is_grad_enabled() else super().__call__(x, cos_sin)

    @property
    def _layer_count(self) -> int:
        return self._module.attention.self.config.num_hidden_layers

    def _computed(
        self,
        library: Library,
        layers: Layers,
        modules: Sequence[PostNormLayer],
        pool: AdapterPoolProtocol,
        x: Tensor,
        cos_sin: CosSin | None,
    ) -> Tensor | None:
        if self._context.lengths is None or self._context.read is not None:
            return None
        attentions = [each.attention.self for each in modules]
        rows = [rows_and_prefixes(each.turret_hook, each.scaling, None, x.dtype) for each in attentions]
        return library.encoder_layers(layers, x, pool.spans("encoder"), rows)

    def _layer(self, pool: AdapterPoolProtocol) -> EncoderLayer | None:
        module, attention = self._module, self._module.attention.self
        first, last = module.attention.output, module.output
        gelu = isinstance(module.intermediate.intermediate_act_fn, FrozenGELU)
        if not gelu or module.is_decoder or not isinstance(first, FrozenOutput) or not isinstance(last, FrozenOutput):
            return None
        projections = attention.query, attention.key, attention.value
        matrices = _matrices(pool, [*projections, first.dense, module.intermediate.dense, last.dense])
        norms = [norm for each in (first, last) if isinstance(norm := unrouted(each.LayerNorm), nn.LayerNorm)]
        if len(norms) < 2 or matrices is None or not all(_is_affine(each) for each in norms):
            return None
        if not _alike(matrices, [own for norm in norms for own in norm.parameters()]):
            return None
        one, other = (LayerNorm(each.weight, each.bias, each.eps) for each in norms)
        return EncoderLayer(matrices, (one, other), attention.attention_head_size)


class Decoder(OneCall[PreNormLayer]):
    """The next token of every row, in a pass without prefill; while an adapter trains, one operation of autograd."""

    def __init__(self, module: PreNormLayer, context: BatchContext, order: list[OneCall[PreNormLayer]]) -> None:
        super().__init__(module, context, order)
        self._trained, self._on_gpu = TrainedDecoder(module, context), GpuDecoder(module, context)

    def __call__(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        if not x.is_cpu:
            return self._on_gpu(x, cos_sin)
        return self._trained(x, cos_sin) if torch.is_grad_enabled() else super().__call__(x, cos_sin)

    @property
    def _layer_count(self) -> int:
        return self._module.self_attn.config.num_hidden_layers

    def _computed(
        self,
        library: Library,
        layers: Layers,
        modules: Sequence[PreNormLayer],
        pool: AdapterPoolProtocol,
        x: Tensor,
        cos_sin: CosSin | None,
    ) -> Tensor | None:
        cache = self._context.cache
        if cache is None or cos_sin is None or cache.fresh("decoder"):
            return None
        cos, sin = (each.contiguous() for each in cos_sin)
        if any(each.shape != (1, x.shape[1], layers.dim) for each in (cos, sin)) or usable(x, cos, sin) is None:
            return None
        parts = []
        for each in modules:
            cached = cache.step("decoder", each.self_attn.turret_hook.site.layer, None, None)
            if any(part.kept is None for part in cached):
                return None
            parts.append([(part.kept, part.keys, part.values) for part in cached if part.kept is not None])
        return library.decoder_layers(layers, x, cos, sin, pool.spans("decoder"), parts)

    def _layer(self, pool: AdapterPoolProtocol) -> DecoderLayer | None:
        module, attention, mlp = self._module, self._module.self_attn, self._module.mlp
        first, last = unrouted(module.input_layernorm), unrouted(module.post_attention_layernorm)
        if not isinstance(mlp, FrozenGated) or not isinstance(first, FrozenNorm) or not isinstance(last, FrozenNorm):
            return None
        heads: list[FrozenNorm | None] = []
        for own in (getattr(attention, name, None) for name in ("q_norm", "k_norm")):
            norm = None if own is None else unrouted(own)
            if norm is not None and not isinstance(norm, FrozenNorm):
                return None
            heads.append(norm)
        norms = [first, *(each for each in heads if each is not None), last]
        q_weight, k_weight = (None if each is None else each.weight for each in heads)
        if len({each.variance_epsilon for each in norms[:-1]}) > 1:
            return None
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        matrices = _matrices(pool, [*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        if matrices is None or not _alike(matrices, [each.weight for each in norms]):
            return None
        return DecoderLayer(
            matrices,
            (first.weight, q_weight, k_weight, last.weight),
            (first.variance_epsilon, last.variance_epsilon),
            dim=attention.head_dim,
            scaling=attention.scaling,
            window=attention.turret_hook.family.window(attention) or 0,
        )


LAYOUTS: dict[Layout, type[OneCall[Any]]] = {"post-norm": Encoder, "pre-norm": Decoder}  # each has its own modules


def _matrices(pool: AdapterPoolProtocol, linears: Sequence[nn.Module]) -> list[LayerMatrix] | None:
    """Routed linear layers, or None if one does more than a product."""
    matrices = []
    for each in linears:
        if not isinstance(each, RoutedLinear) or not plain(each.base_layer):
            return None
        matrices.append(LayerMatrix(pool.number(each), each.weight, each.bias))
    return matrices


def _is_affine(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def _alike(matrices: Sequence[LayerMatrix], others: Sequence[Tensor]) -> bool:
    """Whether all weights of a layer, biases among them, are contiguous and of one dtype."""
    own = [each for matrix in matrices for each in (matrix.weight, matrix.bias) if each is not None]
    return all(each.dtype == own[0].dtype and each.is_contiguous() for each in (*own, *others))


def hook(model: nn.Module, fast: FastPaths, context: BatchContext) -> list[Callable[[], None]]:
    """Let the layers of a model compute in one call where they can; returns functions that undo it."""
    if fast.layout is None:
        return []
    kind = LAYOUTS[fast.layout]
    order: list[OneCall[Any]] = []  # of the layout's modules
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if type(module).__name__ in fast.layers and "forward" not in vars(module):
            module.forward = kind(module, context, order).forward
            undo.append(functools.partial(vars(module).__delitem__, "forward"))
    return undo
