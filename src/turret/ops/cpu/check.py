"""Compare every kernel with torch when the library is loaded. A wrong kernel costs speed, not correctness.

Layers in one call consist of the kernels that are checked here; tests compare them bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from turret.ops.cpu.build import NotBuilt
from turret.ops.cpu.compiled import AdapterSpans, CachedKVArguments, Library
from turret.ops.structs import NO_DROPOUT, AttentionRows, DropoutArguments, Prefixes

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest element


def require(library: Library) -> None:
    """Raises NotBuilt with the name of the first kernel whose result differs from torch's."""
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in TOLERANCES.items():
        with torch.inference_mode(False), torch.enable_grad():  # the caller may have set the opposite
            results = _results(library, dtype, generator)
        for name, (given, expected) in results.items():
            off = (given.double() - expected.double()).abs().max() / expected.double().abs().max()
            if not bool(off <= tolerance):
                raise NotBuilt(f"kernel {name} in {dtype} is off by {float(off):.1e}")


def _results(library: Library, dtype: torch.dtype, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    results: dict[str, tuple[Tensor, Tensor]] = {}
    gate, up, dy = draw(3, 37), draw(3, 37), draw(3, 37)
    wide, wider = gate.double().requires_grad_(), up.double().requires_grad_()
    y = torch.nn.functional.silu(wide) * wider
    dgate, dup = torch.autograd.grad(y, (wide, wider), dy.double())
    results["swiglu"] = (library.swiglu(gate, up), y.detach())
    given = library.swiglu_backward(gate, up, dy)
    results |= {"swiglu_backward": (given[0], dgate), "swiglu_backward (up)": (given[1], dup)}
    y = torch.nn.functional.gelu(wide)
    results["gelu"] = (library.gelu(gate), y.detach())
    results["gelu_backward"] = (library.gelu_backward(gate, dy), torch.autograd.grad(y, wide, dy.double())[0])
    weight = draw(37)
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    y = weight.double() * (wide * r)
    normed, found = library.rms_norm(gate, weight, 1e-5)
    results["rms_norm"] = (normed, y.detach())
    expected = torch.autograd.grad(y, wide, dy.double())[0]
    results["rms_norm_backward"] = (library.rms_norm_backward(gate, weight, found, dy), expected)
    shift = draw(37)
    y = torch.nn.functional.layer_norm(wide + wider, (37,), weight.double(), shift.double(), 1e-5)
    normed, added, stats = library.added_norm(gate, up, weight, shift, 1e-5, NO_DROPOUT)
    results["added_norm"] = (normed, y.detach())
    results["added_norm_again"] = (library.added_norm_again(added, weight, shift, stats), y.detach())
    given = library.added_norm_backward(added, weight, stats, NO_DROPOUT, dy)
    results["added_norm_backward"] = (given[1], torch.autograd.grad(y, wide, dy.double())[0])
    x, angle = draw(5, 2, 8), torch.rand(5, 8, generator=generator)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1).double()
    results["rotate"] = (
        library.rotate(x, cos, sin, 1.0),
        x.double() * cos.double()[:, None] + turned * sin.double()[:, None],
    )
    ones = library.dropout(torch.ones(40_000, dtype=dtype), DropoutArguments.of(0.25, (12345, 678)))
    kept = float((ones > 0).double().mean())
    results["dropout"] = (ones.max()[None], torch.full((1,), 4 / 3 if abs(kept - 0.75) < 0.02 else 0.0))
    if library.int8:
        results |= _int8(draw, library)
    return results | _lora(library, draw) | _low_rank(library, draw) | _attention(library, draw) | _step(library, draw)


