"""From texts to token ids, many at once.

A text is tokenized without special tokens. Those that the tokenizer puts around a text are determined once and added
here, so that a cut never removes a special token or an instruction.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from turret.errors import BaseModelError
from turret.json_types import JsonObject
from turret.transformer import BatchEncoding, TextEncoding, Tokenizer

if TYPE_CHECKING:
    import tokenizers


# --- first tokens -----------------------------------------------------------------------------------------------------
# The first tokens of long texts, computed from the start of each text alone.
#
# A tokenizer normalizes a text, splits it into words, and splits each word into tokens independently. So the tokens of
# the first characters equal those of the whole text, except in the last few words, which more characters could change.
# If too few tokens are certain, four times as many characters are read, up to the whole text. That happens if a word
# is very long, or if many characters make no token (blanks, for example).
#
# Within one very long word, BPE and Unigram give a second rule: if the tokens of a word w have a boundary at p, then
# the tokens before p are those of w[:p]. (BPE: no merge crossed p, so the merges before p are the same. Unigram: a
# part of the best segmentation is the best segmentation of that part.) No token is longer than L characters, so w has
# a boundary at one of any L consecutive positions. The tokens that all these w[:p] have in common at their start are
# therefore the first tokens of w.


CHARACTERS = 16  # read first for each token
SPARE = 64  # tokens that are read first in addition to those that are needed
GROWTH = 4
WORDS = 4  # at the end of the characters read, which more characters could change


def encode_plain(tokenizer: Tokenizer, texts: Sequence[str], settings: Mapping[str, bool]) -> BatchEncoding:
    """Texts without special tokens. settings: further arguments of the tokenizer's call."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False, padding=False, **settings)


class FirstTokens:
    """The first tokens of texts, by one tokenizer of transformers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[str], count: int, settings: Mapping[str, bool]) -> list[list[int]]:
        """The ids of each text without special tokens: at least the first `count`, or all if there are fewer.

        settings: further arguments of the tokenizer's call.
        """
        found: list[list[int]] = [[]] * len(texts)
        read, left = CHARACTERS * (count + SPARE), list(range(len(texts)))
        while left:
            ends = [_end(texts[i], read) if self._tokenizer.is_fast else len(texts[i]) for i in left]
            starts = [texts[i][:end] for i, end in zip(left, ends, strict=True)]
            encoded = encode_plain(self._tokenizer, starts, settings)
            undecided = []
            for place, (i, end) in enumerate(zip(left, ends, strict=True)):
                found[i] = list(encoded["input_ids"][place])
                if end < len(texts[i]):
                    certain = self._certain(texts[i], end, encoded.encodings[place], count)
                    if certain is None:
                        undecided.append(i)
                    else:
                        found[i] = certain
            left, read = undecided, GROWTH * read
        return found

    def _certain(self, text: str, end: int, encoding: tokenizers.Encoding, count: int) -> list[int] | None:
        """The first `count` tokens of the text, or None if text[:end] does not determine them."""
        ids, words = list(encoding.ids), encoding.word_ids
        if len(ids) >= count and _later(words, count - 1) >= WORDS:
            # text[:end] may cut a special token, which would take the blanks before it. Digits may be grouped from the
            # end of their number.
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
        """The first `count` tokens of the word that begins with `text`, or None if they are uncertain or too costly.

        ids: the tokens of `text`. budget: characters; an eighth of them may be read here.
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
        """The first tokens of every word that begins with `word`."""
        model = self._backend.model
        ends = range(max(1, len(word) - self._longest + 1), len(word) + 1)
        ways = [[token.id for token in model.tokenize(word[:end])] for end in ends]
        return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*ways, strict=False))]

    def _word(self, text: str, ids: list[int]) -> str | None:
        """The normalized text, or None if it is not one word to a model that follows the second rule above."""
        backend, model = self._backend, self._backend.model
        plain = not (getattr(model, "dropout", None) or getattr(model, "end_of_word_suffix", None))
        if type(model).__name__ not in ("BPE", "Unigram") or not plain:
            return None
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        splitter = backend.pre_tokenizer
        pieces = [text] if splitter is None else [piece for piece, _ in splitter.pre_tokenize_str(text)]
        if len(pieces) != 1 or [token.id for token in model.tokenize(pieces[0])] != ids:
            return None  # it is tokenized differently after the words before it
        return pieces[0]

    @property
    def _backend(self) -> tokenizers.Tokenizer:
        return self._tokenizer.backend_tokenizer

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token, as the model writes it."""
        return max(map(len, self._backend.get_vocab()), default=1)

    @cached_property
    def _longest_special(self) -> int:
        return max((len(token.content) for token in self._backend.get_added_tokens_decoder().values()), default=0)


def _later(words: Sequence[int | None], place: int) -> int:
    """How many words begin after the word of this token."""
    return len({word for word in words[place:] if word is not None and word != words[place]})


def _end(text: str, read: int) -> int:
    """Where to cut a text after about `read` characters. The text's end if a cut would save little."""
    if len(text) <= 2 * read:
        return len(text)
    end = read
    while end < 2 * read and _joins(text[end]):
        end += 1
    return end if end < 2 * read else len(text)


