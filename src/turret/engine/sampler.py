"""The next token of each row: greedy or sampled, with the logits processors of transformers, in their order.

    repetition penalty, logit bias, presence and frequency penalties, no repeated n-gram, minimum length, forced tokens,
    constraint, temperature, top_k, top_p

A sample takes one number from the request's own generator, so other rows of the batch do not affect it. Reported
log probabilities are the model's own, before all of these.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from turret.engine.request import MAX_TOKENS, GenerationSettings
from turret.engine.sampling_params import SamplingParams
from turret.engine.structured_output import Guide
from turret.errors import BaseModelError, ContextLengthExceeded, DataError
from turret.ops.core import to_device
from turret.tasks.task import Task
from turret.transformer import Model, Tokenizer

# --- choice -----------------------------------------------------------------------------------------------------------
# What the choice of a token asks of a row and of its settings: numbers only, no scores.


class Row(Protocol):
    """A row as `choose` reads it."""

    settings: GenerationSettings
    random: random.Random

    def counted_tokens(self) -> Sequence[int]:
        """The tokens that penalties count; they end with the answer so far."""
        ...

    @property
    def new(self) -> int:
        """The number of tokens of the answer so far."""
        ...


def logit_offsets(settings: GenerationSettings, counted: Sequence[int], new: int) -> dict[int, float]:
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


# --- scores -----------------------------------------------------------------------------------------------------------


Counted = tuple[GenerationSettings, Sequence[int], int]  # what penalties count, and the length of the answer so far


def process_logits(scores: Tensor, rows: Mapping[int, Counted]) -> None:
    """All processors up to forced tokens: each is one operation over the tokens that it changes in all rows.

    Args:
        scores: (n, V), changed in place.
        rows: Those whose settings are not plain, by number.
    """
    V = scores.shape[1]
    seen: dict[tuple[int, int], float] = {}  # (row, token) -> its penalty
    raised: dict[tuple[int, int], float] = {}
    hidden: list[tuple[int, int]] = []
    forced: list[tuple[int, int]] = []
    for number, (settings, counted, new) in rows.items():
        if settings.repetition_penalty != 1.0:
            seen |= {(number, token): settings.repetition_penalty for token in counted if token < V}
        raised |= {(number, token): amount for token, amount in logit_offsets(settings, counted, new).items()}
        if settings.no_repeat_ngram_size:
            hidden += [(number, token) for token in would_repeat(counted, settings.no_repeat_ngram_size)]
        if len(counted) < settings.min_length or new < settings.min_new_tokens:  # too short to end
            hidden += [(number, token) for token in settings.eos]
        forced += [(number, token) for token in forced_tokens(settings, new)]
    if not seen and not raised and not hidden and not forced:
        return
    places = to_device(torch.tensor([*seen, *raised, *hidden, *forced]), scores.device)  # one copy for all
    own_places, raises, hides, forces = torch.split(places, [len(seen), len(raised), len(hidden), len(forced)])
    if seen:
        penalty, at = to_device(torch.tensor(list(seen.values())), scores.device), own_places.unbind(1)
        found = scores[at]
        scores[at] = torch.where(found < 0, found * penalty, found / penalty)
    if raised:
        scores[raises.unbind(1)] += to_device(torch.tensor(list(raised.values())), scores.device)
    if hidden:
        scores[hides.unbind(1)] = -torch.inf
    if forced:
        row_of, token_of = forces.unbind(1)
        scores[row_of] = -torch.inf
        scores[row_of, token_of] = 0.0


def draw_together(scores: Tensor, rows: Sequence[Row]) -> Tensor:
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
    temperature, point, most, mass = to_device(torch.tensor(given, dtype=torch.float64), scores.device).unbind(1)
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
    # A whole row keeps its order.
    return torch.where(to_device(whole, scores.device), _at(weights, point), sorted_tokens)


def _at(weights: Tensor, point: Tensor) -> Tensor:
    """The place in each row that a number from 0 to 1 falls on: (n,). weights: (n, V), point: (n,)"""
    summed = weights.cumsum(-1)
    found = torch.searchsorted(summed, (point * summed[:, -1])[:, None], right=True)[:, 0]
    last = (summed < summed[:, -1:]).sum(-1)  # that has a weight, if rounding puts the point behind it; 0 with a NaN
    return torch.minimum(found, last)


# --- decode -----------------------------------------------------------------------------------------------------------


LOWEST = -9999.0  # reported for log 0, which JSON has no number for
LOOKED_AT = 64  # tokens that top_p sorts first; 8x more each time if they do not reach it
# Settings of generation_config.json that are not implemented, and their values that change nothing.
NOT_DONE: dict[str, tuple[float | None, ...]] = {
    "guidance_scale": (None, 1, 1.0),
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
}


def base_settings(model: Model, tokenizer: Tokenizer) -> GenerationSettings:
    """The settings of the base's generation_config.json. Raises BaseModelError for one that is not implemented."""
    config = getattr(model, "generation_config", None)
    eos = dict.fromkeys([*_ids(getattr(config, "eos_token_id", None)), *_ids(tokenizer.eos_token_id)])
    cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    if config is None:
        return GenerationSettings(MAX_TOKENS, tuple(eos), cleans=cleans)
    for name, neutral in NOT_DONE.items():
        if getattr(config, name, None) not in neutral:
            raise BaseModelError(
                f"the base's generation_config.json sets {name}, which this engine does not support: remove it there"
            )
    forced_bos = config.forced_bos_token_id if model.config.is_encoder_decoder else None
    return GenerationSettings(
        MAX_TOKENS,
        tuple(eos),
        repetition_penalty=float(config.repetition_penalty or 1.0),
        no_repeat_ngram_size=int(config.no_repeat_ngram_size or 0),
        min_length=int(config.min_length or 0),
        min_new_tokens=int(config.min_new_tokens or 0),
        forced_bos=None if forced_bos is None else int(forced_bos),
        forced_eos=tuple(_ids(config.forced_eos_token_id)),
        length_penalty=float(1.0 if config.length_penalty is None else config.length_penalty),
        early_stopping=config.early_stopping or False,
        cleans=cleans,
    )


