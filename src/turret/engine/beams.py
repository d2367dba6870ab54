"""Beam search of one request, step by step, as transformers has it: the k best unfinished texts go on together.

A text that ends is scored by the sum of its log probabilities over its length to the power of `length_penalty`; the
search ends when no unfinished text can beat the k finished ones. Knows log probabilities and token ids; refuses to
know lanes and models, and says instead which beam goes on from which.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turret.engine.decode import GenerationSettings, adjust

NEVER = -1e9  # the score of what cannot be chosen, as transformers has it


@dataclass(frozen=True)
class Finished:
    """A text that has ended."""

    score: float
    tokens: tuple[int, ...]


class Beams:
    """The texts of one search. Before the first step there is one row of scores, afterwards one a beam."""

    def __init__(self, settings: GenerationSettings, before: Sequence[int]) -> None:
        self.settings = settings
        self.random = random.Random(settings.seed)
        self._before = list(before)  # what penalties count besides the answer
        self._size = settings.num_beams
        self.running: list[tuple[int, ...]] = [()] * self._size
        self._scores = [0.0] + [NEVER] * (self._size - 1)
        self._best: list[Finished] = []
        self._improvable = True

    @property
    def new(self) -> int:
        return len(self.running[0])

    @property
    def best(self) -> tuple[int, ...]:
        """The best finished text, its end-of-text token included."""
        return self._best[0].tokens if self._best else self.running[0]

    def advance(self, logits: Tensor) -> list[int] | None:
        """The beam that each new beam goes on from, or None at the end. logits: (1 or k, V) float32."""
        k, settings = self._size, self.settings
        scores = torch.log_softmax(logits, dim=-1)
        if not settings.plain:
            for row, tokens in zip(scores, self.running, strict=False):
                adjust(row, [*self._before, *tokens], len(tokens), settings)
        scores = scores.expand(k, -1) + torch.tensor(self._scores, device=scores.device)[:, None]
        V = scores.shape[1]
        kept = max(2, 1 + len(settings.eos)) * k
        values, places = scores.flatten().topk(min(kept, k * V))
        sources = (places // V).tolist()
        texts = [(*self.running[source], place % V) for source, place in zip(sources, places.tolist(), strict=True)]
        length = self.new + 1
        ended = [text[-1] in settings.eos or length >= settings.max_tokens for text in texts]
        totals = values.tolist()
        self._finish(texts, totals, ended, length)
        going = sorted(range(len(texts)), key=lambda each: -(totals[each] + (NEVER if ended[each] else 0.0)))[:k]
        self.running = [texts[each] for each in going]
        self._scores = [totals[each] + (NEVER if ended[each] else 0.0) for each in going]
        self._improvable = self._improvable and self._could_improve(length)
        full = len(self._best) == k and settings.early_stopping is True
        if not self._improvable or full or all(ended):
            return None
        return [sources[each] for each in going]

    def _finish(
        self, texts: Sequence[tuple[int, ...]], totals: Sequence[float], ended: Sequence[bool], length: int
    ) -> None:
        """Keep the k best of what had ended and what ends now; only the k first of a step may end."""
        if not self._improvable or (len(self._best) == self._size and self.settings.early_stopping is True):
            return
        new = [
            Finished(total / length**self.settings.length_penalty, text)
            for text, total, over in list(zip(texts, totals, ended, strict=True))[: self._size]
            if over
        ]
        self._best = sorted([*self._best, *new], key=lambda each: -each.score)[: self._size]

    def _could_improve(self, length: int) -> bool:
        """Whether the best unfinished text could still be better than the worst of k finished ones."""
        if len(self._best) < self._size:
            return True
        settings = self.settings
        if settings.early_stopping == "never" and settings.length_penalty > 0.0:
            length = settings.max_tokens
        return bool(self._scores[0] / length**settings.length_penalty > self._best[-1].score)
