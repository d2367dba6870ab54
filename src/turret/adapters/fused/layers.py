"""Whole layers in one call, where an engine's pass has few tokens: a short text, or the next token of some rows.

    BERT, RoBERTa:         h = norm(W_o attention(W_q x, W_k x, W_v x) + x),    y = norm(W_down gelu(W_up h) + h)
    Llama, Mistral, Qwen:  h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
                           y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)

For so few tokens the dozen modules of a layer take longer than its arithmetic. The one call does what theirs do, in
their order and with their roundings, so it gives the same numbers; whatever it does not know, the modules compute. A
layer takes those behind it along, as far as nobody looks in between; they pass on what they are given.
Knows modules by the names of their parts; refuses to know what an adapter is.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.attention import rows_and_prefixes
from turret.adapters.batch_context import AdapterPoolProtocol, BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.activations import FrozenGated, FrozenGELU
from turret.adapters.fused.frozen import plain
from turret.adapters.fused.norms import FrozenNorm
from turret.adapters.fused.residual import FrozenOutput
from turret.adapters.fused.trained_decoder import TrainedDecoder
from turret.adapters.fused.trained_encoder import TrainedEncoder
from turret.adapters.lora import RoutedLinear
from turret.families import FastPaths, Layout
from turret.kernels import DecoderLayer, EncoderLayer, LayerMatrix, LayerNorm, Layers, Library, usable

THROUGH = ("through",)  # in a route's memo: what a call gave, and the place of the first layer behind it


class OneCall(ABC):
    """A layer, and those behind it, in one call; None where its modules shall compute. order: of all of a model."""

    def __init__(self, module: Any, context: BatchContext, order: list[OneCall]) -> None:
        self._module, self._route, self._theirs = module, context, module.forward
        self._order, self._place = order, len(order)
        self._known: tuple[AdapterPoolProtocol, Any] | None = (
            None  # the layer's weights, where they are what the kernel computes with
        )
        self._runs: dict[int, Layers] = {}  # by how many layers
        order.append(self)

    def __call__(self, x: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D). settings: what else the layer is called with."""
        through: tuple[Tensor, int] | None = self._route.memo.get(THROUGH)
        if through is not None and through[0] is x and self._place < through[1]:
            return x
        adapter_pool = self._route.adapter_pool
        library = None if adapter_pool is None else adapter_pool.library
        if adapter_pool is None or library is None or torch.is_grad_enabled() or self._module.training:
            return None
        if not enabled("layer_calls"):
            return None
        if usable(x) is None or not 0 < x.shape[1] <= library.few(x.dtype):
            return None
        along = self._along(adapter_pool, x.dtype)
        if not along:
            return None
        if len(along) not in self._runs:
            self._runs[len(along)] = Layers([each.weights(adapter_pool) for each in along])
        y = self._computed(library, self._runs[len(along)], along, adapter_pool, x.contiguous(), settings)
        if y is not None:
            self._route.memo[THROUGH] = y, self._place + len(along)
        return y

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the module's own; bound, so that a copy of the model computes with the copy's weights."""
        y = self(hidden_states, kwargs)
        return self._theirs(hidden_states, *args, **kwargs) if y is None else y

    def weights(self, adapter_pool: AdapterPoolProtocol) -> Any:
        """The layer's, or None where it is made of anything else than the kernel computes."""
        if self._known is None or self._known[0] is not adapter_pool:
            self._known, self._runs = (adapter_pool, self._layer(adapter_pool)), {}
        return self._known[1]

    def _along(self, adapter_pool: AdapterPoolProtocol, dtype: torch.dtype) -> list[Any]:
        """This layer and those behind it that its call computes; none where its modules shall."""
        along: list[OneCall] = []
        first = self.weights(adapter_pool)
        for each in self._order[self._place : self._layers]:
            own = each.weights(adapter_pool)
            if own is None or own.alike != first.alike or own.dtype != dtype:
                break
            if along and each._module._forward_pre_hooks:
                break
            along.append(each)
            if each._module._forward_hooks:
                break
        return along

    @property
    @abstractmethod
    def _layers(self) -> int:
        """How many the model computes."""

    @abstractmethod
    def _layer(self, adapter_pool: AdapterPoolProtocol) -> Any:
        """The layer's weights, or None where it is made of anything else than the kernel computes."""

    @abstractmethod
    def _computed(
        self,
        library: Library,
        layers: Layers,
        along: Sequence[Any],
        adapter_pool: AdapterPoolProtocol,
        x: Tensor,
        settings: dict[str, Any],
    ) -> Tensor | None:
        """The layers on x, where this pass is one for them."""