def resolve_settings(
    options: SamplingParams, own: GenerationSettings, task: Task | None, *, room: int, vocabulary: int
) -> GenerationSettings:
    """The settings of a request: its options, else those of the adapter's task, else those of the base.

    Args:
        options: Of the request.
        own: Of the base.
        task: Of the adapter; None for the bare base.
        room: Tokens that the answer may have at most.
        vocabulary: Size of the vocabulary.

    Raises:
        DataError: For options that do not fit.
    """
    if room < 1 and options.max_tokens != 0:
        raise ContextLengthExceeded(
            "the prompt leaves no room for an answer: shorten it, or raise the engine's max_tokens"
        )
    most, beams, eos = own.max_tokens, 1, own.eos
    if task is not None:
        most, beams = int(task.generation["max_new_tokens"]), int(task.generation["num_beams"])
        eos = (int(task.generation["eos_token_id"]),)
    if options.max_tokens is not None and options.max_tokens > room:
        raise ContextLengthExceeded(
            f"max_tokens = {options.max_tokens}: the prompt leaves room for {room}, ask for no more"
        )
    if options.samples or options.constraint is not None or options.echo:
        beams = 1
    if unknown := next((token for token, _ in options.logit_bias if not 0 <= token < vocabulary), None):
        raise DataError(f"logit_bias of token {unknown}: expected a token from 0 to {vocabulary - 1}")
    if options.constraint is not None:  # what would ban or force tokens against it
        own = replace(own, no_repeat_ngram_size=0, min_length=0, min_new_tokens=0, forced_bos=None, forced_eos=())
    beams = options.num_beams or beams
    if options.logprobs is not None and beams > 1:
        raise DataError(f"logprobs need num_beams = 1, and this answer has {beams} beams: set num_beams = 1")
    if 2 * beams > vocabulary:
        raise DataError(f"num_beams = {beams}: a vocabulary of {vocabulary} allows {vocabulary // 2}")
    penalty = options.repetition_penalty
    return replace(
        own,
        max_tokens=min(most, room) if options.max_tokens is None else options.max_tokens,
        eos=eos,
        temperature=options.effective_temperature,
        top_k=options.top_k,
        top_p=None if options.top_p is None or options.top_p >= 1.0 else options.top_p,
        # Python takes -1 and 1 for the same seed
        seed=random.SystemRandom().getrandbits(63) if options.seed is None else options.seed % 2**64,
        stop=options.stop,
        num_beams=beams,
        logprobs=options.logprobs,
        min_new_tokens=own.min_new_tokens if options.min_tokens is None else options.min_tokens,
        repetition_penalty=own.repetition_penalty if penalty is None else penalty,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        logit_bias=options.logit_bias,
        strip=options.strip,
        echo=options.echo,
    )


