"""A layer of a transformer in terms of operations, forward and backward: for training, prefill and decoding.

    post-norm (BERT, RoBERTa):         h = norm(drop(W_o attention(W_q x, W_k x, W_v x)) + x)
                                       y = norm(drop(W_down gelu(W_up h)) + h)
    pre-norm (Llama, Mistral, Qwen):   h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
                                       y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)

Qwen 3 has an RMS norm before each rotation. The dozen modules of a layer, and what autograd saves for each, take as
long as their arithmetic if rows are short, or on a GPU. Here the operations are called without modules between them. A
block knows no modules: a `Pass` says what it multiplies with, and what its queries see. While one adapter trains, a
layer is one operation of autograd (`train`), and norms and activations are computed again in its backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from turret.ops import lora
from turret.ops.attention import pairs_of
from turret.ops.core import FunctionContext, Gradients, Ops, apply_function, is_enabled
from turret.ops.structs import AttentionRows, DropoutArguments, Group, LayerNorm, RMSNorm
from turret.ops.table import ops_for

QKV, OUT, UP, DOWN = GROUPS = range(4)  # matrices with one input; in a pre-norm layer UP is the gate and up


class Pass(Protocol):
    """One pass of N tokens through a layer."""

    ops: Ops

    def products(self, group: int, x: Tensor, plus: Tensor | None = None) -> list[Tensor]:
        """W x + b + what adapters add + plus, for each matrix of a group. x: (N, D_in)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention's output (N, H, D). q: (N, H, D); k, v: (N, H_kv, D). A pre-norm layer's are rotated here."""

    def keep(self, **tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass, if there is one."""


class Normed(NamedTuple):
    """A layer's input as the norm that made it: its own input, which the layer before saves, and `stats` of that."""

    s: Tensor
    stats: Tensor
    norm: LayerNorm


class PostNorm(NamedTuple):
    """norms: after attention, and after the MLP. dim: of a head. read: (B,) the only tokens after attention."""

    norms: tuple[LayerNorm, LayerNorm]
    dim: int
    read: Tensor | None = None

    def forward(self, run: Pass, x: Tensor) -> Tensor:
        """x: (N, D) -> (N, D), or (B, D)."""
        ops, (first, last) = run.ops, self.norms
        q, k, v = (each.view(len(x), -1, self.dim) for each in run.products(QKV, x))
        a, branch_input = run.attend(q, k, v).reshape(len(x), -1), x
        if self.read is not None:
            a, branch_input = (each.index_select(0, self.read) for each in (a, branch_input))
        (o,) = run.products(OUT, a)
        h, s, stats = ops.added_norm(o, branch_input, first)
        (up,) = run.products(UP, h)
        (down,) = run.products(DOWN, ops.gelu(up))
        y, t, last_stats = ops.added_norm(down, h, last)
        run.keep(a=a, s=s, stats=stats, up=up, t=t, last_stats=last_stats)
        return y

    def backward(self, back: Backward, x: Callable[[], Tensor], dy: Tensor, wanted: bool) -> Tensor | None:
        ops, (first, last), up, s, stats = back.ops, self.norms, back["up"], back["s"], back["stats"]
        dy, dh = ops.added_norm_backward(back["t"], last, back["last_stats"], dy)
        dup = ops.gelu_backward(up, back.products(DOWN, [dy], lambda: ops.gelu(up)))
        dh.add_(back.products(UP, [dup], lambda: ops.added_norm_again(s, first, stats)))
        dy, dr = ops.added_norm_backward(s, first, stats, dh)
        da = back.products(OUT, [dy], lambda: back["a"])
        if self.read is not None:
            tokens = len(back["q"])
            da, dr = (each.new_zeros(tokens, each.shape[1]).index_add_(0, self.read, each) for each in (da, dr))
        dx = back.products(QKV, [each.reshape(len(each), -1) for each in back.attend(da)], x, wanted)
        return dr.add_(dx) if wanted else None


