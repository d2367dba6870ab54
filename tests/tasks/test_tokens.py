"""The digest of a tokenizer depends on how it encodes texts, not on its last call."""

from __future__ import annotations

import small_models

from turret.tasks.tokens import tokenizer_digest


def test_the_digest_does_not_depend_on_the_last_call() -> None:
    known = small_models.tokenizer("bert")
    digest = tokenizer_digest(known)
    known(["a text"], truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(known) == digest == tokenizer_digest(small_models.tokenizer("bert"))


def test_another_vocabulary_rule_special_token_or_template_changes_the_digest() -> None:
    digests = {tokenizer_digest(small_models.tokenizer(family)) for family in ("bert", "roberta", "gpt2", "qwen3")}
    for change in (
        lambda it: it.add_tokens(["zebra"]),
        lambda it: setattr(it, "chat_template", "{{ messages }}"),
        lambda it: setattr(it, "pad_token", "[SEP]"),
        lambda it: setattr(it.backend_tokenizer, "normalizer", None),
    ):
        changed = small_models.tokenizer("bert")
        change(changed)
        digests.add(tokenizer_digest(changed))
    assert len(digests) == 8
