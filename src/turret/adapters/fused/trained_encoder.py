"""A whole layer of BERT or RoBERTa as one operation while an adapter trains (`trained_layer`).

    h = norm(dropout(W_o attention(W_q x, W_k x, W_v x)) + x),    y = norm(dropout(W_down gelu(W_up h)) + h)

Whatever is not known here, the modules compute. Knows modules by the names of their parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from turret.adapters.attention import rows_and_prefixes
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused.activations import FrozenGELU
from turret.adapters.fused.flash import added_to_prefixes, pairs_of
from turret.adapters.fused.norms import kept, made, marked
from turret.adapters.fused.residual import FrozenOutput, LayerNormAgain
from turret.adapters.fused.trained_layer import Back, Draws, Matrices, linears_of, stands_aside, watched
from turret.kernels import LARGEST, AttentionRows, DropoutArguments, Library, usable

Q, K, V, OUT, UP, DOWN = range(6)  # the order of the matrices


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float
    dropped: DropoutArguments  # of what is added before it


class _Pass(NamedTuple):
    """All that one pass through a layer is told beside its tensors."""

    library: Library
    matrices: Matrices
    norms: tuple[_Norm, _Norm]  # behind attention, and behind the MLP
    dim: int  # of a head
    rows: AttentionRows
    of_row: tuple[int | None, ...]  # which prefix each row has
    dropped: DropoutArguments  # of attention's probabilities
    read: Tensor | None  # (B,) the only tokens that go on after attention, or all


class _EncoderLayer(torch.autograd.Function):
    """x: (1, N, D) -> (y (1, N or B, D), what its last norm was given, that norm's stats).

    tensors: A (R, D_in) and B (D_out, R) of every adapted matrix, then key and value (H, P, D) of every prefix.
    """

    @staticmethod
    def forward(ctx: Any, told: _Pass, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        library, matrices, rows = told.library, told.matrices, x.view(-1, x.shape[-1])  # (N, D)
        inner: list[Tensor] = []

        def product(i: int, x: Tensor) -> Tensor:
            return matrices.forward(i, x, tensors, inner)

        def normed(a: Tensor, x: Tensor, norm: _Norm) -> tuple[Tensor, Tensor, Tensor]:
            return library.added_norm(a, x, norm.weight, norm.bias, norm.eps, norm.dropped)

        q, k, v = (product(i, rows).view(len(rows), -1, told.dim) for i in (Q, K, V))
        pairs = pairs_of(tensors[matrices.factors :], told.of_row)
        a, log_sum = library.attention(told.rows, q, k, v, pairs, told.dropped)
        a, beside = a.view(len(rows), -1), rows
        if told.read is not None:
            a, beside = (each.index_select(0, told.read) for each in (a, beside))
        h, s, stats = normed(product(OUT, a), beside, told.norms[0])
        up = product(UP, h)
        y, t, stats_behind = normed(product(DOWN, library.gelu(up)), h, told.norms[1])

        adapted = [each.adapted for each in matrices.each]
        own, ctx.norm = kept(x) if any(adapted[:OUT]) else (None, None)
        ctx.told, ctx.inner = told, len(inner)
        given = own, a if adapted[OUT] else None
        ctx.save_for_backward(*given, q, k, v, log_sum, s, stats, up, t, stats_behind, *inner, *tensors)
        ctx.mark_non_differentiable(t, stats_behind)
        ctx.set_materialize_grads(False)
        return y[None], t, stats_behind

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        told: _Pass = ctx.told
        library, matrices, (first, last) = told.library, told.matrices, told.norms
        x, a, q, k, v, log_sum, s, stats, up, t, stats_behind, *others = ctx.saved_tensors
        inner, tensors = others[: ctx.inner], others[ctx.inner :]
        back = Back(tensors, inner, [None] * len(tensors))

        dy = gradients[0].contiguous().view(t.shape)
        dy, dh = library.added_norm_backward(t, last.weight, stats_behind, last.dropped, dy)
        dy = library.gelu_backward(up, matrices.backward(DOWN, dy, lambda: library.gelu(up), back))
        again = LayerNormAgain(first.weight, first.bias, stats, library)
        dh.add_(matrices.backward(UP, dy, lambda: again.of(s), back))
        dy, dr = library.added_norm_backward(s, first.weight, stats, first.dropped, dh)
        da = matrices.backward(OUT, dy, lambda: a, back)
        if told.read is not None:
            da, dr = (each.new_zeros(len(q), each.shape[1]).index_add_(0, told.read, each) for each in (da, dr))
        prefixes = tensors[matrices.factors :]
        *parts, all_rows = library.attention_backward(
            told.rows, q, k, v, pairs_of(prefixes, told.of_row), told.dropped, da.view(q.shape), log_sum
        )
        back.found[matrices.factors :] = added_to_prefixes(all_rows, prefixes, told.of_row)
        rows, wanted = None if x is None else made(x, ctx.norm).view(len(q), -1), ctx.needs_input_grad[1]
        for i in (V, K, Q):  # the order in which autograd would add them
            dx = matrices.backward(i, parts[i].view(len(q), -1), lambda: rows, back, wanted)
            dr = dr.add_(dx) if wanted else dr
        return None, dr[None] if wanted else None, *back.found


class TrainedEncoder:
    """What one layer computes as one operation, or None where its modules shall."""

    def __init__(self, module: Any, context: BatchContext) -> None:
        self._module, self._route = module, context

    def __call__(self, x: Tensor) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D), or (1, B, D) where the last layer keeps `BatchContext.read` only."""
        context, module = self._route, self._module
        slot, attention, outputs = context.single(), module.attention.self, (module.attention.output, module.output)
        if slot is None or stands_aside(context) or not self._known():
            return None
        first, behind = (attention.query, attention.key, attention.value), (module.intermediate, module.output)
        linears = linears_of((*first, outputs[0].dense, *(each.dense for each in behind)), slot)
        if linears is None:
            return None
        norms = [each.LayerNorm for each in outputs]
        frozen = [each for layer in (*(one for one, _ in linears), *norms) for each in (layer.weight, layer.bias)]
        frozen = [each for each in frozen if each is not None]
        library = usable(x, *frozen)
        if library is None or x.numel() >= LARGEST or any(each.requires_grad for each in frozen):
            return None
        rows, prefixes = rows_and_prefixes(attention.turret_hook, attention.scaling, None, x.dtype)
        if not x.requires_grad and not any(factors for _, factors in linears) and not prefixes.pairs:
            return None  # nothing to be trained here or below

        draws = Draws(context)

        def norm(i: int) -> _Norm:
            own, dropout = norms[i], outputs[i].dropout
            return _Norm(own.weight, own.bias, own.eps, draws.dropped(dropout.p if dropout.training else 0.0))

        matrices = [draws.matrix(*linears[i]) for i in (Q, K, V)]
        dropped = draws.dropped(attention.dropout.p if attention.training else 0.0)
        matrices.append(draws.matrix(*linears[OUT]))
        behind_attention = norm(0)
        matrices += [draws.matrix(*linears[i]) for i in (UP, DOWN)]
        told = _Pass(
            library, Matrices(library, context, matrices), (behind_attention, norm(1)), attention.attention_head_size,
            rows, tuple(prefixes.of_row), dropped, context.read if outputs[0].narrows else None,
        )  # fmt: skip
        tensors = *draws.tensors, *(each for pair in prefixes.pairs for each in pair)
        y, t, stats = _EncoderLayer.apply(told, x.contiguous(), *tensors)  # type: ignore[no-untyped-call]
        return marked(y, t[None], LayerNormAgain(norms[1].weight, norms[1].bias, stats, library))

    def _known(self) -> bool:
        """Whether what stands between the linear layers is what is computed here, and nobody watches it."""
        module = self._module
        parts = (module.attention, module.attention.self, module.attention.output, module.intermediate, module.output)
        if module.is_decoder or any(map(watched, parts)):
            return False
        for each in (module.attention.output, module.output):
            norm = each.LayerNorm
            if type(each) is not FrozenOutput or type(norm) is not nn.LayerNorm or norm.bias is None:
                return False
        return isinstance(module.intermediate.intermediate_act_fn, FrozenGELU)