def _lora(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Five tokens and rank 13 use every block size."""
    x, y, dy, dx, A, B = draw(5, 64), draw(5, 32), draw(5, 32), draw(5, 64), draw(13, 64).float(), draw(32, 13).float()
    h, dh = x.double() @ A.double().mT, 0.5 * dy.double() @ B.double()
    expected = {"lora": y.double() + 0.5 * h @ B.double().mT, "lora dx": dx.double() + dh @ A.double()}
    expected |= {"lora dA": dh.mT @ x.double(), "lora dB": 0.5 * dy.double().mT @ h}
    found = library.lora(x, A, B, 0.5, NO_DROPOUT, y)
    given = y, dx, *library.lora_backward(x, A, B, 0.5, NO_DROPOUT, found, dy, dx)
    return {name: (one, each) for one, (name, each) in zip(given, expected.items(), strict=True)}


def _int8(draw: Callable[..., Tensor], library: Library) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers up to 127, which rounding does not change; ten tokens are one block and two more."""
    x, W, b = (draw(*shape).float().mul(40).round().clamp(-126, 126) for shape in ((10, 64), (64, 64), (64,)))
    x[:, 0], W[:, 0], W[0] = 127, 127, 127
    like, wide = draw(1), x.double() @ W.double().mT + b.double()
    x, W, b = (each.to(like.dtype) for each in (x, W, b))
    given = library.linear_int8(x, W, b), library.linear_int8(x, W.mT.contiguous(), b, turned=True)
    return {"linear_int8": (given[0], wide), "linear_int8 turned": (given[1], wide)}


def _low_rank(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Spans of 40, 5 and 0 tokens, ranks 3 and 17, tokens without an adapter; sizes for tiles and odd sizes."""
    results = {}
    for d_in, d_out in ((64, 96), (37, 41)):
        x, y = draw(49, d_in), draw(49, d_out)
        factors = [(draw(3, d_in), draw(3, d_out)), (draw(17, d_in) / 2, draw(17, d_out) / 2)]
        wide = y.double()
        for (start, end), (A, B) in zip(((1, 41), (43, 48)), factors, strict=True):
            wide[start:end] += x[start:end].double() @ A.double().mT @ B.double()
        addresses = torch.tensor([[[0, 0], [A.data_ptr(), B.data_ptr()]] for A, B in (*factors, factors[1])])
        spans = AdapterSpans(
            torch.tensor([1, 43, 48]), torch.tensor([41, 48, 48]), torch.tensor([3, 17, 17]), addresses, len(x)
        )
        library.low_rank(spans, 1, x, y)
        results[f"low_rank {d_in}"] = (y, wide)
        A, B = draw(3, d_in).float(), draw(d_out, 3).float()
        run = draw(2 * 3 * (d_in + d_out))
        library.lay_out([(A, B), (A, B)], 2.0, run)
        results[f"lay_out {d_in}"] = (run, torch.cat([A.flatten(), 2.0 * B.mT.flatten()] * 2))
    return results


def _attention(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Two causal rows of 40 and 3 tokens, grouped heads, a prefix of 2 tokens for the second row."""
    q, k, v, dy = draw(43, 4, 24), draw(43, 2, 24), draw(43, 2, 24), draw(43, 4, 24)
    prefix = draw(2, 2, 24), draw(2, 2, 24)
    starts, lengths = torch.tensor([0, 40]), torch.tensor([40, 3])
    rows = AttentionRows(starts, lengths, starts, lengths, scaling=0.3, causal=True)
    prefixes = Prefixes([prefix], [None, 0])
    y, log_sum = library.attention(rows, q, k, v, prefixes, NO_DROPOUT)
    dq, dk, dv, dprefix = library.attention_backward(rows, q, k, v, prefixes, NO_DROPOUT, dy, log_sum)
    wide = [each.double().requires_grad_() for each in (q, k, v, *prefix)]
    expected = []
    for (start, end), P in (((0, 40), 0), ((40, 43), 2)):
        keys, values = (
            torch.cat([pre.transpose(0, 1)[:P], each[start:end]]).repeat_interleave(2, 1)
            for pre, each in ((wide[3], wide[1]), (wide[4], wide[2]))
        )
        scores = 0.3 * torch.einsum("thd,shd->hts", wide[0][start:end], keys)
        hidden = torch.arange(P + end - start)[None] > P + torch.arange(end - start)[:, None]
        P_ = scores.masked_fill(hidden, -1e30).softmax(-1)
        expected.append(torch.einsum("hts,shd->thd", P_, values))
    whole = torch.cat(expected)
    gradients = torch.autograd.grad(whole, wide, dy.double())
    names = ("attention dq", "attention dk", "attention dv")
    results = {"attention": (y, whole.detach())}
    results |= {name: (each, exact) for name, each, exact in zip(names, (dq, dk, dv), gradients[:3], strict=True)}
    results |= {f"attention prefix {i}": (dprefix[1, i], gradients[3 + i]) for i in (0, 1)}
    return results


def _step(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A product of up to 5 tokens; three rows of 20, 1 and 7 keys, grouped heads, a prefix of 2 for the last row."""
    results = {}
    x, weight, bias = draw(5, 37), draw(19, 37), draw(19)
    x = x[: library.few(x.dtype)]
    if len(x):
        y, (A, B) = x.double() @ weight.double().mT + bias.double(), (draw(3, 37), draw(3, 19))
        results["linear"] = (library.linear(x, weight, bias), y)
        addresses = torch.tensor([[[A.data_ptr(), B.data_ptr()]]])
        spans = AdapterSpans(torch.tensor([1]), torch.tensor([len(x) - 1]), torch.tensor([3]), addresses, len(x))
        y = y.clone()
        y[1:-1] += x[1:-1].double() @ A.double().mT @ B.double()
        results["linear and its adapters"] = (library.linear(x, weight, bias, spans), y)
    keys, values, new_keys, new_values, q = (
        draw(3, 2, 24, 40),
        draw(3, 2, 24, 40),
        draw(3, 2, 40),
        draw(3, 2, 40),
        draw(3, 4, 40),
    )
    lengths, prefixes = torch.tensor([20, 1, 7]), torch.tensor([0, 0, 2])
    kept = CachedKVArguments(lengths, prefixes, keys)
    library.keep_step(kept, keys, values, new_keys, new_values)
    newest = [each[torch.arange(3), :, lengths - 1] for each in (keys, values)]
    results |= {"keep_step keys": (newest[0], new_keys), "keep_step values": (newest[1], new_values)}
    column = torch.arange(24)[None]
    hidden = (column >= lengths[:, None]) | ((lengths[:, None] - 1 - column >= 4) & (column >= prefixes[:, None]))
    wide = [each.double().repeat_interleave(2, 1) for each in (keys, values)]  # (3, 4, 24, 40)
    scores = 0.3 * torch.einsum("bhd,bhsd->bhs", q.double(), wide[0])
    y = torch.einsum("bhs,bhsd->bhd", scores.masked_fill(hidden[:, None], -1e30).softmax(-1), wide[1])
    results["attend_step"] = (library.attend_step(kept, q, keys, values, 0.3, window=4), y)
    return results
