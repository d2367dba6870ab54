"""The next token of every row at once, for a GPU: the CPU waits once for all rows, not once for each number.

The formulas are those of `decode`, which is the reference: for the same settings and seed a row gets the same token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from turret.engine.request import GenerationSettings
from turret.engine.structured_output import Guide

# --- choice -----------------------------------------------------------------------------------------------------------
# What the choice of a token asks of a row and of its settings: numbers only, no scores.


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


# --- GPU choice ------------------------------------------------------------------------------------------------------


def choose_together(scores: Tensor, rows: Sequence[Row], guides: Mapping[int, Guide] | None = None) -> list[int | None]:
    """The next token of each row; None if its scores are not finite.

    Args:
        scores: (n, V) float32, changed in place.
        guides: The constraints of rows, by number.
    """
    finite = torch.isfinite(scores.sum(-1))
    _adjust(scores, rows)
    for number, guide in (guides or {}).items():
        guide.mask(scores[number])
    tokens = scores.argmax(-1)
    drawn = [place for place, row in enumerate(rows) if row.settings.temperature > 0.0]
    if drawn:
        index = torch.tensor(drawn, device=scores.device)
        tokens[index] = _draw(scores if len(drawn) == len(rows) else scores[index], [rows[place] for place in drawn])
    return [None if token < 0 else token for token in torch.where(finite, tokens, -1).tolist()]


def _adjust(scores: Tensor, rows: Sequence[Row]) -> None:
    """All processors up to forced tokens: each is one operation over the tokens that it changes in all rows."""
    V = scores.shape[1]
    seen: list[tuple[int, int]] = []  # (row, token)
    penalties: list[float] = []
    raised: list[tuple[int, int]] = []
    amounts: list[float] = []
    hidden: list[tuple[int, int]] = []
    forced: list[tuple[int, int]] = []
    for place, row in enumerate(rows):
        settings = row.settings
        if settings.plain:
            continue
        counted = row.counted()
        if settings.repetition_penalty != 1.0:
            own = sorted({token for token in counted if token < V})
            seen += [(place, token) for token in own]
            penalties += [settings.repetition_penalty] * len(own)
        given = added(settings, counted, row.new)
        raised += [(place, token) for token in given]
        amounts += given.values()
        if settings.no_repeat_ngram_size:
            hidden += [(place, token) for token in would_repeat(counted, settings.no_repeat_ngram_size)]
        if hides_eos(settings, len(counted), row.new):
            hidden += [(place, token) for token in settings.eos]
        forced += [(place, token) for token in forced_tokens(settings, row.new)]
    if not seen and not raised and not hidden and not forced:
        return
    places = torch.tensor([*seen, *raised, *hidden, *forced]).to(scores.device)  # one copy for all
    own_places, raises, hides, forces = torch.split(places, [len(seen), len(raised), len(hidden), len(forced)])
    if seen:
        penalty, at = torch.tensor(penalties).to(scores.device), own_places.unbind(1)
        found = scores[at]
        scores[at] = torch.where(found < 0, found * penalty, found / penalty)
    if raised:
        scores[raises.unbind(1)] += torch.tensor(amounts).to(scores.device)
    if hidden:
        scores[hides.unbind(1)] = -torch.inf
    if forced:
        row_of, token_of = forces.unbind(1)
        scores[row_of] = -torch.inf
        scores[row_of, token_of] = 0.0


def _draw(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """A sample of every row, (n,) int64, after temperature, top_k and top_p. scores: (n, V)"""
    V = scores.shape[1]
    given = [
        (
            own.temperature,
            row.random.random(),
            V if own.top_k is None else own.top_k,
            2.0 if own.top_p is None else own.top_p,
        )
        for row, own in ((row, row.settings) for row in rows)
    ]
    temperature, point, most, mass = torch.tensor(given, dtype=torch.float64).to(scores.device).unbind(1)
    scores = scores.double()
    weights = ((scores - scores.amax(-1, keepdim=True)) / temperature[:, None]).exp()
    if all(row.settings.top_k is None and row.settings.top_p is None for row in rows):
        return _at(weights, point)
    ordered, ids = weights.sort(descending=True)
    ordered = ordered * (torch.arange(V, device=scores.device) < most[:, None])
    probabilities = ordered / ordered.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    inside = before < mass[:, None]
    inside[:, 0] = True
    sorted_tokens = ids.gather(1, _at(probabilities * inside, point)[:, None])[:, 0]
    whole = torch.tensor([row.settings.top_k is None and row.settings.top_p is None for row in rows])
    return torch.where(whole.to(scores.device), _at(weights, point), sorted_tokens)  # a whole row keeps its order


def _at(weights: Tensor, point: Tensor) -> Tensor:
    """The place in each row that a number from 0 to 1 falls on: (n,). weights: (n, V), point: (n,)"""
    summed = weights.cumsum(-1)
    found = torch.searchsorted(summed, (point * summed[:, -1])[:, None], right=True)[:, 0]
    last = ((weights > 0).sum(-1) - 1).clamp(min=0)  # if rounding puts the point behind it; a NaN has no weight
    return torch.minimum(found, last)
