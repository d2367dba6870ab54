"""A whole layer of a gated decoder in one call, where every token of a pass is the next one of some row.

    h = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n),    n = rms_norm(x)
    y = h + W_down (silu(W_gate m) * W_up m),                      m = rms_norm(h)        (Llama, Mistral, Qwen)

For so few tokens the dozen modules of a layer take longer than its arithmetic. The one call does what theirs do, in
their order and with their roundings, so it gives the same numbers; whatever it does not know, the modules compute. An
engine's passes only. Knows modules by the names of their parts; refuses to know what an adapter is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.activations import FrozenGated
from turret.adapters.frozen import plain
from turret.adapters.lora import RoutedLinear
from turret.adapters.norms import FrozenNorm
from turret.adapters.route import Bank, Route
from turret.kernels import DecoderLayer, Matrix, usable

CLASSES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


class Step:
    """What one layer computes for the next token of every row, or None where its modules shall."""

    def __init__(self, module: Any, route: Route) -> None:
        self._module, self._route = module, route
        self._known: tuple[Bank, DecoderLayer | None] | None = None

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """x: (1, N, D), turn: cos and sin, each (1, N, head size) -> (1, N, D)."""
        cache, bank = self._route.cache, self._route.bank
        library = None if bank is None else bank.library
        if bank is None or cache is None or library is None or turn is None or cache.fresh("decoder"):
            return None
        cos, sin = (each.contiguous() for each in turn)
        few = 0 < x.shape[1] <= library.few(x.dtype) and cos.shape[:2] == x.shape[:2] and usable(x, cos, sin)
        if not few or torch.is_grad_enabled():
            return None
        if self._known is None or self._known[0] is not bank:
            self._known = bank, self._layer(bank)
        layer = self._known[1]
        if layer is None or layer.dtype != x.dtype:
            return None
        parts = []
        for held in cache.step("decoder", self._module.self_attn.turret_hook.site.layer, None, None):
            if held.kept is None:
                return None
            parts.append((held.kept, held.keys, held.values))
        return library.decoder_layer(layer, x.contiguous(), cos, sin, bank.spans("decoder"), parts)

    def _layer(self, bank: Bank) -> DecoderLayer | None:
        """The layer's weights, if it is made of what the kernel computes and of nothing else."""
        module, attention = self._module, self._module.self_attn
        before, behind = module.input_layernorm, module.post_attention_layernorm
        heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        norms = [each for each in (before, *heads, behind) if each is not None]
        known = isinstance(module.mlp, FrozenGated) and all(isinstance(each, FrozenNorm) for each in norms)
        if not known or len({each.variance_epsilon for each in norms[:-1]}) > 1:
            return None
        linears = [module.get_submodule(path) for path in MATRICES]
        if not all(isinstance(each, RoutedLinear) and plain(each.base_layer) for each in linears):
            return None
        matrices = [Matrix(bank.number(each), each.weight, each.bias) for each in linears]
        weights = [*(each.weight for each in norms), *(each.weight for each in matrices)]
        if any(each.dtype != weights[0].dtype or not each.is_contiguous() for each in weights):
            return None
        return DecoderLayer(
            matrices,
            (before.weight, *(None if each is None else each.weight for each in heads), behind.weight),
            (before.variance_epsilon, behind.variance_epsilon),
            dim=attention.head_dim,
            scaling=attention.scaling,
            window=_window(attention) or 0,
        )


def _window(attention: Any) -> int | None:
    """What the module hands its attention function as `sliding_window`."""
    name = type(attention).__name__
    return getattr(attention.config if name == "MistralAttention" else attention, "sliding_window", None)


def hook(module: nn.Module, route: Route) -> Callable[[], object]:
    """Let one layer compute a step in one call, if it is one of those; returns what undoes it."""
    if type(module).__name__ not in CLASSES or "forward" in vars(module):
        return lambda: None
    theirs, step = module.forward, Step(module, route)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = step(hidden_states, kwargs.get("position_embeddings"))
        return theirs(hidden_states, *args, **kwargs) if y is None else y

    module.forward = forward
    return lambda: vars(module).__delitem__("forward")
