"""The end of each half of an encoder layer as one operation: dropout, residual sum and LayerNorm.

    s = dropout(W h + bias) + x,    y = w (s - mean(s)) / sqrt(var(s) + eps) + b        (Ba et al. 2016)

In separate modules these are three passes over memory and three more backward; here one and one. Only s is saved, which
LayerNorm saves anyway. If a classifier reads one token of each row (`BatchContext.read`), the last layer computes only
these tokens after its attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.adapters.autograd import FunctionContext, Gradients, KernelContext, apply
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.dropout import Masks
from turret.adapters.modules_to_save import current
from turret.ops import gpu as gpu_kernels
from turret.ops.cpu import LARGEST, DropoutArguments, Library, usable
from turret.transformer import ModelConfig, Submodule

if TYPE_CHECKING:
    from turret.adapters.attention import Hooked


# --- layer types ------------------------------------------------------------------------------------------------------
# The parts of transformers' layers by their names, for the type checker. No object is of these classes.


class PostNormSelf(nn.Module):
    """`BertSelfAttention` and its like."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    attention_head_size: int
    scaling: float
    config: ModelConfig
    turret_hook: Hooked


class PostNormAttention(nn.Module):
    """`BertAttention`."""

    self: PostNormSelf
    output: nn.Module


class PostNormIntermediate(nn.Module):
    """`BertIntermediate`."""

    dense: nn.Module
    intermediate_act_fn: nn.Module


class PostNormLayer(nn.Module):
    """A layer of BERT or RoBERTa."""

    attention: PostNormAttention
    intermediate: PostNormIntermediate
    output: nn.Module
    is_decoder: bool


class PreNormAttention(Submodule):
    """`LlamaAttention`. Qwen 3 adds `q_norm` and `k_norm`."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    attention_dropout: float
    config: ModelConfig
    turret_hook: Hooked


class PreNormLayer(nn.Module):
    """A layer of Llama, Mistral or Qwen."""

    self_attn: PreNormAttention
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module


# --- norms ------------------------------------------------------------------------------------------------------------
# RMS norms of the base, with less saved for the backward pass.
#
#     y = w n,    n = x r,    r = 1 / sqrt(mean(x^2) + eps),    over the last dimension, in float32
#
# (Zhang & Sennrich 2019.) Autograd saves several float32 copies of x. Here x itself and r are saved, and n is computed
# again. An operation that reads y need not save it either: `to_save` gives it x and the norm, and `restored` computes y
# again. Without gradients the outputs equal the base's bit for bit; with gradients, and in an engine, they are close.


COMPUTED_FROM = "turret_computed_from"  # an attribute of a norm's output


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The formula in torch's own operations, in the order of transformers: the reference of the fast path.

    dtype: of n; T5 takes its weight's where that is narrower than x's, the others x's.
    """
    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * n.to(dtype)


class RecomputedNorm(Protocol):
    """A norm with frozen weights that computes its output again, bit for bit."""

    def of(self, x: Tensor) -> Tensor:
        """The norm's output, from the input that the norm saves anyway."""


class RecomputedRMSNorm(NamedTuple):
    weight: Tensor
    eps: float
    library: Library

    def of(self, x: Tensor) -> Tensor:
        return self.library.rms_norm(x, self.weight, self.eps)[0]


def with_input(y: Tensor, x: Tensor, norm: RecomputedNorm) -> Tensor:
    """y, a norm's output, with the norm and its input attached for `to_save`."""
    setattr(y, COMPUTED_FROM, (y._version, x.detach(), norm))
    return y


def to_save(y: Tensor) -> tuple[Tensor, RecomputedNorm | None]:
    """The tensor to save for a backward pass that needs y: y itself, or the input of the norm that computed y."""
    version, x, norm = getattr(y, COMPUTED_FROM, (None, y, None))
    return (x, norm) if version == y._version and enabled("norm_inputs") else (y, None)  # y may have been changed


def restored(saved: Tensor, norm: RecomputedNorm | None) -> Tensor:
    """y, from the result of `to_save`."""
    return saved if norm is None else norm.of(saved)


class _RMSNormContext(FunctionContext, Protocol):
    library: Library | None


class _RMSNorm(torch.autograd.Function):
    """dx = r (g - n mean(g n)),  g = w dy."""

    @staticmethod
    def forward(ctx: _RMSNormContext, x: Tensor, weight: Tensor, eps: float, library: Library | None) -> Tensor:
        ctx.library = library
        if library is not None:
            y, r = library.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, r, weight)
            return y
        wide = x.float()
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, r, weight)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    def backward(ctx: _RMSNormContext, *gradients: Tensor) -> Gradients:
        x, r, weight = ctx.saved_tensors
        if ctx.library is not None:
            return ctx.library.rms_norm_backward(x, weight, r, gradients[0].contiguous()), None, None, None
        g = (gradients[0] * weight).float()
        n = x.float() * r
        g.sub_(n.mul_((g * n).mean(-1, keepdim=True))).mul_(r)
        return g.to(x.dtype), None, None, None


