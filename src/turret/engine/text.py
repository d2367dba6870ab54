"""The text of an answer while it grows: what is settled, and where a stop string ends it. Knows characters only.

The answer's text is the decoded tokens without blanks around them. A piece is settled when nothing that may follow can
take it back: blanks at the end, half a character, and what may be the beginning of a stop string are held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "�"  # what a decoder writes for a character that is not whole yet


class IncrementalText:
    """decode: tokens -> text, blanks included."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._sent = ""
        self._whole = ""
        self.stopped = False

    def grow(self, tokens: Sequence[int]) -> str:
        """What is settled anew, with these as all tokens so far; `stopped` tells whether a stop string is in them."""
        self._whole = self._decode(tokens)
        ends = [at for at in map(self._whole.find, self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._whole = self._whole[: min(ends)]
            return self.end()
        return self._settle(self._whole[: len(self._whole) - self._held()].strip())

    def end(self) -> str:
        """The rest of the text: nothing follows."""
        return self._settle(self._whole.strip())

    @property
    def text(self) -> str:
        """All that was settled: after `end`, the answer."""
        return self._sent

    def _settle(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""  # the decoder took something back; it comes with what follows
        new = text[len(self._sent) :]
        self._sent = text
        return new

    def _held(self) -> int:
        """Characters at the end that may still change or become a stop string."""
        halves = len(self._whole) - len(self._whole.rstrip(HALF))
        longest = max(map(len, self._stop), default=0)
        for count in range(min(longest - 1, len(self._whole)), 0, -1):
            if any(each.startswith(self._whole[-count:]) for each in self._stop):
                return max(count, halves)
        return halves
