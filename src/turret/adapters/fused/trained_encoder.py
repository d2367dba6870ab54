"""A whole layer of BERT or RoBERTa as one operation of autograd while an adapter trains (`trained_layer`).

    h = norm(dropout(W_o attention(W_q x, W_k x, W_v x)) + x),    y = norm(dropout(W_down gelu(W_up h)) + h)

If a layer contains anything else, its modules compute it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.adapters.attention import rows_and_prefixes
from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused.activations import FrozenGELU
from turret.adapters.fused.flash import pairs_of, prefix_gradients
from turret.adapters.fused.layer_types import PostNormLayer
from turret.adapters.fused.norms import RecomputedNorm, restored, to_save, with_input
from turret.adapters.fused.residual import FrozenOutput, RecomputedLayerNorm
from turret.adapters.fused.trained_layer import (
    Back,
    LayerArguments,
    Matrices,
    has_hooks,
    linears_of,
    trains_one_adapter,
)
from turret.kernels import LARGEST, AttentionRows, DropoutArguments, Library, usable

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
            library, Matrices(context, matrices), (first, norm(1)), attention.attention_head_size,
            rows, tuple(prefixes.of_row), dropped, context.read if outputs[0].narrows else None,
        )  # fmt: skip
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
