"""The text of an answer with its tokens: each piece has the logprobs of the tokens that end in it.

The texts of the tokens join to the text, whatever was stripped from it or cut off by a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from turret.engine.decode import TokenLogprobs
from turret.engine.request import GenerationSettings
from turret.engine.text import CONTEXT_TOKENS, IncrementalText, TokenEnds, between
from turret.json_types import JsonObject

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
        self._text = IncrementalText(self._after(decode), settings.stop, strip=settings.strip)
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
    ) -> tuple[str, list[JsonObject]]:
        """The final text that is not told yet, and the tokens that end in it. With logprobs, whole tokens only."""
        text, reports = self._text.text, list[JsonObject]()
        until = len(text)
        if self._ends is not None:
            ends = [end - self._text.lead for end in self._ends.ends]
            told = self._told
            known = len(ends) if self._ended else self._ends.complete
            while told < known and (ends[told] <= until or self._ended):
                if self.stopped and max(0, ends[told - 1] if told else 0) >= until:
                    break  # the rest belongs to the stop string
                before = [*self._near, *tokens[max(0, told - CONTEXT_TOKENS) : told]][-CONTEXT_TOKENS:]
                own = between(text, ends, told, whole=self._ended)
                reports.append(report(own, before, logprobs[told], token_texts))
                told += 1
            until = until if self._ended else max(0, ends[told - 1] if told else 0)
            self._told = told
        new = text[self._sent : until]
        self._sent = max(self._sent, until)
        return new, reports


def report(text: str, before: Sequence[int], each: TokenLogprobs, token_texts: TokenTexts) -> JsonObject:
    """One token with the most probable ones at its position. text: its own; before: the tokens before it."""
    top = [token for token, _ in each.top]
    others = [
        {"token": other, "id": token, "logprob": logprob}
        for other, (token, logprob) in zip(token_texts(before, top), each.top, strict=True)
    ]
    return {"token": text, "id": each.token, "logprob": each.logprob, "top": others}


def echoed(
    ids: Sequence[int],
    prompt: Sequence[TokenLogprobs],
    settings: GenerationSettings,
    decode: Decode,
    token_texts: TokenTexts,
) -> tuple[str, list[JsonObject]]:
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
    first: JsonObject = {"token": between(text, ends.ends, 0, whole=True), "id": ids[0], "logprob": None, "top": None}
    rest = [
        report(
            between(text, ends.ends, place, whole=True), ids[max(0, place - CONTEXT_TOKENS) : place], each, token_texts
        )
        for place, each in enumerate(prompt, 1)
    ]
    return text, [first, *rest]
