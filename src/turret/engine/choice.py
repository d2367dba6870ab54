"""What the choice of a token asks of a row and of its settings: numbers only, no scores."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from turret.engine.request import GenerationSettings


class Row(Protocol):
    """A row as `choose` reads it."""

    settings: GenerationSettings
    random: random.Random

    def counted(self) -> Sequence[int]:
        """The tokens that penalties count; they end with the answer so far."""
        ...

    @property
    def new(self) -> int:
        """The number of tokens of the answer so far."""
        ...


def added(settings: GenerationSettings, counted: Sequence[int], new: int) -> dict[int, float]:
    """What is added to the scores of tokens: biases, and penalties of tokens of the answer, as negative numbers.

    Args:
        counted: Tokens that penalties count; they end with the answer so far.
        new: The number of tokens of the answer so far.
    """
    found = dict(settings.logit_bias)
    if (settings.presence_penalty or settings.frequency_penalty) and new:
        for token, count in Counter(counted[len(counted) - new :]).items():
            lost = settings.presence_penalty + settings.frequency_penalty * count
            found[token] = found.get(token, 0.0) - lost
    return found


def hides_eos(settings: GenerationSettings, counted: int, new: int) -> bool:
    """Whether the answer is too short to end. counted: tokens that penalties count; new: tokens of the answer."""
    return counted < settings.min_length or new < settings.min_new_tokens


def forced_tokens(settings: GenerationSettings, new: int) -> tuple[int, ...]:
    """The only tokens that may come next; empty if any may. new: tokens of the answer so far."""
    if settings.forced_eos and new == settings.max_tokens - 1:
        return settings.forced_eos
    return (settings.forced_bos,) if new == 0 and settings.forced_bos is not None else ()


def would_repeat(counted: Sequence[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram. size: n."""
    if len(counted) + 1 < size:
        return []
    last = list(counted[len(counted) - size + 1 :])
    starts = range(len(counted) - size + 1)
    return sorted({counted[at + size - 1] for at in starts if list(counted[at : at + size - 1]) == last})
