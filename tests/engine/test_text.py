"""A growing text: pieces join to the whole, and no stop string leaks, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import byte_level
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from turret.engine.sequence import IncrementalText, TokenEnds, text_of_token

WORDS = st.lists(st.sampled_from(["a", "b", " ", "ab", "\n", "ba ", " a", "aab"]), max_size=20)


def grown(
    words: Sequence[str], stop: Sequence[str], strip: bool = True, least: int = 0
) -> tuple[list[str], IncrementalText]:
    pieces = []
    text = IncrementalText(lambda tokens: "".join(words[: len(tokens)]), stop, strip=strip, least=least)
    for count in range(1, len(words) + 1):
        pieces.append(text.grow(range(count)))
        if text.stopped:
            break
    pieces.append(text.end())
    return pieces, text


@settings(deadline=None)
@given(WORDS, st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop_string(words: list[str], stop: list[str]) -> None:
    pieces, text = grown(words, stop)
    whole = "".join(words)
    if text.stopped:
        # the first token that completes a stop string ends the text, at the earliest stop string there is by then
        ends = [min((at for each in stop if (at := "".join(words[:n]).find(each)) >= 0), default=-1) for n in
                range(1, len(words) + 1)]  # fmt: skip
        whole = whole[: next(end for end in ends if end >= 0)]
    else:
        assert not any(each in whole for each in stop)
    assert "".join(pieces) == text.text == whole.strip()


@settings(deadline=None)
@given(WORDS, st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3), st.integers(0, 6))
@example(["a", "b", "ab"], ["ab"], 2)
@example(["a", "b", "a"], ["ba"], 2)
def test_a_stop_string_counts_if_it_ends_after_the_fewest_tokens(words: list[str], stop: list[str], least: int) -> None:
    pieces, text = grown(words, stop, least=least)
    whole, free = "".join(words), len("".join(words[:least]))
    ends = [(number, place) for number in range(least + 1, len(words) + 1) for each in stop
            for place in range(len("".join(words[:number])) - len(each) + 1)
            if whole.startswith(each, place) and place + len(each) > free]  # fmt: skip
    assert text.stopped == bool(ends)
    assert "".join(pieces) == text.text == (whole[: min(ends)[1]] if ends else whole).strip()


@settings(deadline=None)
@given(WORDS)
def test_a_raw_text_keeps_its_white_space(words: list[str]) -> None:
    pieces, text = grown(words, [], strip=False)
    assert pieces[:-1] == words
    assert "".join(pieces) == text.text == "".join(words)


@settings(deadline=None)
@given(st.text(max_size=12), st.integers(0, 12))
def test_the_texts_of_tokens_join_to_the_text_even_inside_a_character(text: str, start: int) -> None:
    words = byte_level.tokenizer()
    core = words.backend_tokenizer
    ids = [core.token_to_id(each) for each in alphabet(text)]  # a token a byte
    ends = TokenEnds(lambda tokens: words.decode(list(tokens)))
    ends.grow(ids[:start])
    ends.grow(ids)
    pieces = [text_of_token(text, ends.ends, place, whole=True) for place in range(len(ids))]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def alphabet(text: str) -> list[str]:
    """The tokens of the bytes of a text, as a byte-level tokenizer writes them."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    plain = [byte for byte in range(256) if chr(byte) in names]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [table[byte] for byte in text.encode()]


def test_a_stop_string_across_tokens_is_held_back_until_it_is_decided() -> None:
    assert grown(["x", "E", "N", "D", "y"], ["END"])[0] == ["x", "", "", "", ""]
    assert grown(["x", "E", "N", "O"], ["END"])[0] == ["x", "", "", "ENO", ""]


def test_an_incomplete_character_is_held_back() -> None:
    text = IncrementalText(lambda tokens: ["", "a�", "aé"][len(tokens)], [])
    assert [text.grow([1]), text.grow([1, 2]), text.end()] == ["a", "é", ""]


CLEANING = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)))


@settings(deadline=None)
@given(st.lists(st.sampled_from([*" .,n'tsvem", " n", "'t", "re"]), max_size=20), st.booleans())
@example(["I", " do", " n", "'", "t", " know", " ."], True)
@example(["n", " ", "'", " ", "."], False)
def test_what_the_tokenizer_cleans_up_is_held_back_until_it_is_decided(words: list[str], strip: bool) -> None:
    """As T5's tokenizers with `clean_up_tokenization_spaces`."""

    def decode(tokens: Sequence[int]) -> str:
        return CLEANING.clean_up_tokenization("".join(words[: len(tokens)]))

    text = IncrementalText(decode, (), strip=strip, cleans=True)
    pieces = [text.grow(range(count)) for count in range(1, len(words) + 1)]
    whole = decode(range(len(words)))
    assert "".join([*pieces, text.end()]) == text.text == (whole.strip() if strip else whole)


def test_white_space_around_the_text_is_never_sent() -> None:
    pieces, text = grown([" ", "a", " ", "b", " "], [])
    assert "".join(pieces) == text.text == "a b"
    assert pieces[:3] == ["", "a", ""]
