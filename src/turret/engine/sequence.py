"""The rows of a pass, and a request that generates, between two passes: its tokens, beams, KV slots and text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turret.adapters.batch_context import BARE
from turret.engine.cache import KeyValueCache, KVSlot
from turret.engine.request import GenerationSettings, Request
from turret.engine.sampler import TokenLogprobs, process_logits
from turret.engine.structured_output import Guide
from turret.families.family import Pooling
from turret.ops.core import to_device
from turret.tasks.shapes import Answer, TokenReport, TopToken

# --- rows of a pass ---------------------------------------------------------------------------------------------------


TextTokens = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens of a row and their segments


@dataclass(frozen=True)
class Prefill:
    """A row that begins."""

    ids: Sequence[int]
    slot: int = BARE
    kv_slot: KVSlot | None = None  # for a row that generates; None for a text to classify or to embed
    pooling: Pooling | None = None  # for a text to embed
    logprobs: int | None = None  # alternatives to report with each token of the prompt; None: report nothing
    branches: Sequence[Sequence[int]] = ()  # what may follow the row, to be scored; nothing is generated
    segments: Sequence[int] | None = None  # of each token; None: all are in the first
    read: Sequence[int] | None = None  # the tokens that a head for tokens reads; None: a head reads the text
    earlier: int = 0  # tokens of the row that earlier passes have read; they are in the KV slot
    keeps: bool = True  # whether the KV slot gets its tokens too

    @property
    def classifies(self) -> bool:
        """Whether a head reads the whole text."""
        return self.keeps and self.kv_slot is None and self.pooling is None and self.read is None

    @property
    def text(self) -> TextTokens:
        """What rows have in common that the bare base computes once."""
        return tuple(self.ids), tuple(self.segments or ())

    @property
    def row(self) -> Tensor:
        """The ids (T,), or (T, 2) with the segments."""
        ids = torch.tensor(self.ids)
        return ids if self.segments is None else torch.stack([ids, torch.tensor(self.segments)], dim=1)


@dataclass(frozen=True)
class DecodeStep:
    """A row that takes one more token."""

    token: int
    slot: int
    kv_slot: KVSlot


# --- text while its tokens arrive -------------------------------------------------------------------------------------
# Which part of a text is final, and where a stop string ends it.
#
# The text is the decoded tokens, stripped unless it is raw. Later tokens may change its end, so this is held back:
#
# - white space at the end of a stripped text
# - an incomplete character
# - the possible start of a stop string, or of what the tokenizer cleans up


HALF = "�"  # decoders write this for an incomplete character
BROKEN_TOKENS = 64  # tokens without a whole character, after which their bytes are taken for broken
# They lose their space in transformers; that behind ' comes back before a stop.
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're", "' ")
CONTEXT_TOKENS = 4  # earlier tokens that decide how a token is written


class IncrementalText:
    """The final part of a growing text. `decode` makes text of tokens and strips nothing.

    cleans: as of `GenerationSettings`.
    least: tokens within whose text no stop string ends, as in vLLM.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        *,
        strip: bool = True,
        cleans: bool = False,
        least: int = 0,
    ) -> None:
        self._decode, self._stop, self._strip, self._least = decode, tuple(stop), strip, least
        self._held = (*self._stop, *(CLEANED if cleans else ()))  # their starts are held back
        self.text = ""
        self._whole = ""
        self.decoded = ""  # all tokens, also after a stop string
        self._open: int | None = None  # characters of the first `least` tokens, once they are there
        self.stopped = False

    def grow(self, tokens: Sequence[int]) -> str:
        """The part that became final. `stopped` is set if the text holds a stop string.

        Args:
            tokens: All tokens of the answer so far.
        """
        self._whole = self.decoded = self._decode(tokens)
        end = self._stops_at(tokens)
        if end is not None:
            self.stopped = True
            self._whole = self._whole[:end]
            return self.end()
        return self._extend(self._bare(self._whole[: len(self._whole) - self._open_end()]))

    def _stops_at(self, tokens: Sequence[int]) -> int | None:
        """Where the first stop string begins that ends after the first `least` tokens; None if there is none."""
        if not self._stop or len(tokens) <= self._least:
            return None
        if self._open is None:
            self._open = len(self._decode(tokens[: self._least]))
        found = [self._whole.find(each, max(0, self._open - len(each) + 1)) for each in self._stop]
        return min((at for at in found if at >= 0), default=None)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return self._extend(self._bare(self._whole))

    def _bare(self, text: str) -> str:
        return text.strip() if self._strip else text

    @property
    def lead(self) -> int:
        """The characters in front of the text that were stripped."""
        return len(self._whole) - len(self._whole.lstrip()) if self._strip else 0

    def _extend(self, text: str) -> str:
        if not text.startswith(self.text):
            return ""  # the decoder changed an earlier character; the next call returns it
        new = text[len(self.text) :]
        self.text = text
        return new

    def _open_end(self) -> int:
        """The number of characters at the end that may still change or become a stop string."""
        halves = len(self._whole) - len(self._whole.rstrip(HALF))
        longest = max(map(len, self._held), default=0)
        for count in range(min(longest - 1, len(self._whole)), 0, -1):
            if any(each.startswith(self._whole[-count:]) for each in self._held):
                return max(count, halves)
        return halves


