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
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from turret.adapters.attention import rows_and_prefixes
from turret.adapters.batch_context import AdapterPoolProtocol, BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.activations import FrozenGated, FrozenGELU
from turret.adapters.fused.card_decoder import CardDecoder
from turret.adapters.fused.frozen import plain
from turret.adapters.fused.layer_types import PostNormLayer, PreNormLayer
from turret.adapters.fused.norms import FrozenNorm
from turret.adapters.fused.residual import FrozenOutput
from turret.adapters.fused.trained_decoder import TrainedDecoder
from turret.adapters.fused.trained_encoder import TrainedEncoder
from turret.adapters.lora import RoutedLinear
from turret.adapters.whole import unrouted
from turret.families import FastPaths, Layout
from turret.kernels import DecoderLayer, EncoderLayer, LayerMatrix, LayerNorm, Layers, Library, usable
from turret.kernels.layers import Layer

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
        self._trained, self._on_card = TrainedDecoder(module, context), CardDecoder(module, context)

    def __call__(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        if not x.is_cpu:
            return self._on_card(x, cos_sin)
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
