"""A whole layer in one call, where an engine's pass has few tokens: a short text, or the next token of some rows.

    BERT, RoBERTa:         h = norm(W_o attention(W_q x, W_k x, W_v x) + x),    y = norm(W_down gelu(W_up h) + h)
    Llama, Mistral, Qwen:  h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
                           y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)

For so few tokens the dozen modules of a layer take longer than its arithmetic. The one call does what theirs do, in
their order and with their roundings, so it gives the same numbers; whatever it does not know, the modules compute.
Knows modules by the names of their parts; refuses to know what an adapter is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.activations import FrozenGated, FrozenGELU
from turret.adapters.attention import rows_and_prefixes, window_of
from turret.adapters.frozen import plain
from turret.adapters.lora import RoutedLinear
from turret.adapters.norms import FrozenNorm
from turret.adapters.residual import FrozenOutput
from turret.adapters.route import Bank, Route
from turret.adapters.trained_decoder import TrainedDecoder
from turret.adapters.trained_encoder import TrainedEncoder
from turret.kernels import DecoderLayer, EncoderLayer, LayerNorm, Library, Matrix, usable


class OneCall(ABC):
    """What one layer computes in one call, or None where its modules shall."""

    def __init__(self, module: Any, route: Route) -> None:
        self._module, self._route, self._theirs = module, route, module.forward
        self._known: tuple[Bank, Any] | None = None  # the layer's weights, where they are what the kernel computes with

    def __call__(self, x: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D). settings: what else the layer is called with."""
        bank = self._route.bank
        library = None if bank is None else bank.library
        if bank is None or library is None or torch.is_grad_enabled() or self._module.training:
            return None
        if usable(x) is None or not 0 < x.shape[1] <= library.few(x.dtype):
            return None
        if self._known is None or self._known[0] is not bank:
            self._known = bank, self._layer(bank)
        layer = self._known[1]
        if layer is None or layer.dtype != x.dtype:
            return None
        return self._computed(library, layer, bank, x.contiguous(), settings)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the module's own; bound, so that a copy of the model computes with the copy's weights."""
        y = self(hidden_states, kwargs)
        return self._theirs(hidden_states, *args, **kwargs) if y is None else y

    @abstractmethod
    def _layer(self, bank: Bank) -> Any:
        """The layer's weights, or None where it is made of anything else than the kernel computes."""

    @abstractmethod
    def _computed(self, library: Library, layer: Any, bank: Bank, x: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """The layer on x, where this pass is one for it."""


class Encoder(OneCall):
    """Every token of the pass; and while an adapter trains, one operation."""

    def __init__(self, module: Any, route: Route) -> None:
        super().__init__(module, route)
        self._trained = TrainedEncoder(module, route)

    def __call__(self, x: Tensor, settings: dict[str, Any]) -> Tensor | None:
        return self._trained(x) if torch.is_grad_enabled() else super().__call__(x, settings)

    def _computed(
        self, library: Library, layer: EncoderLayer, bank: Bank, x: Tensor, settings: dict[str, Any]
    ) -> Tensor | None:
        if self._route.lengths is None or self._route.read is not None:
            return None
        attention = self._module.attention.self
        told = rows_and_prefixes(attention.turret_hook, attention.scaling, None, x.dtype)
        return library.encoder_layer(layer, x, bank.spans("encoder"), *told)

    def _layer(self, bank: Bank) -> EncoderLayer | None:
        module, attention = self._module, self._module.attention.self
        behind, last = module.attention.output, module.output
        active = isinstance(module.intermediate.intermediate_act_fn, FrozenGELU)
        if not active or module.is_decoder or not all(isinstance(each, FrozenOutput) for each in (behind, last)):
            return None
        linears = [attention.query, attention.key, attention.value, behind.dense, module.intermediate.dense, last.dense]
        matrices, norms = _matrices(bank, linears), [each.LayerNorm for each in (behind, last)]
        if matrices is None or not all(_is_affine(each) for each in norms):
            return None
        if not _alike(matrices, [own for norm in norms for own in norm.parameters()]):
            return None
        one, other = (LayerNorm(each.weight, each.bias, each.eps) for each in norms)
        return EncoderLayer(matrices, (one, other), attention.attention_head_size)


class Decoder(OneCall):
    """The next token of every row, where no row begins; and while an adapter trains, one operation."""

    def __init__(self, module: Any, route: Route) -> None:
        super().__init__(module, route)
        self._trained = TrainedDecoder(module, route)

    def __call__(self, x: Tensor, settings: dict[str, Any]) -> Tensor | None:
        if torch.is_grad_enabled():
            return self._trained(x, settings.get("position_embeddings"))
        return super().__call__(x, settings)

    def _computed(
        self, library: Library, layer: DecoderLayer, bank: Bank, x: Tensor, settings: dict[str, Any]
    ) -> Tensor | None:
        cache, turn = self._route.cache, settings.get("position_embeddings")
        if cache is None or turn is None or cache.fresh("decoder"):
            return None
        cos, sin = (each.contiguous() for each in turn)
        if any(each.shape != (1, x.shape[1], layer.dim) for each in (cos, sin)) or usable(x, cos, sin) is None:
            return None
        parts = []
        for held in cache.step("decoder", self._module.self_attn.turret_hook.site.layer, None, None):
            if held.kept is None:
                return None
            parts.append((held.kept, held.keys, held.values))
        return library.decoder_layer(layer, x, cos, sin, bank.spans("decoder"), parts)

    def _layer(self, bank: Bank) -> DecoderLayer | None:
        module, attention, mlp = self._module, self._module.self_attn, self._module.mlp
        before, behind = module.input_layernorm, module.post_attention_layernorm
        heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        norms = [each for each in (before, *heads, behind) if each is not None]
        known = isinstance(mlp, FrozenGated) and all(isinstance(each, FrozenNorm) for each in norms)
        if not known or len({each.variance_epsilon for each in norms[:-1]}) > 1:
            return None
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        matrices = _matrices(bank, [*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        if matrices is None or not _alike(matrices, [each.weight for each in norms]):
            return None
        return DecoderLayer(
            matrices,
            (before.weight, *(None if each is None else each.weight for each in heads), behind.weight),
            (before.variance_epsilon, behind.variance_epsilon),
            dim=attention.head_dim,
            scaling=attention.scaling,
            window=window_of(attention) or 0,
        )


LAYERS: dict[str, type[OneCall]] = {
    **dict.fromkeys(("BertLayer", "RobertaLayer"), Encoder),
    **dict.fromkeys(("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"), Decoder),
}


def _matrices(bank: Bank, linears: Sequence[Any]) -> list[Matrix] | None:
    """Routed linear layers, or None where one is more than a product."""
    if not all(isinstance(each, RoutedLinear) and plain(each.base_layer) for each in linears):
        return None
    return [Matrix(bank.number(each), each.weight, each.bias) for each in linears]


def _is_affine(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def _alike(matrices: Sequence[Matrix], others: Sequence[Tensor]) -> bool:
    """Whether all numbers of a layer, biases among them, are of one dtype and lie as they are read."""
    own = [each for matrix in matrices for each in (matrix.weight, matrix.bias) if each is not None]
    return all(each.dtype == own[0].dtype and each.is_contiguous() for each in (*own, *others))


def hook(module: nn.Module, route: Route) -> Callable[[], object]:
    """Let one layer compute in one call where it can, if it is one of those; returns what undoes it."""
    kind = LAYERS.get(type(module).__name__)
    if kind is None or "forward" in vars(module):
        return lambda: None
    module.forward = kind(module, route).forward
    return lambda: vars(module).__delitem__("forward")