class PreNorm(NamedTuple):
    """norms: before attention, and before the MLP. dim: of a head. head_norms: of queries and of keys."""

    norms: tuple[RMSNorm, RMSNorm]
    dim: int
    head_norms: tuple[RMSNorm, RMSNorm] | None = None

    def forward(self, run: Pass, x: Tensor) -> Tensor:
        ops, (first, second) = run.ops, self.norms
        n, r = ops.rms_norm(x, first)
        q, k, v = (each.view(len(x), -1, self.dim) for each in run.products(QKV, n))
        if self.head_norms is not None:
            run.keep(q_before=q, k_before=k)
            (q, q_r), (k, k_r) = ops.rms_norm(q, self.head_norms[0]), ops.rms_norm(k, self.head_norms[1])
            run.keep(q_r=q_r, k_r=k_r)
        a = run.attend(q, k, v).reshape(len(x), -1)
        (h,) = run.products(OUT, a, x)
        m, second_r = ops.rms_norm(h, second)
        gate, up = run.products(UP, m)
        (y,) = run.products(DOWN, ops.swiglu(gate, up), h)
        run.keep(r=r, a=a, h=h, second_r=second_r, gate=gate, up=up)
        return y

    def backward(self, back: Backward, x: Callable[[], Tensor], dy: Tensor, wanted: bool) -> Tensor | None:
        ops, (first, second), h = back.ops, self.norms, back["h"]
        n = functools.cache(lambda: ops.rms_norm(x(), first)[0])
        m = functools.cache(lambda: ops.rms_norm(h, second)[0])
        gate, up = (back["gate"], back["up"]) if back["gate"] is not None else back.products_again(UP, m())
        dproduct = back.products(DOWN, [dy], lambda: ops.swiglu(gate, up))
        dm = back.products(UP, ops.swiglu_backward(gate, up, dproduct), m)
        dh = ops.rms_norm_backward(h, second, back["second_r"], dm, dy)
        dq, dk, dv = back.attend(back.products(OUT, [dh], lambda: back["a"]))
        if self.head_norms is not None:
            dq = ops.rms_norm_backward(back["q_before"], self.head_norms[0], back["q_r"], dq)
            dk = ops.rms_norm_backward(back["k_before"], self.head_norms[1], back["k_r"], dk)
        dn = back.products(QKV, [each.reshape(len(each), -1) for each in (dq, dk, dv)], n, wanted)
        return ops.rms_norm_backward(x(), first, back["r"], dn, dh) if wanted else None


Block = PostNorm | PreNorm


# --- training ---------------------------------------------------------------------------------------------------------