def _joins(character: str) -> bool:
    """Whether a character can merge with the one before it: accents, and vowels and final consonants of Korean."""
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"


# --- tokens -----------------------------------------------------------------------------------------------------------


class Tokens:
    """A tokenizer. `before` and `after` are the special tokens that it puts around a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._first = FirstTokens(tokenizer)
        plain = self._ids(["a"])[0]
        around = list(tokenizer("a", verbose=False)["input_ids"])
        at = _find(around, plain)
        self.before: list[int] = around[:at]
        self.after: list[int] = around[at + len(plain) :]

    def _ids(self, texts: Sequence[str], **settings: bool) -> list[list[int]]:
        return [list(ids) for ids in encode_plain(self.tokenizer, texts, settings)["input_ids"]] if texts else []

    def plain(self, texts: Sequence[str], *, most: int | None = None, literal: bool = False) -> list[list[int]]:
        """Ids without special tokens.

        Args:
            most: the caller reads only the first `most + 1` ids of a text, so a long text need not be read whole.
            literal: a special token that a text spells out is read as plain characters.
        """
        settings = {"split_special_tokens": True} if literal else {}
        if most is None or not texts:
            return self._ids(texts, **settings)
        return self._first.ids(texts, most + 1, settings)

    def row(self, text: str, most: int) -> list[int]:
        """Ids of a text with the special tokens around it, at most so many: the text loses its end."""
        room = max(most - len(self.before) - len(self.after), 0)
        ids = self.plain([text], most=room)[0][:room]
        return [*self.before, *ids, *self.after] or [self.filler]

    def ids_with_offsets(self, text: str, *, literal: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without special tokens, and the characters of each: first, one past the last.

        Args:
            literal: a special token that the text spells out is read as plain characters.
        """
        settings = {"split_special_tokens": True} if literal else {}
        coded = encode_plain(self.tokenizer, [text], settings)
        ids = list(coded["input_ids"][0])
        if not self.tokenizer.is_fast:
            return ids, [(0, len(text))] * len(ids)
        return ids, [(int(first), int(last)) for first, last in coded.encodings[0].offsets]

    @cached_property
    def around_pair(self) -> tuple[list[int], list[int], list[int]]:
        """The tokens before, between and after two texts. A tokenizer without any between them gets a line break."""
        a, b = self._ids(["a"])[0], self._ids(["b"])[0]
        around = list(self._pair["input_ids"])
        first = _find(around, a)
        rest = around[first + len(a) :]
        second = _find(rest, b)
        return around[:first], rest[:second] or self._ids(["\n"])[0], rest[second + len(b) :]

    @cached_property
    def segments(self) -> bool:
        """Whether the tokenizer gives a second text another segment than the first."""
        return 1 in self._pair.get("token_type_ids", [])

    @cached_property
    def _pair(self) -> TextEncoding:
        return self.tokenizer("a", "b", verbose=False)

    @property
    def eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise BaseModelError("the tokenizer has no eos token, so generated text would not end: use another base")
        return int(self.tokenizer.eos_token_id)

    @property
    def filler(self) -> int:
        """The token that stands for an empty text if the tokenizer adds no special tokens."""
        known = self.tokenizer
        ids = (known.eos_token_id, known.bos_token_id, known.pad_token_id, known.unk_token_id)
        return next((token for token in ids if token is not None), 0)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """`sha256:…` over everything that turns texts into ids: vocabulary, rules, special tokens, chat template.

    Settings that a call leaves behind, such as truncation, are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules: JsonObject = json.loads(backend.to_str())
        rules |= {"truncation": None, "padding": None}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = {"rules": rules, "special": special, "chat_template": getattr(tokenizer, "chat_template", None)}
    return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"


def _find(whole: list[int], part: list[int]) -> int:
    for at in range(len(whole) - len(part) + 1):
        if whole[at : at + len(part)] == part:
            return at
    raise BaseModelError("the tokenizer changes a text when it adds special tokens: use another base")
