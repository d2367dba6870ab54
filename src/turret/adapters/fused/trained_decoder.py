"""A whole layer of Llama, Mistral or Qwen as one operation while an adapter trains (`trained_layer`).

    h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
    y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)

Qwen 3 has an RMS norm before each rotation. Whatever is not known here, the modules compute. Knows modules by the names
of their parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from turret.adapters.attention import rows_and_prefixes
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused.activations import FrozenGated
from turret.adapters.fused.flash import added_to_prefixes, pairs_of
from turret.adapters.fused.norms import FrozenNorm
from turret.adapters.fused.trained_layer import Back, Draws, Matrices, linears_of, stands_aside, watched
from turret.kernels import LARGEST, AttentionRows, DropoutArguments, Library, usable

Q, K, V, OUT, GATE, UP, DOWN = range(7)  # the order of the matrices


class _Norm(NamedTuple):
    weight: Tensor
    eps: float


class _Pass(NamedTuple):
    """All that one pass through a layer is told beside its tensors."""

    library: Library
    matrices: Matrices
    norms: tuple[_Norm, _Norm]  # before attention, and before the MLP
    of_heads: tuple[_Norm, _Norm] | None  # of queries and of keys
    dim: int  # of a head
    rows: AttentionRows
    of_row: tuple[int | None, ...]  # which prefix each row has
    dropped: DropoutArguments  # of attention's probabilities


class _DecoderLayer(torch.autograd.Function):
    """x: (1, N, D), which wants a gradient -> (1, N, D). cos, sin: (N, head size).

    tensors: A (R, D_in) and B (D_out, R) of every adapted matrix, then key and value (H, P, D) of every prefix.
    """

    @staticmethod
    def forward(ctx: Any, told: _Pass, x: Tensor, cos: Tensor, sin: Tensor, *tensors: Tensor) -> Tensor:
        library, matrices, rows = told.library, told.matrices, x.view(-1, x.shape[-1])  # (N, D)
        before, behind = told.norms
        inner: list[Tensor] = []

        def product(i: int, x: Tensor) -> Tensor:
            return matrices.forward(i, x, tensors, inner)

        n, r = library.rms_norm(rows, *before)
        q, k, v = (product(i, n).view(len(rows), -1, told.dim) for i in (Q, K, V))
        heads: tuple[Tensor, ...] = ()  # what their norms were given, and 1 / sqrt(mean of squares) of it
        if told.of_heads is not None:
            given = q, k
            (q, of_q), (k, of_k) = (library.rms_norm(x, *norm) for x, norm in zip(given, told.of_heads, strict=True))
            heads = *given, of_q, of_k
        q, k = (library.rotate(each, cos, sin, 1.0) for each in (q, k))
        pairs = pairs_of(tensors[matrices.factors :], told.of_row)
        a, log_sum = library.attention(told.rows, q, k, v, pairs, told.dropped)
        a = a.view(len(rows), -1)
        h = product(OUT, a).add_(rows)
        m, r_behind = library.rms_norm(h, *behind)
        both = product(GATE, m), product(UP, m)
        y = product(DOWN, library.swiglu(*both)).add_(h)

        ctx.again = _bare(matrices) and (matrices.cheap(GATE) or library.tiled(x.dtype))
        ctx.told, ctx.inner, ctx.heads = told, len(inner), len(heads)
        kept = a if matrices.each[OUT].adapted else None, *((None, None) if ctx.again else both)
        ctx.save_for_backward(*kept, x, r, q, k, v, log_sum, h, r_behind, cos, sin, *heads, *inner, *tensors)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        told: _Pass = ctx.told
        library, matrices, (before, behind) = told.library, told.matrices, told.norms
        a, gate, up, x, r, q, k, v, log_sum, h, r_behind, cos, sin, *others = ctx.saved_tensors
        heads, others = others[: ctx.heads], others[ctx.heads :]
        inner, tensors = others[: ctx.inner], others[ctx.inner :]
        back, rows = Back(tensors, inner, [None] * len(tensors)), x.view(h.shape)
        adapted = [each.adapted for each in matrices.each]

        dy = gradients[0].contiguous().view(h.shape)
        m: Any = library.rms_norm(h, *behind)[0] if ctx.again or any(adapted[GATE:DOWN]) else None
        if ctx.again:
            gate, up = matrices.frozen(GATE, m), matrices.frozen(UP, m)
        d = matrices.backward(DOWN, dy, lambda: library.swiglu(gate, up), back)
        each = library.swiglu_backward(gate, up, d)
        if _bare(matrices):
            d = matrices.backward_both(GATE, UP, each)
        else:
            d = matrices.backward(UP, each[1], lambda: m, back).add_(matrices.backward(GATE, each[0], lambda: m, back))
        dh = library.rms_norm_backward(h, behind.weight, r_behind, d).add_(dy)
        da = matrices.backward(OUT, dh, lambda: a, back)
        prefixes = tensors[matrices.factors :]
        *parts, all_rows = library.attention_backward(
            told.rows, q, k, v, pairs_of(prefixes, told.of_row), told.dropped, da.view(q.shape), log_sum
        )
        back.found[matrices.factors :] = added_to_prefixes(all_rows, prefixes, told.of_row)
        for i in (Q, K):
            parts[i] = library.rotate(parts[i], cos, sin, -1.0)
            if told.of_heads is not None:
                parts[i] = library.rms_norm_backward(heads[i], told.of_heads[i].weight, heads[i + 2], parts[i])
        n = library.rms_norm(rows, *before)[0] if any(adapted[:OUT]) else None
        dn: Any = None
        for i in (V, K, Q):  # the order in which autograd would add them
            d = matrices.backward(i, parts[i].view(len(rows), -1), lambda: n, back)
            dn = d if dn is None else dn.add_(d)
        dx = library.rms_norm_backward(rows, before.weight, r, dn).add_(dh)
        return None, dx.view(x.shape), None, None, *back.found


def _bare(matrices: Matrices) -> bool:
    """Whether the MLP is three frozen matrices and nothing else, as `FrozenGated` takes it."""
    return not any(each.adapted or each.bias is not None for each in matrices.each[GATE:])


class TrainedDecoder:
    """What one layer computes as one operation, or None where its modules shall."""

    def __init__(self, module: Any, context: BatchContext) -> None:
        self._module, self._route = module, context

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D). turn: cosines and sines (1, N, head size)."""
        context, module = self._route, self._module
        slot, attention, mlp = context.single(), module.self_attn, module.mlp
        if slot is None or turn is None or not x.requires_grad or stands_aside(context) or context.read is not None:
            return None
        norms = [module.input_layernorm, module.post_attention_layernorm]
        of_heads = [each for name in ("q_norm", "k_norm") if (each := getattr(attention, name, None)) is not None]
        if type(mlp) is not FrozenGated or not all(type(each) is FrozenNorm for each in (*norms, *of_heads)):
            return None
        if any(map(watched, (attention, mlp, *norms, *of_heads))):
            return None
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        linears = linears_of((*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj), slot)
        if linears is None:
            return None
        frozen = [each for layer, _ in linears for each in (layer.weight, layer.bias) if each is not None]
        frozen += [each.weight for each in (*norms, *of_heads)]
        cos, sin = (each.contiguous() for each in turn)
        library, dim = usable(x, cos, sin, *frozen), attention.head_dim
        if library is None or x.numel() >= LARGEST or any(each.requires_grad for each in frozen):
            return None
        if x.shape[0] != 1 or not cos.shape == sin.shape == (1, x.shape[1], dim):
            return None
        hooked = attention.turret_hook
        rows, prefixes = rows_and_prefixes(hooked, attention.scaling, hooked.family.window(attention), x.dtype)
        draws = Draws(context)
        matrices = [draws.matrix(*linears[i]) for i in (Q, K, V)]
        dropped = draws.dropped(attention.attention_dropout if attention.training else 0.0)
        matrices += [draws.matrix(*linears[i]) for i in (OUT, GATE, UP, DOWN)]
        before, behind, *heads = (_Norm(each.weight, each.variance_epsilon) for each in (*norms, *of_heads))
        told = _Pass(
            library, Matrices(library, context, matrices), (before, behind), (heads[0], heads[1]) if heads else None,
            dim, rows, tuple(prefixes.of_row), dropped,
        )  # fmt: skip
        tensors = *draws.tensors, *(each for pair in prefixes.pairs for each in pair)
        y: Tensor = _DecoderLayer.apply(told, x.contiguous(), cos[0], sin[0], *tensors)  # type: ignore[no-untyped-call]
        return y