class Training:
    """A pass in which one adapter trains on unpadded rows.

    Args:
        ops: of the device.
        groups: the matrices, each with the LoRA that the adapter adds.
        rows: the place of each row.
        of_row: the number of each row's prefix, or None.
        dropped: dropout of attention's probabilities.
        cos_sin: (N, D) each, if the layer rotates queries and keys.
    """

    def __init__(
        self,
        ops: Ops,
        groups: Sequence[Group],
        rows: AttentionRows,
        of_row: Sequence[int | None],
        dropped: DropoutArguments,
        cos_sin: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.ops, self.groups, self.rows, self.of_row = ops, groups, rows, tuple(of_row)
        self.dropped, self.cos_sin = dropped, cos_sin
        self.prefixes: Sequence[Tensor] = ()  # during the forward pass
        self.kept: dict[str, Tensor | None] = {}  # likewise
        self.inner: dict[int, list[Tensor]] = {}  # likewise
        self.normed: Normed | None = None  # the output, for the next layer

    def products(self, group: int, x: Tensor, plus: Tensor | None = None) -> list[Tensor]:
        y, self.inner[group] = lora.forward(self.ops, self.groups[group], x, plus)
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cos_sin is not None:
            q, k = self.ops.rotate(q, k, *self.cos_sin, 1.0)
        pairs = pairs_of(self.prefixes, self.of_row)
        y, log_sum = self.ops.attention(self.rows, q, k, v, pairs, self.dropped)
        self.keep(q=q, k=k, v=v, log_sum=log_sum)
        return y

    def keep(self, **tensors: Tensor | None) -> None:
        self.kept |= tensors

    def adapts(self, group: int) -> bool:
        """Whether a matrix of the group has a LoRA."""
        return any(each.lora is not None for each in self.groups[group])

    def take_saved(self) -> list[Tensor | None]:
        """What the backward pass reads, taken out of this object, which the graph keeps alive."""
        if not self.adapts(OUT) and not self.ops.output_read:
            self.kept["a"] = None
        mlp = [each for group in (UP, DOWN) for each in self.groups[group]]
        plain = not any(each.lora is not None or each.bias is not None for each in mlp)
        if "gate" in self.kept and plain and self.ops.tiled:
            self.kept["gate"] = self.kept["up"] = None  # a sixth more products for half the memory
        self._names, self._counts = list(self.kept), [len(self.inner[group]) for group in GROUPS]
        taken = [*self.kept.values(), *(each for group in GROUPS for each in self.inner[group])]
        self.kept, self.inner, self.prefixes = {}, {}, ()
        return taken

    def back(self, taken: Sequence[Tensor]) -> Backward:
        """The backward pass, from what was taken and then the prefixes."""
        kept = dict(zip(self._names, taken, strict=False))
        rest, inner = list(taken[len(self._names) :]), []
        for count in self._counts:
            inner.append(rest[:count])
            rest = rest[count:]
        return Backward(self, kept, inner, rest)


class Backward:
    """The backward pass of a layer: what the forward pass kept, by name, and the gradients so far."""

    def __init__(
        self, run: Training, kept: dict[str, Tensor], inner: Sequence[Sequence[Tensor]], prefixes: Sequence[Tensor]
    ) -> None:
        self.ops, self._run, self._kept, self._inner, self._prefixes = run.ops, run, kept, inner, prefixes
        self._of_factors: dict[int, list[Tensor | None]] = {}
        self._of_prefixes: list[Tensor] = []

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def products(self, group: int, dy: Sequence[Tensor], x: Callable[[], Tensor], wanted: bool = True) -> Tensor:
        """dx of a group's products. dy: (N, D_out) of each matrix. x: gives their input. wanted: whether dx is."""
        groups, inner = self._run.groups, self._inner[group]
        dx, self._of_factors[group] = lora.backward(self.ops, groups[group], x, inner, dy, wanted)
        return dy[0] if dx is None else dx

    def products_again(self, group: int, x: Tensor) -> list[Tensor]:
        """The products of a group without LoRA."""
        return [each.base.forward(x, each.weight, each.bias) for each in self._run.groups[group]]

    def attend(self, dy: Tensor) -> list[Tensor]:
        """dq, dk, dv, before the rotation. dy: (N, H D)."""
        run, q = self._run, self["q"]
        pairs = pairs_of(self._prefixes, run.of_row)
        y = self["a"].view(q.shape) if self.ops.output_read else None
        dq, dk, dv, self._of_prefixes = self.ops.attention_backward(
            run.rows, q, self["k"], self["v"], pairs, run.dropped, y, self["log_sum"], dy.view(q.shape)
        )
        if run.cos_sin is not None:
            dq, dk = self.ops.rotate(dq, dk, *run.cos_sin, -1.0)
        return [dq, dk, dv]

    @property
    def gradients(self) -> Gradients:
        """Of every factor and every prefix."""
        return *(each for group in GROUPS for each in self._of_factors.get(group, ())), *self._of_prefixes


class _Layer(torch.autograd.Function):
    """x: (1, N, D) -> (1, N, D). tensors: A and B of every LoRA, then key and value (H, P, D) of every prefix."""

    @staticmethod
    def forward(
        ctx: FunctionContext,
        block: Block,
        run: Training,
        normed: Normed | None,
        count: int,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        run.prefixes = prefixes = tensors[count:]
        y = block.forward(run, x[0])
        ctx.block, ctx.run, ctx.norm = block, run, None
        sources: tuple[Tensor | None, Tensor | None] = (x[0], None)
        if isinstance(block, PostNorm):  # its norms read their own inputs, so only the LoRA of QKV reads x
            t, stats = run.kept["t"], run.kept["last_stats"]
            assert t is not None
            assert stats is not None
            run.normed = Normed(t, stats, block.norms[1])
            if not run.adapts(QKV):
                sources = None, None
            elif normed is not None:
                sources, ctx.norm = normed[:2], normed.norm
        ctx.save_for_backward(*sources, *run.take_saved(), *prefixes)
        return y[None]

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        source, stats, *taken = ctx.saved_tensors
        back, norm = ctx.run.back(taken), ctx.norm
        x = functools.cache(lambda: source if norm is None else back.ops.added_norm_again(source, norm, stats))
        dx = ctx.block.backward(back, x, gradients[0].contiguous()[0], ctx.needs_input_grad[4])
        return None, None, None, None, None if dx is None else dx[None], *back.gradients


def train_block(
    block: Block, run: Training, x: Tensor, prefixes: Sequence[Tensor], normed: Normed | None = None
) -> tuple[Tensor, Normed | None]:
    """A layer as one operation of autograd.

    Args:
        block: the layer's norms and sizes.
        run: the rest of it, and the batch.
        x: (1, N, D), contiguous.
        prefixes: key and value (H_kv, P, D) of each.
        normed: x as the layer before made it, if a norm did.

    Returns:
        y (1, N, D), and the same for the next layer.
    """
    factors = lora.lora_factors(run.groups)
    y = apply_function(_Layer, block, run, normed, len(factors), x, *factors, *prefixes)
    normed, run.normed = run.normed, None  # the graph keeps `run`
    return y, normed


# --- norms ------------------------------------------------------------------------------------------------------------
#     y = w n,    n = x r,    r = 1 / sqrt(mean(x^2) + eps),    over the last dimension, in float32
#
# The weights are frozen. The input is saved for the backward pass, and no float32 copy of it. Source: Zhang & Sennrich
# 2019, "Root Mean Square Layer Normalization".


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The formula in torch's own operations, in the order of transformers: the reference of the fast path.

    dtype: of n; T5 takes its weight's where that is narrower than x's, the others x's.
    """
    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * n.to(dtype)


class _RMSNorm(torch.autograd.Function):
    """dx = r (g - n mean(g n)),  g = w dy."""

    @staticmethod
    def forward(ctx: FunctionContext, x: Tensor, weight: Tensor, eps: float, ops: Ops) -> Tensor:
        y, r = ops.rms_norm(x, RMSNorm(weight, eps))
        ctx.save_for_backward(x, r, weight)
        ctx.ops, ctx.eps = ops, eps
        return y

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        x, r, weight = ctx.saved_tensors
        norm, dy = RMSNorm(weight, ctx.eps), gradients[0].contiguous()
        return ctx.ops.rms_norm_backward(x, norm, r, dy), None, None, None


def frozen_rms_norm(x: Tensor, weight: Tensor, eps: float, *, serves: bool, narrows: bool) -> Tensor:
    """An RMS norm of the base. Without gradients, outside an engine, its output equals the base's bit for bit.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean of the squares.
        serves: whether an engine computes: then kernels do what they can.
        narrows: if the weight is 16 bits wide, the output has its dtype, whatever the dtype of x (T5).
    """
    trains = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
    if trains and weight.dtype == x.dtype and is_enabled("rms_norm"):
        return apply_function(_RMSNorm, x.contiguous(), weight, eps, ops_for(x, weight))
    ops = ops_for(x, weight)
    faster = ops.kernels and (serves or not x.is_cpu) and not weight.requires_grad and x.numel() > 0
    if faster and not torch.is_grad_enabled():
        return ops.rms_norm(x.contiguous(), RMSNorm(weight, eps))[0]
    narrow = narrows and weight.dtype in (torch.float16, torch.bfloat16)
    return rms_norm(x, weight, eps, weight.dtype if narrow else x.dtype)