class Encoder(OneCall):
    """Every token of the pass; and while an adapter trains, one operation."""

    def __init__(self, module: Any, context: BatchContext, order: list[OneCall]) -> None:
        super().__init__(module, context, order)
        self._trained = TrainedEncoder(module, context)

    def __call__(self, x: Tensor, settings: dict[str, Any]) -> Tensor | None:
        return self._trained(x) if torch.is_grad_enabled() else super().__call__(x, settings)

    @property
    def _layers(self) -> int:
        return int(self._module.attention.self.config.num_hidden_layers)

    def _computed(
        self,
        library: Library,
        layers: Layers,
        along: Sequence[Encoder],
        adapter_pool: AdapterPoolProtocol,
        x: Tensor,
        settings: dict[str, Any],
    ) -> Tensor | None:
        if self._route.lengths is None or self._route.read is not None:
            return None
        attentions = [each._module.attention.self for each in along]
        told = [rows_and_prefixes(each.turret_hook, each.scaling, None, x.dtype) for each in attentions]
        return library.encoder_layers(layers, x, adapter_pool.spans("encoder"), told)

    def _layer(self, adapter_pool: AdapterPoolProtocol) -> EncoderLayer | None:
        module, attention = self._module, self._module.attention.self
        behind, last = module.attention.output, module.output
        active = isinstance(module.intermediate.intermediate_act_fn, FrozenGELU)
        if not active or module.is_decoder or not all(isinstance(each, FrozenOutput) for each in (behind, last)):
            return None
        linears = [attention.query, attention.key, attention.value, behind.dense, module.intermediate.dense, last.dense]
        matrices, norms = _matrices(adapter_pool, linears), [each.LayerNorm for each in (behind, last)]
        if matrices is None or not all(_is_affine(each) for each in norms):
            return None
        if not _alike(matrices, [own for norm in norms for own in norm.parameters()]):
            return None
        one, other = (LayerNorm(each.weight, each.bias, each.eps) for each in norms)
        return EncoderLayer(matrices, (one, other), attention.attention_head_size)


class Decoder(OneCall):
    """The next token of every row, where no row begins; and while an adapter trains, one operation."""

    def __init__(self, module: Any, context: BatchContext, order: list[OneCall]) -> None:
        super().__init__(module, context, order)
        self._trained = TrainedDecoder(module, context)

    def __call__(self, x: Tensor, settings: dict[str, Any]) -> Tensor | None:
        if torch.is_grad_enabled():
            return self._trained(x, settings.get("position_embeddings"))
        return super().__call__(x, settings)

    @property
    def _layers(self) -> int:
        return int(self._module.self_attn.config.num_hidden_layers)

    def _computed(
        self,
        library: Library,
        layers: Layers,
        along: Sequence[Decoder],
        adapter_pool: AdapterPoolProtocol,
        x: Tensor,
        settings: dict[str, Any],
    ) -> Tensor | None:
        cache, turn = self._route.cache, settings.get("position_embeddings")
        if cache is None or turn is None or cache.fresh("decoder"):
            return None
        cos, sin = (each.contiguous() for each in turn)
        if any(each.shape != (1, x.shape[1], layers.dim) for each in (cos, sin)) or usable(x, cos, sin) is None:
            return None
        parts = []
        for each in along:
            held = cache.step("decoder", each._module.self_attn.turret_hook.site.layer, None, None)
            if any(part.kept is None for part in held):
                return None
            parts.append([(part.kept, part.keys, part.values) for part in held if part.kept is not None])
        return library.decoder_layers(layers, x, cos, sin, adapter_pool.spans("decoder"), parts)

    def _layer(self, adapter_pool: AdapterPoolProtocol) -> DecoderLayer | None:
        module, attention, mlp = self._module, self._module.self_attn, self._module.mlp
        before, behind = module.input_layernorm, module.post_attention_layernorm
        heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        norms = [each for each in (before, *heads, behind) if each is not None]
        known = isinstance(mlp, FrozenGated) and all(isinstance(each, FrozenNorm) for each in norms)
        if not known or len({each.variance_epsilon for each in norms[:-1]}) > 1:
            return None
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        matrices = _matrices(adapter_pool, [*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        if matrices is None or not _alike(matrices, [each.weight for each in norms]):
            return None
        return DecoderLayer(
            matrices,
            (before.weight, *(None if each is None else each.weight for each in heads), behind.weight),
            (before.variance_epsilon, behind.variance_epsilon),
            dim=attention.head_dim,
            scaling=attention.scaling,
            window=attention.turret_hook.family.window(attention) or 0,
        )


LAYOUTS: dict[Layout, type[OneCall]] = {"post-norm": Encoder, "pre-norm": Decoder}


def _matrices(adapter_pool: AdapterPoolProtocol, linears: Sequence[Any]) -> list[LayerMatrix] | None:
    """Routed linear layers, or None where one is more than a product."""
    if not all(isinstance(each, RoutedLinear) and plain(each.base_layer) for each in linears):
        return None
    return [LayerMatrix(adapter_pool.number(each), each.weight, each.bias) for each in linears]


def _is_affine(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def _alike(matrices: Sequence[LayerMatrix], others: Sequence[Tensor]) -> bool:
    """Whether all numbers of a layer, biases among them, are of one dtype and lie as they are read."""
    own = [each for matrix in matrices for each in (matrix.weight, matrix.bias) if each is not None]
    return all(each.dtype == own[0].dtype and each.is_contiguous() for each in (*own, *others))


def hook(model: nn.Module, fast: FastPaths, context: BatchContext) -> list[Callable[[], object]]:
    """Let the layers of a model compute in one call where they can; returns what undoes it."""
    if fast.layout is None:
        return []
    kind = LAYOUTS[fast.layout]
    order: list[OneCall] = []
    undo: list[Callable[[], object]] = []
    for module in model.modules():
        if type(module).__name__ in fast.layers and "forward" not in vars(module):
            module.forward = kind(module, context, order).forward
            undo.append(functools.partial(vars(module).__delitem__, "forward"))
    return undo
