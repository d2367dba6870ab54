"""The frozen weights of whole layers, for the kernels that compute several layers in one call.

They are made once, checked here, and keep their tensors alive, so a call checks only its inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from turret.ops.structs import LayerNorm


@dataclass(frozen=True)
class LayerMatrix:
    """A frozen linear layer: weight (D_out, D_in), bias (D_out,) or none, and its number in `AdapterSpans`."""

    number: int
    weight: Tensor
    bias: Tensor | None

    @property
    def struct(self) -> _MatrixStruct:
        d_out, d_in = self.weight.shape
        return _MatrixStruct(d_in, d_out, self.number, _address(self.weight), _address(self.bias))


class Layer:
    """A layer with weights of one dtype, all contiguous.

    Args:
        matrices: Linear layers; queries and keys come first.
        others: Other tensors.
        dim: Head size.
    """

    struct: ctypes.Structure

    def __init__(self, matrices: Sequence[LayerMatrix], others: Sequence[Tensor | None], dim: int) -> None:
        tensors = [*others, *(each for matrix in matrices for each in (matrix.weight, matrix.bias))]
        self._tensors = [each for each in tensors if each is not None]  # C reads their memory
        query, key = (each.weight.shape for each in matrices[:2])
        self.dtype, self.width, self.dim = matrices[0].weight.dtype, query[1], dim
        self.heads, self.kv_heads = query[0] // dim, key[0] // dim
        # equal for all layers of one call; cached, because every layer compares it in every pass
        self.alike = type(self), self.dtype, self.width, self.heads, self.kv_heads, self.dim
        assert query[0] % dim == key[0] % dim == 0
        assert all(each.dtype == self.dtype and each.is_contiguous() and each.is_cpu for each in self._tensors)
        assert all(m.bias is None or m.bias.shape == m.weight.shape[:1] for m in matrices)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


class EncoderLayer(Layer):
    """A layer of BERT or RoBERTa.

    Args:
        matrices: q, k, v, o, up, down.
        norms: After attention, and after the MLP.
        dim: Head size.
    """

    def __init__(self, matrices: Sequence[LayerMatrix], norms: tuple[LayerNorm, LayerNorm], dim: int) -> None:
        super().__init__(matrices, [each for norm in norms for each in (norm.weight, norm.bias)], dim)
        q, k, v, o, up, down = (each.weight.shape for each in matrices)
        assert q == k == v == o[::-1]
        assert up == down[::-1]
        assert up[1] == o[0] == q[1]
        assert all(each.numel() == self.width for norm in norms for each in (norm.weight, norm.bias))
        self.struct = _EncoderLayerStruct(*(each.struct for each in matrices), *map(_norm_struct, norms))


class DecoderLayer(Layer):
    """A layer of a gated decoder: Llama, Mistral or Qwen.

    Args:
        matrices: q, k, v, o, gate, up, down.
        norms: Weights of the RMS norms: before attention, of queries and of keys over a head (or None), before the MLP.
        eps: Of the first three norms, and of the last.
        dim: Head size.
        scaling: Of the attention scores.
        window: Sliding window; 0 for none.
    """

    def __init__(
        self,
        matrices: Sequence[LayerMatrix],
        norms: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
        eps: tuple[float, float],
        *,
        dim: int,
        scaling: float,
        window: int = 0,
    ) -> None:
        super().__init__(matrices, norms, dim)
        q, k, v, o, gate, up, down = (each.weight.shape for each in matrices)
        assert q[1] == k[1] == gate[1] == o[0]
        assert (k, gate, q) == (v, up, o[::-1])
        assert gate == down[::-1]
        sizes = [self.width, *(None if each is None else dim for each in norms[1:3]), self.width]
        assert [None if each is None else each.numel() for each in norms] == sizes
        self.struct = _DecoderLayerStruct(
            *(each.struct for each in matrices), *map(_address, norms), dim, window, *eps, scaling
        )


class Layers:
    """Consecutive layers of equal shape."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers, alike = tuple(layers), layers[0].alike
        self.kind, self.dtype, self.width, self.heads, self.kv_heads, self.dim = alike
        assert all(each.alike == alike for each in layers)
        self.workspaces: dict[int, int] = {}  # bytes of the workspace, by number of tokens
        self._addresses = (ctypes.c_void_p * len(layers))(*(each.address for each in layers))

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._addresses)


def _norm_struct(norm: LayerNorm) -> _LayerNormStruct:
    return _LayerNormStruct(_address(norm.weight), _address(norm.bias), norm.eps)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _MatrixStruct(ctypes.Structure):
    """`struct matrix` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("d_in", "d_out", "number")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
    )


class _LayerNormStruct(ctypes.Structure):
    """`struct layer_norm` of products.inc.c."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("weight", "bias")), ("eps", ctypes.c_float))


class _EncoderLayerStruct(ctypes.Structure):
    """`struct encoder_layer` of products.inc.c."""

    _fields_ = (
        *((name, _MatrixStruct) for name in ("q", "k", "v", "o", "up", "down")),
        *((name, _LayerNormStruct) for name in ("norm", "norm_after")),
    )


class _DecoderLayerStruct(ctypes.Structure):
    """`struct decoder_layer` of products.inc.c."""

    _fields_ = (
        *((name, _MatrixStruct) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "q_norm", "k_norm", "norm_after")),
        *((name, ctypes.c_long) for name in ("dim", "window")),
        *((name, ctypes.c_float) for name in ("eps", "eps_after", "scaling")),
    )
