"""The frozen weights of whole layers, as the kernels that compute them in one call read them.

Made once and kept as long as the layers; tensors are kept alive and checked here, so that a call checks its input only.
Refuses to know modules and adapters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerMatrix:
    """A frozen linear layer: weight (D_out, D_in), bias (D_out,) or none, and its number in `Spans`."""

    number: int
    weight: Tensor
    bias: Tensor | None

    @property
    def words(self) -> _MatrixWords:
        d_out, d_in = self.weight.shape
        return _MatrixWords(d_in, d_out, self.number, _address(self.weight), _address(self.bias))


@dataclass(frozen=True)
class LayerNorm:
    """weight and bias: (D,)."""

    weight: Tensor
    bias: Tensor
    eps: float

    @property
    def words(self) -> _LayerNormWords:
        return _LayerNormWords(_address(self.weight), _address(self.bias), self.eps)


class Layer:
    """What every layer has: weights of one dtype, each contiguous, and D. heads and kv_heads of `dim` numbers each."""

    words: ctypes.Structure

    def __init__(self, matrices: Sequence[LayerMatrix], others: Sequence[Tensor | None], dim: int) -> None:
        kept = [*others, *(each for matrix in matrices for each in (matrix.weight, matrix.bias))]
        self._kept = [each for each in kept if each is not None]
        query, key = (each.weight.shape for each in matrices[:2])
        self.dtype, self.width, self.dim = matrices[0].weight.dtype, query[1], dim
        self.heads, self.kv_heads = query[0] // dim, key[0] // dim
        # what layers that one call computes have in common: it is asked of every layer in every pass
        self.alike = type(self), self.dtype, self.width, self.heads, self.kv_heads, self.dim
        assert query[0] % dim == key[0] % dim == 0
        assert all(each.dtype == self.dtype and each.is_contiguous() and each.is_cpu for each in self._kept)
        assert all(m.bias is None or m.bias.shape == m.weight.shape[:1] for m in matrices)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.words)


class EncoderLayer(Layer):
    """Of BERT and its like. matrices: q, k, v, o, up, down. norms: behind attention and behind the MLP."""

    def __init__(self, matrices: Sequence[LayerMatrix], norms: tuple[LayerNorm, LayerNorm], dim: int) -> None:
        super().__init__(matrices, [each for norm in norms for each in (norm.weight, norm.bias)], dim)
        q, k, v, o, up, down = (each.weight.shape for each in matrices)
        assert q == k == v == o[::-1]
        assert up == down[::-1]
        assert up[1] == o[0] == q[1]
        assert all(each.numel() == self.width for norm in norms for each in (norm.weight, norm.bias))
        self.words = _EncoderLayerWords(*(each.words for each in matrices), *(each.words for each in norms))


class DecoderLayer(Layer):
    """Of a gated decoder. matrices: q, k, v, o, gate, up, down. window: 0 for none.

    norms: the weights of those before attention, of queries and of keys over a head (or none), and behind attention;
    eps: of the first three, and of the last.
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
        self.words = _DecoderLayerWords(
            *(each.words for each in matrices), *map(_address, norms), dim, window, *eps, scaling
        )


class Layers:
    """Alike layers, of which each takes what the one before it gives."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._kept, alike = tuple(layers), layers[0].alike
        self.kind, self.dtype, self.width, self.heads, self.kv_heads, self.dim = alike
        assert all(each.alike == alike for each in layers)
        self.room: dict[int, int] = {}  # bytes for what lies between the products, by tokens
        self._addresses = (ctypes.c_void_p * len(layers))(*(each.address for each in layers))

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._addresses)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _MatrixWords(ctypes.Structure):
    """`struct matrix` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("d_in", "d_out", "number")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
    )


class _LayerNormWords(ctypes.Structure):
    """`struct layer_norm` of products.inc.c."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("weight", "bias")), ("eps", ctypes.c_float))


class _EncoderLayerWords(ctypes.Structure):
    """`struct encoder_layer` of products.inc.c."""

    _fields_ = (
        *((name, _MatrixWords) for name in ("q", "k", "v", "o", "up", "down")),
        *((name, _LayerNormWords) for name in ("norm", "norm_behind")),
    )


class _DecoderLayerWords(ctypes.Structure):
    """`struct decoder_layer` of products.inc.c."""

    _fields_ = (
        *((name, _MatrixWords) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "q_norm", "k_norm", "norm_behind")),
        *((name, ctypes.c_long) for name in ("dim", "window")),
        *((name, ctypes.c_float) for name in ("eps", "eps_behind", "scaling")),
    )
