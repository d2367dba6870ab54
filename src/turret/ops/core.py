"""The operations of a transformer for tensors of one device and dtype: in plain torch here, faster in the subclasses.

`table.of` chooses the object. `Ops` is the reference: `CpuOps` (`cpu.compiled`) and `GpuOps` (`gpu.ops`) compute the
same, and replace only what their device computes faster. Axes: N tokens of all rows, D width, H heads, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from turret.ops.structs import (
    AdapterSpans,
    AttentionRows,
    DropoutArguments,
    LayerNorm,
    Lora,
    Prefixes,
    RMSNorm,
)

switched_off: ContextVar[frozenset[str]] = ContextVar("fast_paths_off", default=frozenset())  # see `table.without`


def is_enabled(name: str) -> bool:
    """Whether a faster path may be taken: always, except inside `table.without`."""
    return name not in switched_off.get()


NumberedMatrix = tuple[int, Tensor, Tensor | None]  # a frozen layer's number among those that are adapted, W and b

__all__ = ["REFERENCE", "AdapterSpans", "KVStep", "LayerWeights", "LoraGradients", "Loras", "Ops", "WholeLayers"]

LoraGradients = list[Tensor | None]
Loras = Sequence[Lora | None]  # of the matrices of one input, None for one without


class KVStep(Protocol):
    """The rows of a KV cache that a decode step reads, the same for every layer of a model."""

    def keep(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> bool:
        """Write the newest token (B, H_kv, D) of each row into (B, H_kv, S, D); False if it was not written."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int) -> Tensor | None:
        """softmax(scaling q K^T) V of one query a row, q: (B, H, D), or None if torch must compute it."""


class LayerWeights(Protocol):
    """The frozen weights of a layer for a kernel that computes whole layers.

    alike: equal for layers that one call computes.
    """

    @property
    def alike(self) -> Hashable: ...
    @property
    def dtype(self) -> torch.dtype: ...


class WholeLayers(Protocol):
    """Consecutive layers in one call, on few tokens; bit-equal to the operations of their parts."""

    def encoder(self, x: Tensor, spans: AdapterSpans | None, rows: Sequence[tuple[AttentionRows, Prefixes]]) -> Tensor:
        """Post-norm layers. x: (..., D) -> (..., D). spans: of the adapters. rows: of each layer's attention."""

    def decoder(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: AdapterSpans | None,
        parts: Sequence[Sequence[tuple[KVStep, Tensor, Tensor]]],
    ) -> Tensor:
        """Pre-norm layers on one new token of each row. x: (..., D) -> (..., D); cos, sin: (..., head size).

        parts: for each layer the blocks of the KV cache that hold the rows, in their order: keys and values
        (B, H_kv, S, head size). The new token is written there.
        """


