"""A whole layer of Llama, Mistral or Qwen on a GPU: one operation of autograd in training, few launches in decoding.

    h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
    y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)

A small operation on a GPU takes as long to launch as to compute. So here every product of the base is one launch, the
LoRA of all layers with one input is one, and each operation between them is one. n, m and the MLP's product are
computed again in the backward pass. If a layer contains anything else, its modules compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import AdapterPoolProtocol, BatchContext
from turret.adapters.fused.activations import FrozenGated
from turret.adapters.fused.gpu_attention import RowEdges, decodes_heads, row_edges, takes_heads
from turret.adapters.fused.int8 import FrozenProducts
from turret.adapters.fused.residual import FrozenNorm, PreNormLayer
from turret.adapters.fused.trained_layer import has_hooks, trains_one_adapter
from turret.adapters.lora import BaseProducts, LoRAFactors, RoutedLinear
from turret.adapters.modules_to_save import unrouted
from turret.adapters.prefix import GRADIENT_STAYS
from turret.ops.gpu import usable
from turret.quantized import FourBitProducts

SEEDS = 2**31 - 8  # of dropout masks
BY_PROGRAMS = ("by programs",)  # key of a context's memo: how many layers of this pass decoded here


class GpuNorm(NamedTuple):
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = torch.ops.turret.rms_norm(x.reshape(-1, x.shape[-1]), *self)
        return y.view(x.shape)

    def backward(self, x: Tensor, dy: Tensor, plus: Tensor | None = None) -> Tensor:
        """dx + plus."""
        rows = (each.reshape(-1, x.shape[-1]) for each in (x, dy))
        dx: Tensor = torch.ops.turret.rms_norm_backward(next(rows), *self, next(rows), plus)
        return dx.view(x.shape)


@dataclass(frozen=True)
class GpuMatrix:
    """A frozen linear layer, how it multiplies, and the factors that the slot adds to it."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    base: BaseProducts
    factors: LoRAFactors | None

    @classmethod
    def of(cls, module: nn.Module, slot: int | None) -> GpuMatrix | None:
        """The matrix of a linear layer, or None if the layer is anything else. slot: None for a mixed batch."""
        base, factors = module, None
        if isinstance(module, RoutedLinear):
            if has_hooks(module) or (slot is not None and slot in module.scaled):
                return None
            base, factors = module.base_layer, None if slot is None else module.factors(slot)
        if has_hooks(base) or "forward" in vars(base) or (factors is not None and factors.initial_A is not None):
            return None
        if quantized.in_four_bits(base):
            packed = FourBitProducts.of(base)
            return cls(module, packed.weight, base._parameters["bias"], packed, factors)
        if type(base) is not nn.Linear or base.weight.requires_grad or not base.weight.is_contiguous():
            return None
        return cls(module, base.weight, base.bias, FrozenProducts(), factors)

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the base's precision."""
        return [each for each in (self.weight, self.bias) if each is not None and each.is_floating_point()]


