"""The first tokens of long texts, read from their beginnings alone: the ids that the whole text would begin with.

A tokenizer normalizes a text, splits it into words, and makes tokens of each word by itself. So the tokens of a text's
beginning are those of the whole text up to its last few words, which more characters could change. Where too few
tokens are settled so, four times as many characters are read, and at the end the whole text: then some of its words
are endless, or its characters make hardly any token (blanks, say).

Within one endless word, tokens are settled by this: in BPE and in Unigram, where the tokens of a word w have a boundary
at p, the tokens before it are those of w[:p] alone. (BPE: no merge crossed p, so the merges before it are the same.
Unigram: the best way to p is a part of the best way.) No token is longer than L characters, so w has a boundary at one
of any L positions in a row: what the tokens of all these w[:p] have in common at their beginning, w begins with.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

CHARACTERS = 16  # a token, that are read at first
SPARE = 64  # tokens, that are read at first beyond those wanted
GROWTH = 4
WORDS = 4  # at the end of a beginning, that more characters could change


class Beginnings:
    """The first tokens of texts, by one tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[str], count: int, settings: Mapping[str, Any]) -> list[list[int]]:
        """Ids without special tokens, for each text at least the first `count` of those that it has.

        settings: of the tokenizer's call.
        """
        found: list[list[int]] = [[]] * len(texts)
        read, left = CHARACTERS * (count + SPARE), list(range(len(texts)))
        while left:
            ends = [_end(texts[i], read) if self._tokenizer.is_fast else len(texts[i]) for i in left]
            coded = self._tokenizer(
                [texts[i][:end] for i, end in zip(left, ends, strict=True)],
                add_special_tokens=False,
                verbose=False,
                padding=False,
                **settings,
            )
            open_still = []
            for place, (i, end) in enumerate(zip(left, ends, strict=True)):
                found[i] = list(coded["input_ids"][place])
                if end < len(texts[i]):
                    settled = self._settled(texts[i], end, coded.encodings[place], count)
                    if settled is None:
                        open_still.append(i)
                    else:
                        found[i] = settled
            left, read = open_still, GROWTH * read
        return found

    def _settled(self, text: str, end: int, encoding: Any, count: int) -> list[int] | None:
        """The first `count` tokens of the text, where text[:end] tells them."""
        ids, words = list(encoding.ids), encoding.word_ids
        if len(ids) >= count and _later(words, count - 1) >= WORDS:
            # A special token of the tokenizer may be torn here, which takes the blanks before it; digits may be grouped
            # from the end of their number.
            after = text[encoding.offsets[count - 1][1] : max(0, end - self._longest_special)]
            if any(not each.isspace() for each in after) and any(not each.isdigit() for each in after):
                return ids[:count]
        first = next((place for place, word in enumerate(words) if word == words[-1]), 0) if ids else 0
        whole = ids[:first]  # of the words before the last one
        if first < len(ids) and len(whole) < count and end - encoding.offsets[first][0] > 2 * self._longest:
            more = self._in_word(text[encoding.offsets[first][0] : end], ids[first:], count - first, len(text))
            return None if more is None else whole + more
        return None

    def _in_word(self, text: str, ids: list[int], count: int, budget: int) -> list[int] | None:
        """The first `count` tokens of a word that begins with this text, where it tells them at little cost.

        ids: of the text. budget: characters; an eighth of them may be read here.
        """
        word = self._word(text, ids)
        size = CHARACTERS // 4 * count + 2 * self._longest
        while word is not None and size * self._longest * 8 <= budget:
            tokens = self._common(word[:size])
            if len(tokens) >= count:
                return tokens[:count]
            if size >= len(word):
                return None
            size *= GROWTH
        return None

    def _common(self, word: str) -> list[int]:
        """What any word that goes on from this one begins with."""
        model = self._core.model
        ends = range(max(1, len(word) - self._longest + 1), len(word) + 1)
        ways = [[token.id for token in model.tokenize(word[:end])] for end in ends]
        return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*ways, strict=False))]

    def _word(self, text: str, ids: list[int]) -> str | None:
        """The text as the tokenizer's model reads it, where it is one word to a model that works as said above."""
        core, model = self._core, self._core.model
        kind = type(model).__name__
        if (
            kind not in ("BPE", "Unigram")
            or getattr(model, "dropout", None)
            or getattr(model, "end_of_word_suffix", None)
        ):
            return None
        if core.normalizer is not None:
            text = core.normalizer.normalize_str(text)
        pieces = (
            [text] if core.pre_tokenizer is None else [each for each, _ in core.pre_tokenizer.pre_tokenize_str(text)]
        )
        if len(pieces) != 1 or [token.id for token in model.tokenize(pieces[0])] != ids:
            return None  # it is not read as it was behind the words before it
        return pieces[0]

    @property
    def _core(self) -> Any:
        return self._tokenizer.backend_tokenizer

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token, as the model writes it."""
        return max(map(len, self._core.get_vocab()), default=1)

    @cached_property
    def _longest_special(self) -> int:
        return max((len(token.content) for token in self._core.get_added_tokens_decoder().values()), default=0)


def _later(words: Sequence[int | None], place: int) -> int:
    """How many words begin after the one that this token belongs to."""
    return len({word for word in words[place:] if word is not None and word != words[place]})


def _end(text: str, read: int) -> int:
    """Where a beginning of about so many characters ends; the text's end where that saves little."""
    if len(text) <= 2 * read:
        return len(text)
    end = read
    while end < 2 * read and _joins(text[end]):
        end += 1
    return end if end < 2 * read else len(text)


def _joins(character: str) -> bool:
    """Whether a character may become one with that before it: accents, and vowels and ends of Korean syllables."""
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"
