"""Matrix products: of an adapter that trains and of what is frozen beside it, of many that answer, of few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turret.kernels.arguments import AdapterSpans, DropoutArguments, Int8Matrix
from turret.kernels.calls import Calls, at, p, threads

WAKING = 1 << 20  # products of two numbers, that take a thread 0.1 ms; one that sleeps is there after 0.05 to 2
LONGEST_INT8 = 1 << 16  # numbers of a sum in 8 bits: 255 * 127 of each fit 31 bits


class Products(Calls):
    """Axes: N tokens, R ranks."""

    def lora(self, x: Tensor, A: Tensor, B: Tensor, by: float, dropped: DropoutArguments, y: Tensor) -> Tensor:
        """y += by (dropout(x) A^T) B^T, where dropout does not scale; gives h = dropout(x) A^T (N, R) float32.

        x: (N, D_in), y: (N, D_out) of one dtype, D_in and D_out multiples of 32; A: (R, D_in), B: (D_out, R) float32.
        """
        turned, h = torch.empty_like(B), torch.empty(x.shape[0], A.shape[0])
        told = *_lora(x, A, B), by, *dropped.seeds, dropped.threshold
        self._call("lora", x.dtype, *told, *map(p, (turned, h, y)), threads())
        return h

    def lora_backward(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        by: float,
        dropped: DropoutArguments,
        h: Tensor,
        dy: Tensor,
        dx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(dA, dB); dx, where it is wanted, holds dy W and is added to."""
        dA, dB, turned, dh = (torch.empty_like(each) for each in (A, B, B, h))
        told = *_lora(x, A, B), by, *dropped.seeds, dropped.threshold
        self._call("lora_backward", x.dtype, *told, *map(p, (turned, dh, h, dy, dx, dA, dB)), threads())
        return dA, dB

    def round_int8(self, weight: Tensor, turned: bool = False) -> Int8Matrix:
        """W for many `linear_int8`: (O, E), or turned (E, O). E a multiple of 64, O of 32. Only with `int8`."""
        outputs, deep = self._sizes_int8(weight, turned)
        found = Int8Matrix(torch.empty(outputs * (deep + 4), dtype=torch.uint8), outputs, deep, weight.dtype)
        helpers = torch.get_num_threads()
        rows = torch.empty(helpers, 16 * deep, dtype=torch.uint8)
        told = weight.data_ptr(), found.bytes.data_ptr(), rows.data_ptr()
        self._call("round_int8", weight.dtype, *told, deep, outputs, turned, helpers)
        return found

    def linear_int8(self, x: Tensor, weight: Tensor | Int8Matrix, bias: Tensor | None, turned: bool = False) -> Tensor:
        """x W^T + b, or turned x W, with x and W rounded to whole numbers: of every token, and of every output of W.

        x: (N, E), weight: (O, E) or turned (E, O), or either rounded before, bias: (O,) -> (N, O). E a multiple of 64,
        O of 32. Only with `int8`.
        """
        by: tuple[int | None, int | None]
        if rounded := isinstance(weight, Int8Matrix):
            (outputs, deep), by = (weight.outputs, weight.deep), (None, weight.bytes.data_ptr())
        else:
            (outputs, deep), by = self._sizes_int8(weight, turned), (weight.data_ptr(), None)
        tokens, own = x.shape
        assert own == deep
        assert x.is_contiguous()
        assert weight.dtype == x.dtype
        assert bias is None or (bias.is_contiguous() and bias.dtype == x.dtype and bias.shape == (outputs,))
        y = x.new_empty(tokens, outputs)
        told = x.data_ptr(), *by, None if bias is None else bias.data_ptr(), y.data_ptr()
        sizes, helpers = (tokens, deep, outputs, turned), torch.get_num_threads()
        if (key := (*sizes, x.dtype, rounded, helpers)) not in self._int8_rooms:  # bytes that the kernel asks for
            self._int8_rooms[key] = self._call("linear_int8", x.dtype, *told, *sizes, None, helpers)
        room = torch.empty(self._int8_rooms[key], dtype=torch.uint8)
        self._call("linear_int8", x.dtype, *told, *sizes, room.data_ptr(), helpers)
        return y

    def _sizes_int8(self, weight: Tensor, turned: bool) -> tuple[int, int]:
        """(O, E)"""
        outputs, deep = weight.shape[::-1] if turned else weight.shape
        assert self.int8
        assert deep % 64 == outputs % 32 == 0
        assert deep <= LONGEST_INT8
        assert weight.is_contiguous()
        return outputs, deep

    def low_rank(self, spans: AdapterSpans, layer: int, x: Tensor, y: Tensor) -> None:
        """y += (x A^T) B of every span, added up in float32. x: (..., D_in), y: (..., D_out) of N tokens.

        Rows of no span stay as they are.
        """
        d_in, d_out = x.shape[-1], y.shape[-1]
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert layer < spans.layers
        assert x.numel() == spans.tokens * d_in
        assert y.numel() == spans.tokens * d_out
        numbers = spans.address, layer, x.data_ptr(), y.data_ptr(), d_in, d_out
        self._call("low_rank", x.dtype, *numbers, torch.get_num_threads())

    def lay_out(self, factors: Sequence[tuple[Tensor, Tensor]], by: float, run: Tensor) -> None:
        """A and by B^T of every layer, one behind the other, rounded to run's precision.

        factors: (A (R, D_in), B (D_out, R)) float32, of one R; run: (sum of R (D_in + D_out),).
        """
        rank = len(factors[0][0])
        for A, B in factors:
            assert A.dtype == B.dtype == torch.float32
            assert A.is_contiguous()
            assert B.is_contiguous()
            assert len(A) == B.shape[1] == rank
        assert run.is_contiguous()
        assert run.numel() == sum(A.numel() + B.numel() for A, B in factors)
        addresses = torch.tensor([(A.data_ptr(), B.data_ptr()) for A, B in factors])
        sizes = torch.tensor([(A.shape[1], len(B)) for A, B in factors])
        told = addresses.data_ptr(), sizes.data_ptr(), len(factors), rank, by, run.data_ptr()
        self._call("lay_out", run.dtype, *told)

    def few(self, dtype: torch.dtype) -> int:
        """Tokens up to which `linear` is for; 0 where torch's own product is as quick for any number."""
        return self._few[dtype]

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spans: AdapterSpans | None = None,
        layer: int = 0,
        *,
        helped: bool = True,
    ) -> Tensor:
        """x W^T + b of at most `few` tokens, and (x A^T) B of each span, added up in float32 and rounded once.

        x: (..., D_in), weight: (D_out, D_in) -> (..., D_out). helped: by threads that are taken to be awake.
        """
        d_out, d_in = weight.shape
        tokens = x.numel() // d_in
        assert x.is_contiguous()
        assert weight.is_contiguous()
        assert x.shape[-1] == d_in
        assert tokens <= self._few[x.dtype]
        assert spans is None or (spans.tokens == tokens and layer < spans.layers)
        y = x.new_empty(*x.shape[:-1], d_out)
        helpers = torch.get_num_threads() if helped or tokens * d_in * d_out > WAKING else 1
        self._call(
            "linear", x.dtype, x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
            tokens, d_in, d_out, at(spans), layer, helpers,
        )  # fmt: skip
        return y


def _lora(x: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """tokens, D_in, D_out, R, x, A, B"""
    (rank, d_in), (d_out, ranks), (tokens, own) = A.shape, B.shape, x.shape
    assert (ranks, own) == (rank, d_in)
    assert d_in % 32 == d_out % 32 == 0
    assert x.is_contiguous()
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert A.dtype == B.dtype == torch.float32
    return tokens, d_in, d_out, rank, x.data_ptr(), A.data_ptr(), B.data_ptr()
