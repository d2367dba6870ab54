"""Beam search for one request, step by step, with the results of transformers.

The score of a finished text is the sum of its log probabilities / length ** length_penalty. The search ends when no
unfinished text can beat the k finished ones. Source: `GenerationMixin._beam_search` of transformers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turret.engine.decode import adjust
from turret.engine.request import GenerationSettings

NEVER = -1e9  # the score of a text that cannot be chosen, as in transformers


@dataclass(frozen=True)
class Finished:
    """A text that has ended."""

    score: float
    tokens: tuple[int, ...]


class Beams:
    """The texts of one search. The first step takes one row of logits, each later step one row per beam."""

    def __init__(self, settings: GenerationSettings, before: Sequence[int]) -> None:
        self.settings = settings
        self.random = random.Random(settings.seed)
        self._before = list(before)  # tokens before the answer that penalties count too
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
        """The best finished text, including its end-of-text token; the best unfinished one before any has finished."""
        return self._best[0].tokens if self._best else self.running[0]

    def advance(self, logits: Tensor) -> list[int] | None:
        """Take one step of the search.

        Args:
            logits: (1 or k, V) float32, of the last token of each beam.

        Returns:
            For each new beam the number of the beam that it continues; None at the end of the search.
        """
        k, settings = self._size, self.settings
        scores = torch.log_softmax(logits, dim=-1)
        if not settings.plain:
            for row, tokens in zip(scores, self.running, strict=False):
                adjust(row, [*self._before, *tokens], len(tokens), settings)
        scores = scores.expand(k, -1) + torch.tensor(self._scores, device=scores.device)[:, None]
        V = scores.shape[1]
        count = max(2, 1 + len(settings.eos)) * k
        values, places = scores.flatten().topk(min(count, k * V))
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
        """Keep the k best finished texts. Of the texts of this step, only the first k may end."""
        if not self._improvable or (len(self._best) == self._size and self.settings.early_stopping is True):
            return
        new = [
            Finished(total / length**self.settings.length_penalty, text)
            for text, total, over in list(zip(texts, totals, ended, strict=True))[: self._size]
            if over
        ]
        self._best = sorted([*self._best, *new], key=lambda each: -each.score)[: self._size]

    def _could_improve(self, length: int) -> bool:
        """Whether the best unfinished text could still beat the worst of k finished ones."""
        if len(self._best) < self._size:
            return True
        settings = self.settings
        if settings.early_stopping == "never" and settings.length_penalty > 0.0:
            length = settings.max_tokens
        return bool(self._scores[0] / length**settings.length_penalty > self._best[-1].score)
