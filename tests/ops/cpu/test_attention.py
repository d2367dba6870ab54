"""The attention kernel against plain attention: values, gradients, whole models, and time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from compiled_kernels import BOTH, TOLERANCES, close, compiled, draw, needed
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build
from torch import Tensor

from turret.adapters import attach, packed
from turret.methods import LoRA, Prefix
from turret.ops.attention import attend_plainly
from turret.ops.structs import NO_DROPOUT, AttentionRows, DropoutArguments, Prefixes
from turret.ops.table import without


def plainly(
    rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, drop: list[Tensor] | None = None
) -> Tensor:
    """Attention of each row in float64."""
    parts = []
    for row in range(len(rows.query_starts)):
        (t0, t), (s0, s) = (
            (int(rows.query_starts[row]), int(rows.query_lengths[row])),
            (int(rows.key_starts[row]), int(rows.key_lengths[row])),
        )
        place = prefixes.of_row[row]
        keys, values, P = k[s0 : s0 + s].transpose(0, 1), v[s0 : s0 + s].transpose(0, 1), 0
        if place is not None:
            P = prefixes.pairs[place][0].shape[1]
            keys, values = (torch.cat([a, b], 1) for a, b in zip(prefixes.pairs[place], (keys, values), strict=True))
        position = torch.arange(-P, s)[None] - torch.arange(t)[:, None]  # key - query
        real = torch.arange(-P, s)[None] >= 0
        hidden = torch.zeros_like(position, dtype=torch.bool)
        if rows.causal:
            hidden |= (position > 0) & real
        if rows.window:
            hidden |= (position.abs() >= rows.window) & real
        bias = torch.zeros(1, 1, t, P + s, dtype=q.dtype).masked_fill(hidden, -1e30)
        if rows.bias is not None:
            bias = bias + rows.bias.to(q.dtype)[:, rows.zero + position][None]
        groups = q.shape[1] // k.shape[1]
        keys, values = keys.repeat_interleave(groups, 0)[None], values.repeat_interleave(groups, 0)[None]
        queries = q[t0 : t0 + t].transpose(0, 1)[None]
        if drop is None:
            y = attend_plainly(queries, keys, values, bias, rows.scaling)
        else:
            y = ((rows.scaling * queries @ keys.mT + bias).softmax(-1) * drop[row]) @ values
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


@needed
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (3, 1)]),
    dim=st.sampled_from([1, 8, 24, 32, 64, 80]),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 5, 40]),
    biased=st.booleans(),
    prefixed=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_attention_and_its_gradients_are_the_plain_ones_for_any_rows(
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    causal: bool,
    window: int,
    biased: bool,
    prefixed: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(sum(lengths))
    H, K = heads
    n, each = sum(lengths), torch.tensor(lengths)
    starts = each.cumsum(0) - each
    pairs = [(draw(K, P, dim, dtype=dtype), draw(K, P, dim, dtype=dtype)) for P in (3, 33)] if prefixed else []
    of_row = [(None, 0, 1)[row % 3] if prefixed else None for row in range(len(lengths))]
    zero = 33 + max(lengths)
    bias = draw(H, zero + max(lengths)) if biased else None
    rows = AttentionRows(starts, each, starts, each, dim**-0.5, causal, window, bias, zero)
    q, dy = draw(n, H, dim, dtype=dtype), draw(n, H, dim, dtype=dtype)
    k, v = draw(n, K, dim, dtype=dtype), draw(n, K, dim, dtype=dtype)
    prefixes = Prefixes(pairs, of_row)
    y, log_sum = compiled(dtype).attention(rows, q, k, v, prefixes, NO_DROPOUT)
    dq, dk, dv, dprefix = compiled(dtype).attention_backward(rows, q, k, v, prefixes, NO_DROPOUT, y, log_sum, dy)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wide_pairs = [(a.double().requires_grad_(), b.double().requires_grad_()) for a, b in pairs]
    expected = plainly(rows, *wide, Prefixes(wide_pairs, of_row))
    close(y, expected, dtype)
    flat = [x for pair in wide_pairs for x in pair]
    gradients = torch.autograd.grad(expected, [*wide, *flat], dy.double(), allow_unused=True)
    for ours, theirs in zip((dq, dk, dv), gradients[:3], strict=True):
        close(ours / 4, theirs / 4, dtype)
    for place in range(len(pairs)):
        for each_side in (2 * place, 2 * place + 1):
            if place in of_row:
                close(dprefix[each_side] / 8, gradients[3 + each_side] / 8, dtype)


@needed
@BOTH
def test_attention_drops_the_same_probabilities_forward_and_backward(dtype: torch.dtype) -> None:
    """A forward pass whose values are the identity shows the mask; the expected results use that mask."""
    T, dim, p = 64, 64, 0.25
    rows = AttentionRows(torch.tensor([0]), torch.tensor([T]), torch.tensor([0]), torch.tensor([T]), 0.1, causal=False)
    none, dropped = Prefixes([], [None]), DropoutArguments.of(p, 3, torch.arange(T))
    q, k, v, dy = (draw(T, 2, dim, dtype=dtype) for _ in range(4))
    identity = torch.eye(T, dtype=dtype)[:, None].expand(T, 2, T).contiguous()
    seen = compiled(dtype).attention(rows, q, k, identity, none, dropped)[0]  # (T, 2, S): the dropped probabilities
    mask = (seen != 0).transpose(0, 1)[None].double() / (1 - p)
    assert (mask > 0).double().mean().item() == pytest.approx(1 - p, abs=0.03)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = plainly(rows, *wide, none, [mask])
    y, log_sum = compiled(dtype).attention(rows, q, k, v, none, dropped)
    close(y, expected, dtype)
    ours = compiled(dtype).attention_backward(rows, q, k, v, none, dropped, y, log_sum, dy)[:3]
    for mine, theirs in zip(ours, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        close(mine, theirs, dtype)
    undropped = compiled(dtype).attention(rows, q, k, v, none, NO_DROPOUT)[0]
    assert not torch.allclose(undropped.float(), y.float(), atol=0.05)  # the control


@needed
def test_a_nan_in_one_row_stays_in_that_row() -> None:
    rows = AttentionRows(*(torch.tensor(x) for x in ([0, 5], [5, 7], [0, 5], [5, 7])), 0.5, causal=False)
    q, k, v = draw(12, 2, 8), draw(12, 1, 8), draw(12, 1, 8)
    k[2] = float("nan")
    y, _ = compiled().attention(rows, q, k, v, Prefixes([], [None, None]), NO_DROPOUT)
    assert y[:5].isnan().all()
    assert y[5:].isfinite().all()


@needed
@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "bart", "llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "method", [LoRA(lora_dropout=0.0, target_modules="all-linear"), LoRA(lora_dropout=0.0), Prefix()]
)
def test_a_model_trains_alike_with_and_without_kernels(family: str, method: LoRA | Prefix) -> None:
    torch.manual_seed(0)  # one draw in a thousand has an input of T5's ReLU so near 0 that rounding decides
    classify = family in ("bert", "modernbert")
    model = attach(build(family, "classify" if classify else "generate"), method)
    model.eval()  # no dropout of the base; gradients are still computed
    rows = [torch.randint(5, 60, (n,)) for n in (3, 17, 40)]

    def outcome() -> tuple[Tensor, list[Tensor]]:
        if classify:
            y = packed.classify_logits(model, rows)
        else:
            y = packed.target_logits(model, rows, [row[:4] for row in rows])
        trained = [each for each in model.parameters() if each.requires_grad]
        return y, list(torch.autograd.grad(y.square().sum(), trained, allow_unused=True))

    with without("kernels"):
        plain, plain_gradients = outcome()
    fast, gradients = outcome()
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@needed
@pytest.mark.slow
def test_attention_is_no_slower_than_what_it_replaces() -> None:
    """A compiler that keeps sums in memory, as with vectors wider than registers, gives right but 20x slower code."""
    B, T, H, D = 4, 192, 8, 32
    starts, each = torch.arange(B) * T, torch.full((B,), T)
    rows = AttentionRows(starts, each, starts, each, D**-0.5, causal=False)
    q, k, v = (torch.randn(B * T, H, D) for _ in range(3))
    prefixes = Prefixes([], [None] * B)

    def plain() -> None:
        a, b, c = (x.view(B, T, H, D).transpose(1, 2) for x in (q, k, v))
        torch.softmax(a @ b.transpose(2, 3) * D**-0.5, -1) @ c

    def least(do: Callable[[], object]) -> float:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            do()
            times.append(time.perf_counter() - began)
        return min(times)

    assert least(lambda: compiled().attention(rows, q, k, v, prefixes, NO_DROPOUT)) < 1.5 * least(plain)
