"""The text of an answer while its tokens arrive: which part is final, and where a stop string ends it.

The text is the decoded tokens, stripped. These are held back because later tokens may change them: white space at the
end, an incomplete character, and the possible start of a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "�"  # decoders write this for an incomplete character


class IncrementalText:
    """The final part of a growing text. `decode` makes text of tokens and strips nothing."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._sent = ""
        self._whole = ""
        self.stopped = False

    def grow(self, tokens: Sequence[int]) -> str:
        """The part that became final. `stopped` is set if the text holds a stop string.

        Args:
            tokens: All tokens of the answer so far.
        """
        self._whole = self._decode(tokens)
        ends = [at for at in map(self._whole.find, self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._whole = self._whole[: min(ends)]
            return self.end()
        return self._extend(self._whole[: len(self._whole) - self._open_end()].strip())

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return self._extend(self._whole.strip())

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
