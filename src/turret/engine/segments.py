"""LoRA on rows that begin: a few neighbouring segments of a pass, multiplied together by as few products as may be.

    h = x [A_q; A_k; A_v ...]^T,    y_l += h_l B_l

over the layers that read the same x, and over the adapters of a chunk: what of h is another adapter's is set to zero
first. A chunk of one adapter is the plain product. Knows token spans and factors; refuses to know slots and requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOGETHER = 64  # ranks of one chunk, all its adapters together: beyond it the zeros cost more than the calls they save

Pairs = Mapping[int, tuple[Tensor, Tensor]]  # by layer: A^T (D_in, R) and the scaled B (R, D_out)


@dataclass(frozen=True)
class Segment:
    """Tokens that lie together and take one adapter."""

    start: int
    end: int
    rank: int
    pairs: Pairs


class Chunk:
    """Segments that are multiplied together, and what was computed for the layers that read one x."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self.start, self.end = segments[0].start, segments[-1].end
        self._x: Tensor | None = None
        self._ready: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: h (n, K) and B (K, D_out)
        self._hidden: dict[tuple[int, ...], Tensor] = {}

    def add(self, layer: int, siblings: Sequence[int], y: Tensor, x: Tensor) -> None:
        """y += each segment's own product, x: (N, D_in), y: (N, D_out). siblings: layers that may read the same x."""
        if self._x is not x or layer not in self._ready:
            self._x, self._ready = x, {}
            self._compute([layer, *(each for each in siblings if each != layer)], x)
        found = self._ready.get(layer)
        if found is not None:
            y[self.start : self.end].addmm_(*found)

    def _compute(self, layers: Sequence[int], x: Tensor) -> None:
        parts = [
            (layer, number, segment.pairs[layer])
            for layer in layers
            for number, segment in enumerate(self._segments)
            if layer in segment.pairs
        ]
        if not parts or parts[0][0] != layers[0]:
            return  # nobody adapts this layer; its siblings are computed when they come
        A = parts[0][2][0] if len(parts) == 1 else torch.cat([pair[0].mT for _, _, pair in parts]).mT  # (D_in, K)
        h = x[self.start : self.end] @ A  # (n, K)
        if len(self._segments) > 1:
            h.masked_fill_(self._others(tuple(number for _, number, _ in parts), h.device), 0.0)
        at = 0
        for layer in dict.fromkeys(layer for layer, _, _ in parts):
            own = [pair[1] for each, _, pair in parts if each == layer]
            B = own[0] if len(own) == 1 else torch.cat(own)
            self._ready[layer] = (h[:, at : at + len(B)], B)
            at += len(B)

    def _others(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """Which of h belongs to another segment's adapter: (n, K). numbers: the segment of each part."""
        if numbers not in self._hidden:
            ranks = torch.tensor([self._segments[number].rank for number in numbers])
            columns = torch.tensor(numbers).repeat_interleave(ranks)
            sizes = torch.tensor([segment.end - segment.start for segment in self._segments])
            rows = torch.arange(len(self._segments)).repeat_interleave(sizes)
            self._hidden[numbers] = (rows[:, None] != columns[None]).to(device)
        return self._hidden[numbers]


def chunks(segments: Sequence[Segment], joint: bool) -> list[Chunk]:
    """Neighbouring segments in chunks of at most `TOGETHER` ranks; each by itself unless `joint`."""
    found: list[list[Segment]] = []
    room = 0
    for segment in segments:
        neighbour = found and found[-1][-1].end == segment.start
        if not (joint and neighbour and segment.rank <= room):
            found.append([])
            room = TOGETHER
        found[-1].append(segment)
        room -= segment.rank
    return [Chunk(each) for each in found]
