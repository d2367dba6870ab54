"""From texts to token ids, many at once.

A text is tokenized without special tokens. Those that the tokenizer puts around a text are determined once and added
here, so that a cut never removes a special token or an instruction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from turret.errors import BaseModelError
from turret.json_types import JsonObject
from turret.tasks.first_tokens import FirstTokens
from turret.transformer import Tokenizer


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
        if not texts:
            return []
        coded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False, padding=False, **settings)
        return [list(ids) for ids in coded["input_ids"]]

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

    def placed(self, text: str, *, literal: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without special tokens, and the characters of each: first, one past the last.

        Args:
            literal: a special token that the text spells out is read as plain characters.
        """
        settings = {"split_special_tokens": True} if literal else {}
        coded = self.tokenizer([text], add_special_tokens=False, verbose=False, padding=False, **settings)
        ids = list(coded["input_ids"][0])
        if not self.tokenizer.is_fast:
            return ids, [(0, len(text))] * len(ids)
        return ids, [(int(first), int(last)) for first, last in coded.encodings[0].offsets]

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
