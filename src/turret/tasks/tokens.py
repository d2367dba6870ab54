"""From texts to token ids, many at once: special tokens where the tokenizer puts them, cut where the text ends.

The text is tokenized once, without special tokens; what the tokenizer puts around a text is found out once and put
around it here, so that a cut never costs a special token or an instruction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from turret.errors import BaseModelError
from turret.tasks.beginnings import Beginnings


class Tokens:
    """A tokenizer with its habits: `before` and `after` are the special tokens that it puts around a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._beginnings = Beginnings(tokenizer)
        plain = self._ids(["a"])[0]
        around = list(tokenizer("a", verbose=False)["input_ids"])
        at = _find(around, plain)
        self.before: list[int] = around[:at]
        self.after: list[int] = around[at + len(plain) :]

    def _ids(self, texts: Sequence[str], **settings: Any) -> list[list[int]]:
        if not texts:
            return []
        coded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False, padding=False, **settings)
        return [list(ids) for ids in coded["input_ids"]]

    def plain(self, texts: Sequence[str], *, most: int | None = None, literal: bool = False) -> list[list[int]]:
        """Ids without special tokens. `most`: only the first so many and one more will be looked at, so a long text is
        read no further than these need. `literal`: a special token written in a text is read as characters."""
        settings = {"split_special_tokens": True} if literal else {}
        if most is None or not texts:
            return self._ids(texts, **settings)
        return self._beginnings.ids(texts, most + 1, settings)

    @property
    def eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise BaseModelError("the tokenizer has no eos token, so no generated text could end: use another base")
        return int(self.tokenizer.eos_token_id)

    @property
    def filler(self) -> int:
        """What stands for a text without any token, where the tokenizer puts none around it either."""
        known = self.tokenizer
        for token in (known.eos_token_id, known.bos_token_id, known.pad_token_id, known.unk_token_id):
            if token is not None:
                return int(token)
        return 0


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over all that makes ids of texts: vocabulary, rules, special tokens, chat template.

    Not over what a call has set, such as how it cuts.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        rules: dict[str, Any] = json.loads(core.to_str())
        rules |= {"truncation": None, "padding": None}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    said = {"rules": rules, "special": special, "chat_template": getattr(tokenizer, "chat_template", None)}
    return f"sha256:{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}"


def _find(whole: list[int], part: list[int]) -> int:
    for at in range(len(whole) - len(part) + 1):
        if whole[at : at + len(part)] == part:
            return at
    raise BaseModelError("the tokenizer changes a text when it adds special tokens: use another base")
