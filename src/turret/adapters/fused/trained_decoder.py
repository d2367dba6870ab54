"""A whole layer of Llama, Mistral or Qwen as one operation of autograd while an adapter trains (`trained_layer`).

    h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
    y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)

Qwen 3 has an RMS norm before each rotation. If a layer contains anything else, its modules compute it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.adapters.attention import rows_and_prefixes
from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused.activations import FrozenGated
from turret.adapters.fused.flash import pairs_of, prefix_gradients
from turret.adapters.fused.residual import FrozenNorm, PreNormLayer
from turret.adapters.fused.trained_layer import (
    Back,
    LayerArguments,
    Matrices,
    has_hooks,
    linears_of,
    trains_one_adapter,
)
from turret.ops.cpu import LARGEST, AttentionRows, DropoutArguments, Library, usable

Q, K, V, OUT, GATE, UP, DOWN = range(7)  # the order of the matrices


class _Norm(NamedTuple):
    weight: Tensor
    eps: float


class _Pass(NamedTuple):
    """The arguments of one pass through a layer that are not tensors of autograd."""

    library: Library
    matrices: Matrices
    norms: tuple[_Norm, _Norm]  # before attention, and before the MLP
    head_norms: tuple[_Norm, _Norm] | None  # of queries and of keys
    dim: int  # of a head
    rows: AttentionRows
    of_row: tuple[int | None, ...]  # the index of each row's prefix
    dropped: DropoutArguments  # of attention's probabilities


class _Context(FunctionContext, Protocol):
    call: _Pass
    recomputes: bool
    inner: int
    heads: int


class _DecoderLayer(torch.autograd.Function):
    """x: (1, N, D), which needs a gradient -> (1, N, D). cos, sin: (N, head size).

    tensors: A (R, D_in) and B (D_out, R) of every adapted matrix, then key and value (H, P, D) of every prefix.
    """

    @staticmethod
    def forward(ctx: _Context, call: _Pass, x: Tensor, cos: Tensor, sin: Tensor, *tensors: Tensor) -> Tensor:
        library, matrices, rows = call.library, call.matrices, x.view(-1, x.shape[-1])  # (N, D)
        first, second = call.norms
        inner: list[Tensor] = []

        def product(i: int, x: Tensor) -> Tensor:
            return matrices.forward(i, x, tensors, inner)

        n, r = library.rms_norm(rows, *first)
        q, k, v = (product(i, n).view(len(rows), -1, call.dim) for i in (Q, K, V))
        heads: tuple[Tensor, ...] = ()  # the inputs of the head norms, and 1 / sqrt(mean of squares) of each
        if call.head_norms is not None:
            heads = q, k
            (q, q_r), (k, k_r) = (library.rms_norm(x, *norm) for x, norm in zip(heads, call.head_norms, strict=True))
            heads = *heads, q_r, k_r
        q, k = (library.rotate(each, cos, sin, 1.0) for each in (q, k))
        pairs = pairs_of(tensors[matrices.factors :], call.of_row)
        a, log_sum = library.attention(call.rows, q, k, v, pairs, call.dropped)
        a = a.view(len(rows), -1)
        h = product(OUT, a).add_(rows)
        m, second_r = library.rms_norm(h, *second)
        gate, up = product(GATE, m), product(UP, m)
        y = product(DOWN, library.swiglu(gate, up)).add_(h)

        ctx.recomputes = _is_frozen_mlp(matrices) and (matrices.cheap(GATE) or library.tiled(x.dtype))
        ctx.call, ctx.inner, ctx.heads = call, len(inner), len(heads)
        saved = a if matrices.each[OUT].adapted else None, *((None, None) if ctx.recomputes else (gate, up))
        ctx.save_for_backward(*saved, x, r, q, k, v, log_sum, h, second_r, cos, sin, *heads, *inner, *tensors)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> Gradients:
        call = ctx.call
        library, matrices, (first, second) = call.library, call.matrices, call.norms
        a, gate, up, x, r, q, k, v, log_sum, h, second_r, cos, sin, *others = ctx.saved_tensors
        heads, others = others[: ctx.heads], others[ctx.heads :]
        inner, tensors = others[: ctx.inner], others[ctx.inner :]
        back, rows = Back(tensors, inner, [None] * len(tensors)), x.view(h.shape)
        n = functools.cache(lambda: library.rms_norm(rows, *first)[0])
        m = functools.cache(lambda: library.rms_norm(h, *second)[0])

        dy = gradients[0].contiguous().view(h.shape)
        if ctx.recomputes:
            gate, up = matrices.frozen(GATE, m()), matrices.frozen(UP, m())
        dproduct = matrices.input_gradient(DOWN, dy, lambda: library.swiglu(gate, up), back)
        both = library.swiglu_backward(gate, up, dproduct)
        if _is_frozen_mlp(matrices):
            dm = matrices.input_gradient_of_both(GATE, UP, both)
        else:
            dm = matrices.input_gradient(UP, both[1], m, back).add_(matrices.input_gradient(GATE, both[0], m, back))
        dh = library.rms_norm_backward(h, second.weight, second_r, dm).add_(dy)
        da = matrices.input_gradient(OUT, dh, lambda: a, back)
        prefixes = tensors[matrices.factors :]
        *parts, all_rows = library.attention_backward(
            call.rows, q, k, v, pairs_of(prefixes, call.of_row), call.dropped, da.view(q.shape), log_sum
        )
        back.gradients[matrices.factors :] = prefix_gradients(all_rows, prefixes, call.of_row)
        for i in (Q, K):
            parts[i] = library.rotate(parts[i], cos, sin, -1.0)
            if call.head_norms is not None:
                parts[i] = library.rms_norm_backward(heads[i], call.head_norms[i].weight, heads[i + 2], parts[i])
        dn = matrices.input_gradient(V, parts[V].view(len(rows), -1), n, back)
        for i in (K, Q):  # the order in which autograd would add them
            dn.add_(matrices.input_gradient(i, parts[i].view(len(rows), -1), n, back))
        dx = library.rms_norm_backward(rows, first.weight, r, dn).add_(dh)
        return None, dx.view(x.shape), None, None, *back.gradients


def _is_frozen_mlp(matrices: Matrices) -> bool:
    """Whether the MLP is three frozen matrices without biases, as `FrozenGated` computes it in one operation."""
    return not any(each.adapted or each.bias is not None for each in matrices.each[GATE:])


class TrainedDecoder:
    """One layer as one operation."""

    def __init__(self, module: PreNormLayer, context: BatchContext) -> None:
        self._module, self._context = module, context

    def __call__(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D), or None if the layer's modules must compute. cos_sin: (1, N, head size) each."""
        context, attention, mlp = self._context, self._module.self_attn, self._module.mlp
        slot, norms = context.single(), self._norms()
        if slot is None or cos_sin is None or norms is None or not x.requires_grad:
            return None
        if not trains_one_adapter(context) or context.read is not None:
            return None
        if type(mlp) is not FrozenGated or any(map(has_hooks, (attention, mlp))):
            return None
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        linears = linears_of((*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj), slot)
        if linears is None:
            return None
        frozen = [each for layer, _ in linears for each in (layer.weight, layer.bias) if each is not None]
        frozen += [each.weight for each in norms]
        cos, sin = (each.contiguous() for each in cos_sin)
        library, dim = usable(x, cos, sin, *frozen), attention.head_dim
        if library is None or x.numel() >= LARGEST or any(each.requires_grad for each in frozen):
            return None
        if x.shape[0] != 1 or not cos.shape == sin.shape == (1, x.shape[1], dim):
            return None
        hooked = attention.turret_hook
        rows, prefixes = rows_and_prefixes(hooked, attention.scaling, hooked.family.window(attention), x.dtype)
        arguments = LayerArguments(library, context)
        matrices = [arguments.matrix(*linears[i]) for i in (Q, K, V)]
        dropped = arguments.dropped(attention.attention_dropout if attention.training else 0.0)
        matrices += [arguments.matrix(*linears[i]) for i in (OUT, GATE, UP, DOWN)]
        first, second, *heads = norms
        call = _Pass(
            library,
            Matrices(context, matrices),
            (first, second),
            (heads[0], heads[1]) if heads else None,
            dim,
            rows,
            tuple(prefixes.of_row),
            dropped,
        )
        tensors = *arguments.tensors, *(each for pair in prefixes.pairs for each in pair)
        return apply(_DecoderLayer, call, x.contiguous(), cos[0], sin[0], *tensors)

    def _norms(self) -> list[_Norm] | None:
        """The norms before attention and before the MLP, and of queries and keys if the layer has them.

        None if one is not a plain `FrozenNorm`.
        """
        module = self._module
        modules: Iterable[nn.Module | None] = (
            module.input_layernorm,
            module.post_attention_layernorm,
            getattr(module.self_attn, "q_norm", None),
            getattr(module.self_attn, "k_norm", None),
        )
        found = []
        for each in modules:
            if each is None:
                continue
            if type(each) is not FrozenNorm or has_hooks(each):
                return None
            found.append(_Norm(each.weight, each.variance_epsilon))
        return found
