"""Dropout whose masks are hashes, on every device.

    y = x * mask / (1 - p),    mask = hash(seed, step, site, example, element) >= p,  p rounded to 1/65536

A site is the nth use of dropout in a pass. So an example has the same mask alone and among any neighbours, in any
micro-batch and any process, and a training step draws from no generator. 16 bits of the hash decide an element.

A kernel computes the hash whenever it needs the mask; `structs.dropout_mask` is the same in torch, and its result is
kept for the backward pass. Modules that a hook cannot replace draw inside `HashedDraws`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from turret.ops.attention import attend_plainly
from turret.ops.core import FunctionContext, Gradients, Ops, apply_function, to_device
from turret.ops.structs import NO_DROPOUT, OF_SITE, STEPS, WORD, DropoutArguments
from turret.ops.table import ops_for

SPREAD = 0x9E3779B97F4A7C15  # between the states of a generator (SplitMix64; Steele et al. 2014)
TOKEN, HEAD = 0xD1342543DE82EF95, 0xAF251AF3B0F025B5  # odd: between the keys of an example's tokens, and of heads
PLACES = ("encoder", "decoder", "head", "output")  # where an example's tokens are masked apart from each other
LONG = 1 << 64
R = TypeVar("R")


def splitmix64(state: int) -> int:
    """SplitMix64's output for a state: 64 bits."""
    z = state % LONG
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % LONG
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % LONG
    return z ^ (z >> 31)


class Draws(NamedTuple):
    """What decides the random numbers of a step. step: 1 for the first of a training."""

    seed: int
    step: int

    @property
    def key(self) -> int:
        return splitmix64(splitmix64(self.seed + SPREAD) + self.step * SPREAD)


class Masks:
    """The masks of one pass.

    Args:
        key: of the step; None: drawn from torch's generator when first needed, for a pass outside of a training.
        numbers: of the pass's examples in the step. Rows beyond them fill the pass up.
        lengths: tokens of each row, by stream; empty: the pass is padded, and its rows are told apart by their place.
        read: (B,) the only tokens that the end of the last layer computes; None for all.
    """

    def __init__(
        self,
        key: int | None = None,
        numbers: Sequence[int] = (),
        lengths: Mapping[str, Sequence[int]] | None = None,
        read: Tensor | None = None,
    ) -> None:
        self.stream = next(iter(lengths), "") if lengths else ""  # whose tokens pass now
        self._key, self._numbers, self._lengths, self._read = key, numbers, lengths or {}, read
        self._keys: dict[tuple[str, int], Tensor] = {}
        self._sites = 0

    @property
    def key(self) -> int:
        if self._key is None:
            self._key = int(torch.randint(1 << 62, ()))
        return self._key

    def next_seed(self) -> int:
        """The seed of the next site, below 2^32."""
        self._sites += 1
        return (self.key + self._sites * OF_SITE) & WORD

    def arguments(self, p: float, keys: Callable[[], Tensor]) -> DropoutArguments:
        """The next mask of this pass. keys: of its tokens, such as `tokens` or `keys_of`."""
        return DropoutArguments.of(p, self.next_seed(), keys()) if round(p * STEPS) else NO_DROPOUT

    def tokens(self, stream: str, device: torch.device, *, read: bool = False) -> Tensor:
        """The keys of a stream's tokens, (N,), or (B,) of those that are read."""
        if (stream, -read) not in self._keys:
            if read:
                found = self.tokens(stream, device)
                found = found if self._read is None else found.index_select(0, self._read)
            else:
                found = to_device(self._of_tokens(stream), device)
            self._keys[stream, -read] = found
        return self._keys[stream, -read]

    def keys_of(self, x: Tensor, stream: str | None = None) -> Tensor:
        """A key for each row of x (..., D), as many as x has without its last axis.

        If these are tokens, or heads of attention by tokens, each gets its token's key. Anything else, such as a table
        of positions, is the same for every example, and so is its mask.
        """
        count = x.numel() // max(1, x.shape[-1])
        if self._lengths:
            name = self.stream if stream is None or stream not in self._lengths else stream
            if stream is None and sum(self._lengths[name]) != count:
                name = next((other for other, each in self._lengths.items() if sum(each) == count), name)
            keys = self.tokens(name, x.device)
            if len(keys) == count:
                return keys
            if self._read is not None and len(self._read) == count:
                return self.tokens(name, x.device, read=True)
            if x.dim() > 2 and x.shape[-2] == len(keys):
                heads = count // len(keys)
                if (name, heads) not in self._keys:
                    apart = torch.arange(heads, device=x.device)[:, None] * _signed_word(HEAD)
                    self._keys[name, heads] = (keys + apart).flatten()
                return self._keys[name, heads]
        return torch.arange(count, device=x.device) * _signed_word(TOKEN) + _signed_word(splitmix64(self.key))

    def _of_tokens(self, stream: str) -> Tensor:
        """Key of an example + TOKEN times the place of the token in it."""
        lengths, starts = self._lengths[stream], []
        place = splitmix64(self.key + PLACES.index(stream) + 1)
        for row, end in enumerate(accumulate(lengths)):
            number = self._numbers[row] if row < len(self._numbers) else -1
            starts.append(_signed_word(splitmix64(place + (number + 2) * SPREAD) - (end - lengths[row]) * TOKEN))
        keys = torch.tensor(starts).repeat_interleave(torch.tensor(lengths), output_size=sum(lengths))
        return keys.add_(torch.arange(len(keys)), alpha=_signed_word(TOKEN))