def choose(scores: Tensor, rows: Sequence[Row], guides: Mapping[int, Guide] | None = None) -> list[int | None]:
    """The next token of each row; None if its scores are not finite. On a GPU the CPU waits once for all rows.

    Args:
        scores: (n, V) float32, changed in place.
        guides: The constraints of rows, by number.
    """
    guides = guides or {}
    finite = torch.isfinite(scores.sum(-1))
    counted = {
        number: (row.settings, row.counted_tokens(), row.new)
        for number, row in enumerate(rows)
        if not row.settings.plain
    }
    process_logits(scores, counted)
    for number, guide in guides.items():
        guide.mask(scores[number])
    tokens = scores.argmax(-1)
    drawn = [number for number, row in enumerate(rows) if row.settings.temperature > 0.0]
    if drawn and scores.is_cuda:
        index = to_device(torch.tensor(drawn), scores.device)
        own = scores if len(drawn) == len(rows) else scores[index]
        tokens[index] = draw_together(own, [rows[number] for number in drawn])
    else:
        for number in drawn:
            row, allowed = rows[number], guides[number].allowed_tokens() if number in guides else None
            tokens[number] = draw(scores[number], row.settings, row.random, allowed)
    return [None if token < 0 else token for token in torch.where(finite, tokens, -1).tolist()]


class TokenLogprobs(NamedTuple):
    """A token of an answer, its log probability, and the most probable tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), the most probable first


def token_logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    """The report of one token and of the `count` most probable ones. logprobs: (V,)"""
    values, ids = logprobs.clamp(min=LOWEST).topk(min(count, len(logprobs)))
    return TokenLogprobs(
        token, max(float(logprobs[token]), LOWEST), tuple(zip(ids.tolist(), values.tolist(), strict=True))
    )


def draw(scores: Tensor, settings: GenerationSettings, generator: random.Random, allowed: Tensor | None = None) -> int:
    """Sample a token, after temperature, top_k and top_p.

    Args:
        scores: (V,)
        allowed: The only tokens to draw from, (n,) int64, so that others cost no time; None or none: all.
    """
    ids = allowed if allowed is not None and len(allowed) else None
    scores = (scores if ids is None else scores[ids]).double()
    scores = (scores - scores.max()) / settings.temperature
    if settings.top_k is not None and settings.top_k < len(scores):
        scores, places = scores.topk(settings.top_k)
        ids = places if ids is None else ids[places]
    weights = scores.exp()
    probabilities = weights / weights.sum()
    if settings.top_p is not None:
        probabilities, places = _nucleus(probabilities, settings.top_p)
        ids = places if ids is None else ids[places]
    summed = probabilities.cumsum(0)
    place = int(torch.searchsorted(summed, generator.random() * summed[-1].item(), right=True))
    if place == len(summed):  # the sum was rounded: the last token that has a probability
        place = int((summed < summed[-1]).sum())
    return place if ids is None else int(ids[place])


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most probable tokens whose probabilities sum to top_p: (probabilities, places), sorted."""
    looked = LOOKED_AT
    while True:
        values, places = probabilities.topk(min(looked, len(probabilities)))
        before = values.cumsum(0) - values
        if looked >= len(probabilities) or float(before[-1]) >= top_p:
            count = max(1, int((before < top_p).sum()))
            return values[:count], places[:count]
        looked *= 8


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(each) for each in value]
