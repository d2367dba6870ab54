"""Prefix tuning: the keys and values that one adapter puts before those of every attention layer (Li & Liang 2021).

A prefix of P tokens for L layers with H key-value heads of size D is one tensor for each group of layers,
(L, 2, H, P, D): keys, then values. With reparametrisation it is, while it trains,

    KV = KV0 + MLP(E),    E: (P, embedding), MLP: embedding -> hidden -> L * 2 * H * D, last layer zero at the start

where KV0, the keys and values of real words, is fixed, so that the first step starts at the prompted model.
`folded_keys_values` gives KV; the MLP is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turret.ops.core import FunctionContext, Gradients, apply_function
from turret.ops.structs import kept_gradient

EMBEDDING_SIZE = 64  # of each virtual token inside the reparametrisation
Groups = dict[str, list[tuple[Tensor, Tensor]]]  # (key, value) of every layer, each (H, P, D), by group


class _Outer(torch.autograd.Function):
    """h W^T. If W keeps its `grad`, the gradient is added there in place: it is large, and never in memory twice.

    h: (P, hidden), W: (N, hidden) -> (P, N).
    """

    @staticmethod
    def forward(ctx: FunctionContext, h: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.parameter = weight
        return h @ weight.mT

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        (h, weight), dy = ctx.saved_tensors, gradients[0]
        if (kept := kept_gradient(ctx.parameter)) is not None:
            kept.addmm_(dy.mT, h)
            return dy @ weight, None
        return dy @ weight, dy.mT @ h


class PrefixGroup(nn.Module):
    """The prefix of one group of layers (encoder, decoder or cross-attention): KV (L, 2, H, P, D)."""

    def __init__(self, start: Tensor, hidden: int | None, generator: torch.Generator | None) -> None:
        super().__init__()
        self.hidden = hidden
        layers, _, heads, tokens, dim = start.shape
        self.shape = (layers, 2, heads, tokens, dim)
        if hidden is None:
            self.keys_values = nn.Parameter(start.float().clone())
            return
        self.register_buffer("start", start.float().clone())
        self.embedding = nn.Parameter(torch.empty(tokens, EMBEDDING_SIZE).normal_(generator=generator))
        inner = torch.empty(hidden, EMBEDDING_SIZE)
        self.inner_weight = nn.Parameter(inner.normal_(0.0, EMBEDDING_SIZE**-0.5, generator=generator))
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.outer_weight = nn.Parameter(torch.zeros(layers * 2 * heads * dim, hidden))
        self.outer_bias = nn.Parameter(torch.zeros(layers * 2 * heads * dim))

    def folded_keys_values(self) -> Tensor:
        """KV: (L, 2, H, P, D), with gradients to the trained tensors."""
        if self.hidden is None:
            return self.keys_values
        layers, two, heads, tokens, dim = self.shape
        h = torch.tanh(self.embedding @ self.inner_weight.mT + self.inner_bias)  # (P, hidden)
        change = apply_function(_Outer, h, self.outer_weight) + self.outer_bias  # (P, L * 2 * H * D)
        change = change.view(tokens, layers, two, heads, dim).permute(1, 2, 3, 0, 4)  # (L, 2, H, P, D)
        return self.get_buffer("start") + change


class PrefixSlot(nn.Module):
    """All groups of one adapter's prefix, folded once per pass and read by every layer."""

    def __init__(self, groups: dict[str, PrefixGroup]) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(groups)
        self.length = next(iter(groups.values())).shape[3]  # P
        self._current: dict[str, tuple[Tensor, ...]] = {}  # one tensor for each layer
        self._seen: dict[str, tuple[int, ...]] = {}

    def refresh(self, group: str) -> None:
        """Fold a group for the next pass; without gradients, only if a parameter has changed."""
        if group not in self.groups:
            return
        module = self.groups[group]
        assert isinstance(module, PrefixGroup)
        versions = tuple(each._version for each in module.parameters())
        if torch.is_grad_enabled() or self._seen.get(group) != versions:
            # Slices would each have a gradient as large as all.
            self._current[group] = module.folded_keys_values().unbind(0)
            # A tensor that carries a graph must not outlive its pass; an inference tensor must not enter a graph.
            plain = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            self._seen[group] = versions if plain else ()

    def keys_values(self, group: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """(key, value) of one layer, each (H, P, D), or None if this prefix has no such group."""
        if group not in self.groups:
            return None
        if group not in self._current:
            self.refresh(group)
        both = self._current[group][layer]  # (2, H, P, D)
        return both[0], both[1]


def to_peft(keys_values: Tensor) -> Tensor:
    """(L, 2, H, P, D) -> PEFT's `prompt_embeddings` (P, L * 2 * H * D)."""
    return keys_values.permute(3, 0, 1, 2, 4).reshape(keys_values.shape[3], -1).contiguous()


def from_peft(prompt_embeddings: Tensor, layers: int, heads: int, dim: int) -> Tensor:
    """PEFT's `prompt_embeddings` (P, L * 2 * H * D) -> (L, 2, H, P, D)."""
    return prompt_embeddings.view(-1, layers, 2, heads, dim).permute(1, 2, 3, 0, 4).contiguous()