class TokenEnds:
    """Where each token of a text ends, so that the pieces between two ends join to the text.

    An incomplete character belongs to the token that completes it. Each step decodes a few tokens only.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """before: tokens in front of the text."""
        self._decode, self._before = decode, list(before)
        self.complete = 0  # tokens up to the last one that completes a character
        self.ends: list[int] = []  # characters before the end of each token

    def grow(self, tokens: Sequence[int], text: str | None = None) -> None:
        """Add the ends of new tokens.

        Args:
            tokens: All of the text so far.
            text: All of it decoded, if it is known: then the end of the last token is exact.
        """
        last = len(tokens) - 1
        for place in range(len(self.ends), last + 1):
            end = self.ends[place - 1] if place else 0
            start = max(0, self.complete - CONTEXT_TOKENS)
            if place < last or text is None:
                near = [*(self._before if start == 0 else ()), *tokens[start : self.complete]]
                written = self._decode([*near, *tokens[self.complete : place + 1]])
                length = end + len(written) - (len(self._decode(near)) if near else 0)
            else:
                written, length = text, len(text)
            if written.endswith(HALF) and place + 1 - self.complete < BROKEN_TOKENS:
                self.ends.append(end)
                continue
            self.ends.append(max(end, length))
            self.complete = place + 1


def text_of_token(text: str, ends: Sequence[int], place: int, *, whole: bool) -> str:
    """The text of one token.

    Args:
        ends: Of all tokens.
        place: Of the token.
        whole: Whether no token follows: the last one then ends where the text ends.
    """
    first = max(0, ends[place - 1]) if place else 0
    return text[first:] if whole and place == len(ends) - 1 else text[first : max(0, ends[place])]


# --- answer text ------------------------------------------------------------------------------------------------------
# The text of an answer with its tokens: each piece has the logprobs of the tokens that end in it.
#
# The texts of the tokens join to the text, whatever was stripped from it or cut off by a stop string.


Decode = Callable[[Sequence[int]], str]
TokenTexts = Callable[[Sequence[int], Sequence[int]], list[str]]  # `Prompts.token_texts`


class AnswerText:
    """The text of one answer while its tokens come.

    Args:
        before: The tokens before the answer. A raw text is written as after them, so a leading space is kept.
    """

    def __init__(self, decode: Decode, settings: GenerationSettings, before: Sequence[int]) -> None:
        self._near = [] if settings.strip else list(before[-CONTEXT_TOKENS:])
        self._start = decode(self._near) if self._near else ""
        self._text = IncrementalText(
            self._after(decode),
            settings.stop,
            strip=settings.strip,
            cleans=settings.cleans,
            least=settings.min_new_tokens,
        )
        self._ends = None if settings.logprobs is None else TokenEnds(decode, self._near)
        self._sent, self._told = 0, 0  # characters, tokens
        self._ended = False

    def _after(self, decode: Decode) -> Decode:
        def after(tokens: Sequence[int]) -> str:
            whole = decode([*self._near, *tokens])
            return whole[len(self._start) :] if whole.startswith(self._start) else decode(tokens)

        return after if self._near else decode

    @property
    def stopped(self) -> bool:
        """Whether the text has reached a stop string."""
        return self._text.stopped

    def grow(self, tokens: Sequence[int]) -> None:
        """Decode the tokens. tokens: all of the answer so far."""
        self._text.grow(tokens)
        if self._ends is not None:
            self._ends.grow(tokens, self._text.decoded)

    def end(self) -> None:
        """No token follows."""
        self._text.end()
        self._ended = True

    def news(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], token_texts: TokenTexts
    ) -> tuple[str, list[TokenReport]]:
        """The final text that is not told yet, and the tokens that end in it. With logprobs, whole tokens only."""
        text, reports = self._text.text, list[TokenReport]()
        until = len(text)
        if self._ends is not None:
            ends = [end - self._text.lead for end in self._ends.ends]
            told = self._told
            known = len(ends) if self._ended else self._ends.complete
            while told < known and (ends[told] <= until or self._ended):
                if self.stopped and max(0, ends[told - 1] if told else 0) >= until:
                    break  # the rest belongs to the stop string
                before = [*self._near, *tokens[max(0, told - CONTEXT_TOKENS) : told]][-CONTEXT_TOKENS:]
                own = text_of_token(text, ends, told, whole=self._ended)
                reports.append(token_report(own, before, logprobs[told], token_texts))
                told += 1
            until = until if self._ended else max(0, ends[told - 1] if told else 0)
            self._told = told
        new = text[self._sent : until]
        self._sent = max(self._sent, until)
        return new, reports


def token_report(text: str, before: Sequence[int], each: TokenLogprobs, token_texts: TokenTexts) -> TokenReport:
    """One token with the most probable ones at its position. text: its own; before: the tokens before it."""
    top = [token for token, _ in each.top]
    others: list[TopToken] = [
        {"token": other, "id": token, "logprob": logprob}
        for other, (token, logprob) in zip(token_texts(before, top), each.top, strict=True)
    ]
    return {"token": text, "id": each.token, "logprob": each.logprob, "top": others}


def echo_prompt(
    ids: Sequence[int],
    prompt: Sequence[TokenLogprobs],
    settings: GenerationSettings,
    decode: Decode,
    token_texts: TokenTexts,
) -> tuple[str, list[TokenReport]]:
    """The text of a prompt, and the report of each of its tokens if logprobs are requested. The first has no logprob.

    Args:
        ids: Of the prompt.
        prompt: The logprobs of all tokens but the first.
    """
    text = decode(ids)
    if settings.logprobs is None:
        return text, []
    ends = TokenEnds(decode)
    ends.grow(ids)
    first: TokenReport = {
        "token": text_of_token(text, ends.ends, 0, whole=True),
        "id": ids[0],
        "logprob": None,
        "top": None,
    }
    rest = [
        token_report(
            text_of_token(text, ends.ends, place, whole=True),
            ids[max(0, place - CONTEXT_TOKENS) : place],
            each,
            token_texts,
        )
        for place, each in enumerate(prompt, 1)
    ]
    return text, [first, *rest]


# --- beams ------------------------------------------------------------------------------------------------------------
# Beam search for one request, step by step, with the results of transformers.
#
# The score of a finished text is the sum of its log probabilities / length ** length_penalty. The search ends when no
# unfinished text can beat the k finished ones. Source: `GenerationMixin._beam_search` of transformers.


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
            running = enumerate(self.running[: len(scores)])
            process_logits(scores, {row: (settings, [*self._before, *tokens], len(tokens)) for row, tokens in running})
        scores = scores.expand(k, -1) + to_device(torch.tensor(self._scores), scores.device)[:, None]
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


# --- sequence ---------------------------------------------------------------------------------------------------------


class RunningSequence:
    """One row that takes a token per pass, or one row per beam."""

    def __init__(
        self,
        request: Request,
        settings: GenerationSettings,
        slot: int,
        kv_slot: KVSlot | None,
        before: Sequence[int],
        guide: Guide | None = None,
    ) -> None:
        assert request.ids is not None
        self.request, self.settings, self.slot = request, settings, slot
        self.random = random.Random(settings.seed)
        self.kv_slots = [] if kv_slot is None else [kv_slot]  # none, if another program has the cache
        self.tokens: list[int] = []
        self.beams = Beams(settings, before) if settings.num_beams > 1 else None
        self.reason: str | None = None  # `finish_reason`, at the end
        self.guide = guide
        self._before = list(before)
        self._text: AnswerText | None = None
        self._logprobs: list[TokenLogprobs] = []  # of each token, if requested
        self._prompt: list[TokenLogprobs] = []  # of each token of the prompt but the first, if they are requested
        self._echoed = not settings.echo

    # --- rows ---------------------------------------------------------------------------------------------------------

    def first(self) -> Prefill:
        """The row of its first pass."""
        assert self.request.ids is not None
        wanted = self.settings.logprobs if self.settings.echo else None
        return Prefill(self.request.ids, self.slot, self.kv_slots[0], logprobs=wanted)

    def steps(self) -> list[DecodeStep]:
        """Its rows of the next pass, one per KV slot."""
        if self.beams is None:
            return [DecodeStep(self.tokens[-1], self.slot, self.kv_slots[0])]
        return [
            DecodeStep(text[-1], self.slot, kv_slot)
            for text, kv_slot in zip(self.beams.running, self.kv_slots, strict=True)
        ]

    def counted_tokens(self) -> Sequence[int]:
        """The tokens that penalties count."""
        return [*self._before, *self.tokens]

    @property
    def new(self) -> int:
        """The number of generated tokens."""
        return len(self.tokens)

    # --- a pass later -------------------------------------------------------------------------------------------------

    def read(self, prompt: Sequence[TokenLogprobs] = ()) -> None:
        """The prompt has passed. Sets `reason` if no token is to follow. prompt: its logprobs, if requested."""
        self._prompt = list(prompt)
        if self.settings.max_tokens == 0:
            self.reason = "length"

    def take(self, token: int, decode: Decode, token_texts: TokenTexts, logprobs: TokenLogprobs | None = None) -> None:
        """Add a token. Sets `reason` if it is the last one. logprobs: its own, if they are requested."""
        if token in self.settings.eos:
            self.reason = "stop"
        else:
            self.tokens.append(token)
            if logprobs is not None:
                self._logprobs.append(logprobs)
            if self.guide is not None:
                self.guide.take(token)
            if self.guide is not None and self.guide.ended:
                self.reason = "stop"
            elif len(self.tokens) >= self.settings.max_tokens:
                self.reason = "length"
        if self.settings.stop or self.request.ticket.streamed:
            self._send(self._grow(decode), decode, token_texts)

    def search(self, logits: Tensor, open_slot: Callable[[], KVSlot]) -> None:
        """Take one step of beam search. logits: (rows, V)"""
        assert self.beams is not None
        sources = self.beams.advance(logits)
        if sources is not None:
            self.kv_slots += [open_slot() for _ in range(len(sources) - len(self.kv_slots))]
            self.kv_slots[0].block.copy(self.kv_slots, [self.kv_slots[source] for source in sources])
            return
        best = list(self.beams.best)
        self.reason = "stop" if best and best[-1] in self.settings.eos else "length"
        self.tokens = best[:-1] if self.reason == "stop" else best

    def _grow(self, decode: Decode) -> AnswerText:
        """Decode all tokens. Sets `reason` if the text holds a stop string."""
        if self._text is None:
            self._text = AnswerText(decode, self.settings, self._before)
        self._text.grow(self.tokens)
        if self._text.stopped:
            self.reason = "stop"
        return self._text

    def _send(self, text: AnswerText, decode: Decode, token_texts: TokenTexts) -> None:
        """Send the part of the final text that was not sent yet. The ticket keeps it for later listeners."""
        ticket = self.request.ticket
        if not self._echoed:
            self._echoed = True
            ticket.send(*echo_prompt(self.request.ids or (), self._prompt, self.settings, decode, token_texts))
        ticket.send(*text.news(self.tokens, self._logprobs, token_texts))

    def answer(self, decode: Decode, token_texts: TokenTexts) -> Answer:
        """The answer of the request. Sends the rest of its text."""
        text = self._text or self._grow(decode)
        text.end()
        self._send(text, decode, token_texts)
        whole = self.request.ticket.whole
        answer: Answer = {
            "text": whole.text,
            "finish_reason": self.reason,
            "tokens": len(self.tokens),
            "prompt_tokens": len(self.request.ids or ()),
        }
        if self.settings.logprobs is not None:
            answer["logprobs"] = list(whole.logprobs)
        return answer

    def close(self, cache: KeyValueCache) -> None:
        """Free its KV slots."""
        for kv_slot in self.kv_slots:
            cache.close(kv_slot)
        self.kv_slots = []
