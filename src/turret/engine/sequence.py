"""One generating request between two passes: its tokens, its lanes, its text, and when it is over.

Knows lanes, choices and texts. Refuses to know which other rows share its passes, threads and queues.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from turret.engine.beams import Beams
from turret.engine.cache import KeyValueCache, KVSlot
from turret.engine.decode import GenerationSettings, TokenLogprobs, told
from turret.engine.request import Request
from turret.engine.runner import DecodeStep, Prefill
from turret.engine.text import IncrementalText

Decode = Callable[[Sequence[int]], str]
Words = Callable[[Sequence[int], Sequence[int]], list[str]]  # what each of some tokens is behind others


class RunningSequence:
    """A row that takes a token a pass, or as many rows as it has beams."""

    def __init__(
        self, request: Request, settings: GenerationSettings, slot: int, kv_slot: KVSlot, before: Sequence[int]
    ) -> None:
        assert request.ids is not None
        self.request, self.settings, self.slot = request, settings, slot
        self.random = random.Random(settings.seed)
        self.kv_slots = [kv_slot]
        self.tokens: list[int] = []
        self.beams = Beams(settings, before) if settings.num_beams > 1 else None
        self.reason: str | None = None  # why it is over
        self._before = list(before)
        self._text: IncrementalText | None = None
        self._told: list[TokenLogprobs] = []  # a token, where they are wanted

    # --- rows ---------------------------------------------------------------------------------------------------------

    def first(self) -> Prefill:
        assert self.request.ids is not None
        return Prefill(self.request.ids, self.slot, self.kv_slots[0])

    def steps(self) -> list[DecodeStep]:
        """A row a lane."""
        if self.beams is None:
            return [DecodeStep(self.tokens[-1], self.slot, self.kv_slots[0])]
        return [
            DecodeStep(text[-1], self.slot, kv_slot)
            for text, kv_slot in zip(self.beams.running, self.kv_slots, strict=True)
        ]

    def counted(self) -> Sequence[int]:
        return [*self._before, *self.tokens]

    @property
    def new(self) -> int:
        return len(self.tokens)

    # --- a pass later -------------------------------------------------------------------------------------------------

    def take(self, token: int, decode: Decode, logprobs: Tensor | None = None) -> None:
        """One more token; sets `reason` where it is the last. logprobs: (V,), where they are to be told."""
        if token in self.settings.eos:
            self.reason = "stop"
        else:
            self.tokens.append(token)
            if logprobs is not None:
                self._told.append(told(logprobs, token, self.settings.logprobs or 0))
            if len(self.tokens) >= self.settings.max_tokens:
                self.reason = "length"
        if self.settings.stop or self.request.ticket.heard:
            self._say(decode)

    def search(self, logits: Tensor, cache: KeyValueCache, open_lane: Callable[[], KVSlot]) -> None:
        """One more step of all beams. logits: (rows, V)"""
        assert self.beams is not None
        sources = self.beams.advance(logits)
        if sources is not None:
            self.kv_slots += [open_lane() for _ in range(len(sources) - len(self.kv_slots))]
            self.kv_slots[0].block.copy(self.kv_slots, [self.kv_slots[source] for source in sources])
            return
        best = list(self.beams.best)
        self.reason = "stop" if best and best[-1] in self.settings.eos else "length"
        self.tokens = best[:-1] if self.reason == "stop" else best

    def _say(self, decode: Decode) -> None:
        if self._text is None:
            self._text = IncrementalText(decode, self.settings.stop)
        self._text.grow(self.tokens)
        if self._text.stopped:
            self.reason = "stop"
        self._tell(self._text)

    def _tell(self, text: IncrementalText) -> None:
        """What is settled and was not said yet, to those who listen now or will: the ticket keeps it."""
        ticket = self.request.ticket
        ticket.say(text.text[ticket.said :])

    def answer(self, decode: Decode, words: Words) -> dict[str, Any]:
        """What the request gets, all of it said."""
        if self._text is None:
            self._text = IncrementalText(decode, self.settings.stop)
            self._text.grow(self.tokens)
            if self._text.stopped:
                self.reason = "stop"
        self._text.end()
        self._tell(self._text)
        said: dict[str, Any] = {
            "text": self._text.text,
            "finish_reason": self.reason,
            "tokens": len(self.tokens),
            "prompt_tokens": len(self.request.ids or ()),
        }
        if self.settings.logprobs is not None:
            said["logprobs"] = [self._in_words(place, each, words) for place, each in enumerate(self._told)]
        return said

    def _in_words(self, place: int, each: TokenLogprobs, words: Words) -> dict[str, Any]:
        tokens, logprobs = zip((each.token, each.logprob), *each.top, strict=True)
        texts = words(self.tokens[:place], tokens)
        own, *top = [
            {"token": text, "id": token, "logprob": logprob}
            for text, token, logprob in zip(texts, tokens, logprobs, strict=True)
        ]
        return {**own, "top": top}

    def close(self, cache: KeyValueCache) -> None:
        for kv_slot in self.kv_slots:
            cache.close(kv_slot)
        self.kv_slots = []