class Ops:
    """The reference of every operation, in plain torch.

    What raises NotImplementedError has its reference in `adapters.attention`: attention over rows. Nobody calls
    it while `kernels` is false.
    """

    kernels = False  # whether anything is faster than torch here
    layouts: frozenset[str] = frozenset()  # the kinds of layer that are worth computing as one block
    output_read = False  # whether `attention_backward` reads the output of `attention`
    few = 0  # the most tokens for which `linear_few` is fast
    tiled = False  # whether the processor has matrix tiles, and so products of many tokens cost little

    # --- frozen products ----------------------------------------------------------------------------------------------

    def linear_few(self, x: Tensor, weight: Tensor, bias: Tensor | None, helped: bool = True) -> Tensor:
        """x W^T + b on at most `few` tokens, without packing W anew. helped: whether helper threads may be awake."""
        return F.linear(x, weight, bias)

    def layer_weights(
        self,
        matrices: Sequence[NumberedMatrix],
        norms: tuple[LayerNorm, LayerNorm] | tuple[RMSNorm, RMSNorm],
        head_norms: tuple[RMSNorm, RMSNorm] | None,
        *,
        dim: int,
        scaling: float,
        window: int,
    ) -> LayerWeights | None:
        """The weights of a layer for `whole_layers`, or None if there is no such kernel for them.

        Args:
            matrices: in the order of the block's groups.
            norms: as in the block: it is post-norm if they are LayerNorms.
            head_norms: of queries and of keys.
            dim: of a head.
            scaling: of the attention scores.
            window: of the attention; 0 for none.
        """
        return None

    def whole_layers(self, layers: Sequence[LayerWeights]) -> WholeLayers:
        """Consecutive layers as one call."""
        raise NotImplementedError

    def lay_out(self, factors: Sequence[tuple[Tensor, Tensor]], scaling: float, flat: Tensor) -> None:
        """Copy A (R, D_in) and scaling B^T of each layer into one buffer, one after another, rounded to its dtype."""
        targets = iter(torch.split(flat, [each.numel() for pair in factors for each in pair]))
        for A, B in factors:
            next(targets).view(A.shape).copy_(A)
            torch.mul(B.to(flat.device, torch.float32).mT, scaling, out=next(targets).view(B.shape[::-1]))

    # --- LoRA ---------------------------------------------------------------------------------------------------------

    def takes_lora(self, loras: Loras) -> bool:
        """Whether these operations compute the LoRA of layers with one input."""
        return True

    def add_lora(self, y: Sequence[Tensor], x: Tensor, loras: Loras, plus: Tensor | None = None) -> list[Tensor]:
        """y_g <- y_g + scale_g h_g B_g^T + plus,  h_g = (x mask_g) A_g^T, multiplied in x's precision.

        Args:
            y: (N, D_out) each, changed in place.
            x: (N, D_in).
            loras: of each layer.
            plus: added to every y.

        Returns:
            What the backward pass needs: h (N, R) of each LoRA.
        """
        inner = []
        for own, lora in zip(y, loras, strict=True):
            if lora is not None:
                inner.append(self._add_one_lora(own, x, lora))
            if plus is not None:
                own.add_(plus)
        return inner

    def lora_backward(
        self, loras: Loras, x: Callable[[], Tensor], inner: Sequence[Tensor], dy: Sequence[Tensor], dx: Tensor | None
    ) -> LoraGradients:
        """dB = scale dy^T h;  dh = scale dy B;  dA = dh^T (x mask);  dx <- dx + (dh A) mask.

        Args:
            loras: of each layer.
            x: gives the input (N, D_in); called only if a layer has a LoRA.
            inner: as `add_lora` returned it.
            dy: (N, D_out) of each layer.
            dx: (N, D_in), changed in place; None if nobody needs it.

        Returns:
            dA and dB of each LoRA, float32; None for a gradient that was added where the parameter keeps it.
        """
        gradients: LoraGradients = []
        hidden = iter(inner)
        for own, lora in zip(dy, loras, strict=True):
            if lora is not None:
                gradients += self._one_lora_backward(lora, x(), next(hidden), own, dx)
        return gradients

    def _add_one_lora(self, y: Tensor, x: Tensor, lora: Lora) -> Tensor:
        """`add_lora` of one layer: h."""
        h = self._mask_input(x, lora) @ lora.A.to(x.dtype).mT
        y.addmm_(h, lora.B.to(x.dtype).mT, alpha=lora.scale)
        return h

    def _one_lora_backward(
        self, lora: Lora, x: Tensor, h: Tensor, dy: Tensor, dx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`lora_backward` of one layer: (dA, dB)."""
        A, B = lora.A.to(dy.dtype), lora.B.to(dy.dtype)
        dh = (dy @ B).mul_(lora.scale)
        if dx is not None and lora.dropped.threshold == 0:
            dx.addmm_(dh, A)
        elif dx is not None:
            dx.add_(self._mask_input(dh @ A, lora))
        return (dh.mT @ self._mask_input(x, lora)).float(), (dy.mT @ h).float().mul_(lora.scale)

    def _mask_input(self, x: Tensor, lora: Lora) -> Tensor:
        """The input of a LoRA after dropout, not scaled."""
        return x if lora.dropped.threshold == 0 else self.dropout(x.contiguous(), lora.dropped, 1.0)

    # --- norms, activations, positions --------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor | None]:
        """(y, 1 / sqrt(mean(x^2) + eps)). x: (..., D). Source: Zhang & Sennrich 2019."""
        wide = x.float()
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return norm.weight * (wide * r).to(x.dtype), r

    def rms_norm_backward(
        self, x: Tensor, norm: RMSNorm, r: Tensor | None, dy: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        """dx = r (g - n mean(g n)) + plus,  g = w dy,  n = x r. r: as `rms_norm` gave it."""
        assert r is not None
        g, n = (dy * norm.weight).float(), x.float() * r
        dx = g.sub_(n.mul_((g * n).mean(-1, keepdim=True))).mul_(r).to(x.dtype)
        return dx if plus is None else dx.add_(plus)

    def added_norm(self, a: Tensor, x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
        """(LayerNorm(s), s, what the backward pass needs of s), s = dropout(a) + x. Source: Ba et al. 2016."""
        s = (a if norm.dropped.threshold == 0 else self.dropout(a, norm.dropped, norm.dropped.scale)) + x
        return F.layer_norm(s, s.shape[-1:], norm.weight, norm.bias, norm.eps), s, s.new_empty(0)

    def added_norm_again(self, s: Tensor, norm: LayerNorm, stats: Tensor) -> Tensor:
        """LayerNorm(s) once more, from the results of `added_norm`."""
        return F.layer_norm(s, s.shape[-1:], norm.weight, norm.bias, norm.eps)

    def added_norm_backward(self, s: Tensor, norm: LayerNorm, stats: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(da, dx)."""
        wide = s.float()
        r = torch.rsqrt(wide.var(-1, keepdim=True, correction=0) + norm.eps)
        n, g = (wide - wide.mean(-1, keepdim=True)) * r, dy.float() * norm.weight.float()
        dx = (r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))).to(s.dtype)
        return (dx.clone() if norm.dropped.threshold == 0 else self.dropout(dx, norm.dropped, norm.dropped.scale)), dx

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float) -> Tensor:
        """The elements of x (..., D) that a mask keeps times `scale`, zero elsewhere."""
        y = x * dropped.keep_mask(x.shape)
        return y if scale == 1.0 else y.mul_(scale)

    def gelu(self, x: Tensor) -> Tensor:
        """x Phi(x), Phi the normal distribution. Source: Hendrycks & Gimpel 2016."""
        return F.gelu(x)

    def gelu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """dx."""
        return torch.ops.aten.gelu_backward(dy, x)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) up. All (N, F). Source: Shazeer 2020."""
        return F.silu(gate) * up

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(dgate, dup). All (N, F)."""
        g, u, d = gate.float(), up.float(), dy.float()
        s = torch.sigmoid(g)
        dgate, dup = d * u * s * (1.0 + g * (1.0 - s)), d * g * s
        return dgate.to(gate.dtype), dup.to(gate.dtype)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """x cos + sign rotate_half(x) sin of q (N, H, D) and k (N, H_kv, D), rounded as in transformers.

        cos, sin: (N, D). Source: Su et al. 2021.
        """
        found = []
        for x in (q, k):
            first, second = x.float().chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
            found.append((x.float() * cos.float()[:, None] + sign * turned * sin.float()[:, None]).to(x.dtype))
        return found[0], found[1]

    # --- attention ----------------------------------------------------------------------------------------------------

    def takes_layer(self, layout: str, *, trains: bool) -> bool:
        """Whether layers of this layout are worth computing as one block (`blocks`)."""
        return layout in self.layouts and is_enabled("trained_layer" if trains else "layer")

    def few_for_layers(self) -> int:
        """The most tokens for which `whole_layers` computes."""
        return self.few if is_enabled("layer_calls") else 0

    @property
    def attends(self) -> bool:
        """Whether `attention` computes anything."""
        return self.kernels and is_enabled("flash")

    def takes_attention(self, rows: AttentionRows, prefixes: Prefixes, dim: int, p: float) -> bool:
        """Whether `attention` computes a batch. dim: of a head. p: rate of dropout."""
        return False

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        """y = dropout(softmax(scaling q k^T + bias)) v, for each row of an unpadded batch alone.

        Args:
            rows: the place of each row.
            q: (N, H, D), the last axis contiguous.
            k: (M, H_kv, D), likewise.
            v: (M, H_kv, D), likewise.
            prefixes: come before the keys and values of their rows.
            dropped: dropout of the probabilities.

        Returns:
            y (N, H, D), and the logarithm of each query's sum of exponentials, for the backward pass.
        """
        raise NotImplementedError

    def attention_backward(
        self,
        rows: AttentionRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Prefixes,
        dropped: DropoutArguments,
        y: Tensor | None,
        log_sum: Tensor,
        dy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(dq, dk, dv, the gradients of the keys and values of every pair of prefixes).

        y: the output, if `output_read`.
        """
        raise NotImplementedError

    def kv_step(self, lengths: Tensor, prefixes: Tensor, like: Tensor) -> KVStep | None:
        """What a decode step reads of a cache with these lengths, or None if torch computes it; see `KVStep`."""
        return None


REFERENCE = Ops()


def attention_by_rows(rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of `Ops.attention`, row by row in torch's operations. Its last query sees all keys of a row."""
    parts = []
    bounds = (rows.query_starts, rows.query_lengths, rows.key_starts, rows.key_lengths)
    for start, T, key_start, S in zip(*(each.tolist() for each in bounds), strict=True):
        parts_of_row = q[start : start + T], k[key_start : key_start + S], v[key_start : key_start + S]
        a, b, c = (each.transpose(0, 1)[None] for each in parts_of_row)
        parts.append(
            F.scaled_dot_product_attention(a, b, c, visible_keys(rows, T, S), scale=rows.scaling, enable_gqa=True)[0]
        )
    return torch.cat([each.transpose(0, 1) for each in parts])


def visible_keys(rows: AttentionRows, T: int, S: int) -> Tensor:
    """Which of S keys each of T queries sees: (T, S) bool."""
    behind = torch.arange(T)[:, None] + (S - T) - torch.arange(S)[None]
    near = behind.abs() < rows.window if rows.window else torch.ones_like(behind, dtype=torch.bool)
    return near & (behind >= 0) if rows.causal else near


def seeded_randn(dtype: torch.dtype, to: torch.dtype | torch.device) -> Callable[..., Tensor]:
    """Draws the same numbers of a dtype for every check, in a wider dtype or on a device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(to)


# --- copies to a device ----------------------------------------------------------------------------------------------


def real_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU and this torch can use one; a pretended GPU of the tests is none."""
    return device.type == "cuda" and (torch.version.cuda or torch.version.hip) is not None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU it goes from pinned memory, so the CPU goes on while it travels.

    Later work on the GPU waits for it by itself, and torch keeps the pinned memory until then.
    """
    if real_gpu(device) and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A large tensor on a device, the same one on a CPU. It goes to a GPU from pinned memory, on a stream of its own.

    So passes that another thread submits compute meanwhile. The calling thread waits for the copy.
    """
    if not real_gpu(device):
        return tensor.to(device)
    there = torch.empty_like(tensor, device=device)  # from the memory of the stream on which it is read
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # what used this memory before may still run
    with torch.cuda.stream(side):
        there.copy_(tensor, non_blocking=True)
    side.synchronize()
    return there


def use_device(device: torch.device) -> None:
    """Make a GPU the calling thread's own: programs start there, and memory is pinned for it."""
    if real_gpu(device):
        torch.cuda.set_device(device)


# --- functions of autograd --------------------------------------------------------------------------------------------
# Types for `torch.autograd.Function`, which torch leaves untyped.


P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Gradients = tuple[Tensor | None, ...]  # one for each argument of `forward`; None for what is not differentiated


class FunctionContext(Protocol):
    """What `forward` leaves for `backward`. A Function with attributes of its own adds them in a subclass."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...  # None where None was saved
    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...  # what `forward` keeps for `backward`
    def __setattr__(self, name: str, value: Any) -> None: ...


class _Function(Protocol[P, R]):
    @staticmethod
    def forward(ctx: Any, *args: P.args, **kwargs: P.kwargs) -> R: ...  # a subclass of FunctionContext


def apply_function(function: type[_Function[P, R]], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function.apply(*args)`, with the argument and result types of its `forward`."""
    return function.apply(*args, **kwargs)  # type: ignore[attr-defined]  # torch.autograd.Function's, untyped
