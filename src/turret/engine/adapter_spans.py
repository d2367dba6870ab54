"""A pass's adapters as the kernel `low_rank` reads them: spans of tokens and the addresses of their factors.

Everything is laid out once a pass; a layer is one call then, whatever the mixture, for rows that begin and single
tokens alike. Knows token spans and one adapter's numbers. Refuses to know slots and requests. Where there is no kernel,
`segments` and `stack` multiply by torch's own products, which are also its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from turret.kernels import AdapterSpans


class Numbers(Protocol):
    """One adapter as a bank has it."""

    @property
    def rank(self) -> int: ...

    @property
    def address(self) -> int:
        """Where its numbers begin."""
        ...

    @property
    def offsets(self) -> Tensor:
        """(L, 2) int64: bytes from there to A and to the scaled B of each layer, -1 for none."""
        ...


Span = tuple[int, int, Numbers]  # (start, end, whose)


def laid_out(spans: Sequence[Span], tokens: int) -> AdapterSpans | None:
    """The spans of a pass of so many tokens, in order; None where there are none. The adapters must outlive it."""
    joined = _joined(spans)
    if not joined:
        return None
    starts, ends, owners = zip(*joined, strict=True)
    offsets = torch.stack([own.offsets for own in owners])
    addresses = offsets + torch.tensor([own.address for own in owners])[:, None, None]
    return AdapterSpans(
        torch.tensor(starts),
        torch.tensor(ends),
        torch.tensor([own.rank for own in owners]),
        addresses.masked_fill_(offsets < 0, 0),
        tokens,
    )


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbours that take one adapter as one span; those of no token left out."""
    joined: list[Span] = []
    for start, end, own in spans:
        if joined and joined[-1][2] is own and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end, own)
        elif end > start:
            joined.append((start, end, own))
    return joined
