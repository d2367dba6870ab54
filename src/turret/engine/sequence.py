"""A request that generates, between two passes: its tokens, beams, KV slots and text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import Tensor

from turret.engine.answer_text import AnswerText, Decode, TokenTexts, echoed
from turret.engine.beams import Beams
from turret.engine.cache import KeyValueCache, KVSlot
from turret.engine.decode import TokenLogprobs, token_logprobs
from turret.engine.guide import Guide
from turret.engine.request import Answer, GenerationSettings, Request
from turret.engine.runner import DecodeStep, Prefill


class RunningSequence:
    """One row that takes a token per pass, or one row per beam."""

    def __init__(
        self,
        request: Request,
        settings: GenerationSettings,
        slot: int,
        kv_slot: KVSlot,
        before: Sequence[int],
        guide: Guide | None = None,
    ) -> None:
        assert request.ids is not None
        self.request, self.settings, self.slot = request, settings, slot
        self.random = random.Random(settings.seed)
        self.kv_slots = [kv_slot]
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

    def counted(self) -> Sequence[int]:
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

    def take(self, token: int, decode: Decode, token_texts: TokenTexts, logprobs: Tensor | None = None) -> None:
        """Add a token. Sets `reason` if it is the last one. logprobs: (V,), if they are requested."""
        if token in self.settings.eos:
            self.reason = "stop"
        else:
            self.tokens.append(token)
            if logprobs is not None:
                self._logprobs.append(token_logprobs(logprobs, token, self.settings.logprobs or 0))
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
            ticket.send(*echoed(self.request.ids or (), self._prompt, self.settings, decode, token_texts))
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