def _signed_word(word: int) -> int:
    """64 bits as a number of int64."""
    return (word + LONG // 2) % LONG - LONG // 2


class _Dropout(torch.autograd.Function):
    """y = x mask / (1 - p);  dx = dy mask / (1 - p)."""

    @staticmethod
    def forward(ctx: FunctionContext, x: Tensor, ops: Ops, dropped: DropoutArguments) -> Tensor:
        ctx.ops, ctx.dropped = ops, dropped
        return ops.dropout(x, dropped, dropped.scale)

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        return ctx.ops.dropout(gradients[0].contiguous(), ctx.dropped, ctx.dropped.scale), None, None


def dropout(x: Tensor, p: float, masks: Masks | None = None, stream: str | None = None) -> Tensor:
    """x * mask / (1 - p). masks: those of the current pass; None draws new ones. stream: whose tokens x has."""
    if round(p * STEPS) == 0 or x.numel() == 0:
        return x
    if round(p * STEPS) == STEPS:
        return x * 0.0
    own = masks or Masks()
    return apply_function(_Dropout, x.contiguous(), ops_for(x), own.arguments(p, lambda: own.keys_of(x, stream)))


# --- modules that draw by themselves ----------------------------------------------------------------------------------


FROM_A_GENERATOR = frozenset(
    (torch.rand, torch.randn, torch.randint, torch.randperm, torch.bernoulli, torch.normal, torch.multinomial)
)
LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
IN_PLACE = frozenset((Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.exponential_))


class HashedDraws(TorchFunctionMode):
    """Inside the block torch's dropout is `dropout`, and other random numbers come from the seed, step and site alone.

    Some modules call `torch.nn.functional.dropout` (BART), or draw whether a layer or a rank of an adapter is left
    out. Such a draw is for the whole pass, so it is the same in every pass of a step.
    """

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self._masks = masks

    def __torch_function__(
        self, func: Callable[..., R], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> R | Tensor:  # as torch declares it: arguments of any of torch's functions
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0.0:
            return self._attention(*args, **kwargs)
        if func in LIKE:
            like, plain = args[0], next(each for known, each in LIKE.items() if known is func)
            return self._with_generator(plain, like.device)(like.shape, dtype=like.dtype, device=like.device)
        if (func in FROM_A_GENERATOR or func in IN_PLACE) and kwargs.get("generator") is None:
            tensors = [each for each in args if isinstance(each, Tensor)]
            device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
            return self._with_generator(func, device)(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return dropout(input, p, self._masks) if training else input

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        shape, rows = (query.shape[2], key.shape[2]), (query.shape[0], query.shape[2])
        seen = torch.ones(shape, dtype=torch.bool, device=query.device).tril() if is_causal else attn_mask
        if seen is not None and seen.dtype == torch.bool:
            seen = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, -torch.inf)
        dropped = self._masks.arguments(dropout_p, lambda: self._masks.keys_of(query[:, 0]).view(rows))
        return attend_plainly(query, key, value, seen, query.shape[-1] ** -0.5 if scale is None else scale, dropped)

    def _with_generator(self, func: Callable[..., R], device: torch.device) -> Callable[..., R]:
        """A function of torch with a generator of its own."""
        generator = torch.Generator(device).manual_seed(
            splitmix64(self._masks.key + self._masks.next_seed()) % (LONG // 2)
        )
        return functools.partial(func, generator=generator)