class GpuGroup:
    """Layers with one input, and the LoRA of those that are adapted: all of one rank."""

    def __init__(self, matrices: Sequence[GpuMatrix]) -> None:
        self.matrices = matrices
        self.adapted = [place for place, each in enumerate(matrices) if each.factors is not None]
        self.factors = [each.factors for each in matrices if each.factors is not None]
        self.A, self.B = [each.lora_A for each in self.factors], [each.lora_B for each in self.factors]
        first = self.factors[0] if self.factors else None
        self._dropout = first.dropout if first is not None and first.training else 0.0
        self._scaling = 0.0 if first is None else first.scaling / (1.0 - self._dropout)
        self._seed = int(torch.randint(SEEDS, (1,))) if self._dropout > 0.0 else 0  # drawn on the CPU: no wait

    @property
    def routed(self) -> list[RoutedLinear]:
        """The layers as an engine numbers them: it routes all."""
        return [each.module for each in self.matrices if isinstance(each.module, RoutedLinear)]

    @property
    def alike(self) -> bool:
        """Whether one operation can add the LoRA of all: at most three, of one rank, scaling and dropout."""
        kinds = {(each.lora_A.shape[0], each.scaling, each.dropout) for each in self.factors}
        plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in (*self.A, *self.B))
        return plain and len(kinds) < 2 and len(self.factors) <= 3

    def forward(self, x: Tensor, plus: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """(y of each layer, what LoRA's backward pass needs). x: (N, D_in). plus: added to every y."""
        y = [each.base.forward(x, each.weight, each.bias) for each in self.matrices]
        if not self.factors:
            return y if plus is None else [each.add_(plus) for each in y], None
        own = [y[place] for place in self.adapted]
        h: Tensor = torch.ops.turret.add_lora(own, x, self.A, self.B, plus, self._scaling, self._dropout, self._seed)
        return y, h

    def input_gradient(self, dy: Sequence[Tensor], h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """dx (N, D_in), and the gradient of h. dy: of each layer."""
        dx: Tensor | None = None
        for each, own in zip(self.matrices, dy, strict=True):
            if dx is None:
                dx = each.base.backward(own, each.weight)
            elif isinstance(each.base, FrozenProducts):
                dx.addmm_(own, each.weight)
            else:
                dx.add_(each.base.backward(own, each.weight))
        assert dx is not None
        if h is None:
            return dx, None
        own_dy = [dy[place] for place in self.adapted]
        dh: Tensor = torch.ops.turret.lora_input_gradient(
            dx, own_dy, self.A, self.B, self._scaling, self._dropout, self._seed
        )
        return dx, dh

    def factor_gradients(
        self, dy: Sequence[Tensor], x: Callable[[], Tensor], h: Tensor | None, dh: Tensor | None
    ) -> Gradients:
        """The gradients of A and B of every adapted layer; None for one that was added to the parameter's own `grad`.

        x: gives the input; called only if LoRA needs it.
        """
        if h is None:
            return ()
        targets = [_target(each) for pair in zip(self.A, self.B, strict=True) for each in pair]
        into, own_dy = [target for target, _ in targets], [dy[place] for place in self.adapted]
        torch.ops.turret.lora_factor_gradients(
            into[::2], into[1::2], x(), h, dh, own_dy, self._scaling, self._dropout, self._seed
        )
        return tuple(None if stays else target for target, stays in targets)


def _target(parameter: Tensor) -> tuple[Tensor, bool]:
    """Where a gradient is added up, and whether that is the parameter's own `grad`."""
    if getattr(parameter, GRADIENT_STAYS, False) and (grad := parameter.grad) is not None:
        return grad, True
    return torch.zeros_like(parameter, requires_grad=False), False


Groups = tuple[GpuGroup, GpuGroup, GpuGroup, GpuGroup]  # q, k, v; out; gate, up; down


class _Pass(NamedTuple):
    """One pass through a layer: what is no tensor of autograd."""

    groups: Groups
    norms: tuple[GpuNorm, GpuNorm]  # before attention, and before the MLP
    head_norms: tuple[GpuNorm, GpuNorm] | None  # of queries and of keys
    dim: int  # of a head
    edges: RowEdges
    scaling: float


class _Context(FunctionContext, Protocol):
    call: _Pass


class _CardLayer(torch.autograd.Function):
    """x: (N, D) -> (N, D). cos, sin: (N, head size). tensors: A and B of every adapted layer, for autograd to see."""

    @staticmethod
    def forward(ctx: _Context, call: _Pass, x: Tensor, cos: Tensor, sin: Tensor, *tensors: Tensor) -> Tensor:
        ops, (qkv, out, gated, down), (first, second) = torch.ops.turret, call.groups, call.norms
        (q, k, v), qkv_h = qkv.forward(first(x))
        q, k, v = (each.view(len(x), -1, call.dim) for each in (q, k, v))
        before: tuple[Tensor | None, Tensor | None] = None, None  # the inputs of the head norms
        if call.head_norms is not None:
            before = q, k
            q, k = call.head_norms[0](q), call.head_norms[1](k)
        ops.rotate(q, k, cos, sin, 1.0)
        a, log_sum = ops.attention(q, k, v, *call.edges.arguments, call.scaling)
        (h,), out_h = out.forward(a.view(len(x), -1), plus=x)
        (gate, up), gated_h = gated.forward(second(h))
        (y,), down_h = down.forward(ops.swiglu(gate, up), plus=h)
        ctx.call = call
        saved = x, q, k, v, a, log_sum, h, gate, up, cos, sin, *before, qkv_h, out_h, gated_h, down_h
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> Gradients:
        call = ctx.call
        ops, (qkv, out, gated, down), (first, second) = torch.ops.turret, call.groups, call.norms
        x, q, k, v, a, log_sum, h, gate, up, cos, sin, q_before, k_before, *inner = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dproduct, down_dh = down.input_gradient([dy], inner[3])
        dgate, dup, product = ops.swiglu_backward(gate, up, dproduct)
        of_down = down.factor_gradients([dy], lambda: product, inner[3], down_dh)
        dm, gated_dh = gated.input_gradient([dgate, dup], inner[2])
        of_gated = gated.factor_gradients([dgate, dup], lambda: second(h), inner[2], gated_dh)
        dh = second.backward(h, dm, dy)
        da, out_dh = out.input_gradient([dh], inner[1])
        of_out = out.factor_gradients([dh], lambda: a.view(len(x), -1), inner[1], out_dh)
        dq, dk, dv = ops.attention_backward(da.view(q.shape), q, k, v, a, log_sum, *call.edges.arguments, call.scaling)
        ops.rotate(dq, dk, cos, sin, -1.0)
        if call.head_norms is not None:
            dq, dk = call.head_norms[0].backward(q_before, dq), call.head_norms[1].backward(k_before, dk)
        dqkv = [each.view(len(x), -1) for each in (dq, dk, dv)]
        dn, qkv_dh = qkv.input_gradient(dqkv, inner[0])
        of_qkv = qkv.factor_gradients(dqkv, lambda: first(x), inner[0], qkv_dh)
        dx = first.backward(x, dn, dh)
        return None, dx, None, None, *of_qkv, *of_out, *of_gated, *of_down


class GpuDecoder:
    """One layer on a GPU. Calling it gives None if the layer's modules must compute."""

    def __init__(self, module: PreNormLayer, context: BatchContext) -> None:
        self._module, self._context = module, context
        self._kept: tuple[AdapterPoolProtocol, Groups | None] | None = (
            None  # the matrices, as an engine's pool has them
        )

    def __call__(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D). cos_sin: (1, N, head size) each."""
        norms, mlp, attention = self._norms(), self._module.mlp, self._module.self_attn
        if norms is None or cos_sin is None or type(mlp) is not FrozenGated or any(map(has_hooks, (attention, mlp))):
            return None
        dim = attention.head_dim
        if x.shape[0] != 1 or any(each.shape != (1, x.shape[1], dim) for each in cos_sin) or not takes_heads(dim):
            return None
        if torch.is_autocast_enabled("cuda") or self._context.int8:
            return None
        cos, sin = (each[0].contiguous() for each in cos_sin)
        if not usable(x, cos, sin, *(each.weight for each in norms)):
            return None
        rows = x.contiguous().view(x.shape[1:])
        y = (self._trained if torch.is_grad_enabled() else self._decoded)(rows, cos, sin, norms)
        return None if y is None else y.view(x.shape)

    def _trained(self, x: Tensor, cos: Tensor, sin: Tensor, norms: list[GpuNorm]) -> Tensor | None:
        """One LoRA that trains on unpadded rows. x: (N, D) -> (N, D)."""
        attention, context = self._module.self_attn, self._context
        hooked, slot = attention.turret_hook, context.single()
        if slot is None or not trains_one_adapter(context) or context.read is not None:
            return None
        if (attention.training and attention.attention_dropout > 0.0) or hooked.prefix(slot, hooked.site) is not None:
            return None
        groups = self._groups(slot, x)
        if groups is None or not all(each.alike for each in groups):
            return None
        tensors = [each for group in groups for pair in zip(group.A, group.B, strict=True) for each in pair]
        if not tensors and not x.requires_grad:
            return None
        edges = row_edges(context, hooked.site, hooked.family.window(attention), {}, x.device)
        heads = (norms[2], norms[3]) if len(norms) > 2 else None
        call = _Pass(groups, (norms[0], norms[1]), heads, attention.head_dim, edges, attention.scaling)
        return apply(_CardLayer, call, x, cos, sin, *tensors)

    def _decoded(self, x: Tensor, cos: Tensor, sin: Tensor, norms: list[GpuNorm]) -> Tensor | None:
        """The next token of every row, in a pass without prefill. x: (N, D) -> (N, D)."""
        pool, cache, attention = self._context.adapter_pool, self._context.cache, self._module.self_attn
        if pool is None or cache is None or cache.fresh("decoder") or pool.scales or self._module.training:
            return None
        if not decodes_heads(attention.head_dim):
            return None
        if self._kept is None or self._kept[0] is not pool:
            self._kept = pool, self._groups(None, x)
        groups = self._kept[1]
        if groups is None or any(len(each.routed) < len(each.matrices) for each in groups):
            return None
        ops, mixed = torch.ops.turret, pool.mixed

        def products(group: GpuGroup, x: Tensor, plus: Tensor | None = None) -> list[Tensor]:
            y = [each.base.forward(x, each.weight, each.bias) for each in group.matrices]
            if mixed is not None:
                mixed.add(y, x, [pool.number(each) for each in group.routed], plus)
            elif plus is not None:
                y[0].add_(plus)
            return y

        qkv, out, gated, down = groups
        q, k, v = (each.view(len(x), -1, attention.head_dim) for each in products(qkv, norms[0](x)))
        if len(norms) > 2:
            q, k = norms[2](q), norms[3](k)
        window, start, parts = attention.turret_hook.family.window(attention) or 0, 0, []
        for part in cache.step("decoder", attention.turret_hook.site.layer, None, None):
            own = slice(start, start + len(part.lengths))
            cached = part.keys, part.values, part.lengths, part.prefixes
            parts.append(
                ops.attend_step(q[own], k[own], v[own], cos[own], sin[own], *cached, window, attention.scaling)
            )
            start = own.stop
        a = parts[0] if len(parts) == 1 else torch.cat(parts)
        (h,) = products(out, a.view(len(x), -1), x)
        gate, up = products(gated, norms[1](h))
        (y,) = products(down, ops.swiglu(gate, up), h)
        self._context.memo[BY_PROGRAMS] = self._context.memo.get(BY_PROGRAMS, 0) + 1
        return y

    def _groups(self, slot: int | None, x: Tensor) -> Groups | None:
        """The layer's matrices by input, or None if one of them is anything else."""
        attention, mlp = self._module.self_attn, self._module.mlp
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
        found = [GpuMatrix.of(each, slot) for each in linears]
        matrices = [each for each in found if each is not None]
        if len(matrices) < len(linears) or not usable(x, *(own for each in matrices for own in each.tensors)):
            return None
        groups = matrices[:3], matrices[3:4], matrices[4:6], matrices[6:]
        first, second, third, fourth = map(GpuGroup, groups)
        return first, second, third, fourth

    def _norms(self) -> list[GpuNorm] | None:
        """The norms before attention and before the MLP, and of queries and keys if the layer has them.

        None if one is not a plain `FrozenNorm`.
        """
        module, attention = self._module, self._module.self_attn
        modules = [module.input_layernorm, module.post_attention_layernorm]
        modules += [own for name in ("q_norm", "k_norm") if (own := getattr(attention, name, None)) is not None]
        found = []
        for each in modules if torch.is_grad_enabled() else map(unrouted, modules):
            if type(each) is not FrozenNorm or has_hooks(each) or each.weight.requires_grad:
                return None
            found.append(GpuNorm(each.weight, each.variance_epsilon))
        return found