class _CardNorm(torch.autograd.Function):
    """The same on a GPU, in one launch each way; r is computed again."""

    @staticmethod
    def forward(ctx: _CardNormContext, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (N, D)."""
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.turret.rms_norm(x, weight, eps)
        return y

    @staticmethod
    def backward(ctx: _CardNormContext, *gradients: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        return torch.ops.turret.rms_norm_backward(x, weight, ctx.eps, gradients[0].contiguous(), None), None, None


class _CardNormContext(FunctionContext, Protocol):
    eps: float


class FrozenNorm(nn.Module):
    """Replaces an RMS norm of the base, with the same weight.

    narrows: if its weight is 16 bits wide, it gives that dtype whatever the dtype of its input (T5).
    """

    def __init__(self, replaced: nn.Module, context: BatchContext, narrows: bool = False) -> None:
        super().__init__()
        self.context = context
        self.weight = replaced.get_parameter("weight")
        self.variance_epsilon: float = vars(replaced)["variance_epsilon"]
        self.narrows = narrows

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        if not x.is_cpu and not weight.requires_grad and x.numel() > 0 and gpu_kernels.usable(x, weight):
            rows = x.reshape(-1, x.shape[-1])
            return apply(_CardNorm, rows, weight, self.variance_epsilon).view(x.shape)
        trains = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
        if trains and weight.dtype == x.dtype and enabled("rms_norm"):
            library = usable(x, weight)
            x = x if library is None else x.contiguous()
            y = apply(_RMSNorm, x, weight, self.variance_epsilon, library)
            if library is None:
                return y
            return with_input(y, x, RecomputedRMSNorm(weight, self.variance_epsilon, library))
        if self.context.serves and (library := usable(x, weight)) is not None and x.numel() > 0:
            return library.rms_norm(x.contiguous(), weight, self.variance_epsilon)[0]
        narrows = self.narrows and weight.dtype in (torch.float16, torch.bfloat16)
        return rms_norm(x, weight, self.variance_epsilon, weight.dtype if narrows else x.dtype)


# --- residual ---------------------------------------------------------------------------------------------------------


class _AddedNormContext(KernelContext, Protocol):
    dropped: DropoutArguments


class _AddedNorm(torch.autograd.Function):
    """y = LayerNorm(s), s = dropout(a) + x, with frozen weights: (y, s, stats of s). a, x: (..., D)."""

    @staticmethod
    def forward(
        ctx: _AddedNormContext,
        a: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropped: DropoutArguments,
        library: Library,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, s, stats = library.added_norm(a, x, weight, bias, eps, dropped)
        ctx.save_for_backward(s, weight, stats)
        ctx.mark_non_differentiable(s, stats)
        ctx.set_materialize_grads(False)
        ctx.dropped, ctx.library = dropped, library
        return y, s, stats

    @staticmethod
    def backward(ctx: _AddedNormContext, *gradients: Tensor) -> Gradients:
        s, weight, stats = ctx.saved_tensors
        da, dx = ctx.library.added_norm_backward(s, weight, stats, ctx.dropped, gradients[0].contiguous())
        return da, dx, None, None, None, None, None


class RecomputedLayerNorm(NamedTuple):
    weight: Tensor
    bias: Tensor
    stats: Tensor
    library: Library

    def of(self, s: Tensor) -> Tensor:
        return self.library.added_norm_again(s, self.weight, self.bias, self.stats)


class FrozenOutput(nn.Module):
    """Replaces the module of dense, dropout and LayerNorm; the base's own layers stay inside under the same names.

    narrows: it ends the attention of the last layer, so that only the tokens of `BatchContext.read` need to go on.
    """

    def __init__(self, replaced: nn.Module, context: BatchContext, narrows: bool) -> None:
        super().__init__()
        norm, dropout = replaced.get_submodule("LayerNorm"), replaced.get_submodule("dropout")
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(dropout, nn.Dropout)
        self.dense, self.LayerNorm, self.dropout = replaced.get_submodule("dense"), norm, dropout
        self.context, self.narrows = context, narrows

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if self.narrows and self.context.read is not None:  # (1, N, D) -> (1, B, D)
            hidden_states, input_tensor = (x.index_select(1, self.context.read) for x in (hidden_states, input_tensor))
        a, x, norm = self.dense(hidden_states), input_tensor, current(self.LayerNorm)
        library = self._kernels(a, x, norm) if isinstance(norm, nn.LayerNorm) else None
        if library is None or not isinstance(norm, nn.LayerNorm):
            y: Tensor = norm(self.dropout(a) + x)
            return y
        a, x = a.contiguous(), x.contiguous()
        p = self.dropout.p if self.dropout.training else 0.0
        dropped = (self.context.masks or Masks()).arguments(p)
        if not torch.is_grad_enabled():
            return library.added_norm(a, x, norm.weight, norm.bias, norm.eps, dropped)[0]
        y, s, stats = apply(_AddedNorm, a, x, norm.weight, norm.bias, norm.eps, dropped, library)
        return with_input(y, s, RecomputedLayerNorm(norm.weight, norm.bias, stats, library))

    def _kernels(self, a: Tensor, x: Tensor, norm: nn.LayerNorm) -> Library | None:
        """The kernels, in an engine and where a gradient passes through frozen weights."""
        trains = torch.is_grad_enabled() and (a.requires_grad or x.requires_grad) and not norm.weight.requires_grad
        wanted = trains or (self.context.serves and not torch.is_grad_enabled())
        if not wanted or a.numel() >= LARGEST or not enabled("added_norm"):
            return None
        return usable(a, x, norm.weight, norm.bias)


def narrowing(last_attention: str) -> str:
    """The path of the module that ends the attention at this path."""
    return f"{last_attention.rpartition('.')[0]}.output"
