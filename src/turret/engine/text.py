"""The text of an answer while its tokens arrive: which part is final, and where a stop string ends it.

The text is the decoded tokens, stripped unless it is raw. These are held back because later tokens may change them:
white space at the end of a stripped text, an incomplete character, and the possible start of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "�"  # decoders write this for an incomplete character
BROKEN_TOKENS = 64  # tokens without a whole character, after which their bytes are taken for broken
CONTEXT_TOKENS = 4  # earlier tokens that decide how a token is written


class IncrementalText:
    """The final part of a growing text. `decode` makes text of tokens and strips nothing."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], *, strip: bool = True) -> None:
        self._decode, self._stop, self._strip = decode, tuple(stop), strip
        self._sent = ""
        self._whole = ""
        self.decoded = ""  # all tokens, also after a stop string
        self.stopped = False

    def grow(self, tokens: Sequence[int]) -> str:
        """The part that became final. `stopped` is set if the text holds a stop string.

        Args:
            tokens: All tokens of the answer so far.
        """
        self._whole = self.decoded = self._decode(tokens)
        ends = [at for at in map(self._whole.find, self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._whole = self._whole[: min(ends)]
            return self.end()
        return self._extend(self._bare(self._whole[: len(self._whole) - self._open_end()]))

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return self._extend(self._bare(self._whole))

    def _bare(self, text: str) -> str:
        return text.strip() if self._strip else text

    @property
    def lead(self) -> int:
        """The characters in front of the text that were stripped."""
        return len(self._whole) - len(self._whole.lstrip()) if self._strip else 0

    @property
    def text(self) -> str:
        """The final part so far; after `end`, the whole answer."""
        return self._sent

    def _extend(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""  # the decoder changed an earlier character; the next call returns it
        new = text[len(self._sent) :]
        self._sent = text
        return new

    def _open_end(self) -> int:
        """The number of characters at the end that may still change or become a stop string."""
        halves = len(self._whole) - len(self._whole.rstrip(HALF))
        longest = max(map(len, self._stop), default=0)
        for count in range(min(longest - 1, len(self._whole)), 0, -1):
            if any(each.startswith(self._whole[-count:]) for each in self._stop):
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


def between(text: str, ends: Sequence[int], place: int, *, whole: bool) -> str:
    """The text of one token.

    Args:
        ends: Of all tokens.
        place: Of the token.
        whole: Whether no token follows: the last one then ends where the text ends.
    """
    first = max(0, ends[place - 1]) if place else 0
    return text[first:] if whole and place == len(ends) - 1 else text[first : max(0, ends[place])]
